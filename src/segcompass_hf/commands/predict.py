# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass predict`: one image and one question, or a data set of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import predict_dataset
from .common import FIGURES, UserError, add_question, ask, check_question, make_folder, need_figures, user_errors

_RULES = {"forbid": "no mask may show", "require": "every mask has to show"}


def add_parser(commands: Any) -> None:
    """Register the command."""
    predict = commands.add_parser(
        "predict",
        help="one image and instruction to reasoning, scores, masks and a figure; or a data set to Parquet",
        epilog=predict_dataset.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_question(predict, required=False)
    predict.add_argument(
        "--output",
        help="figure to write (IMAGE.segcompass.png here; with --json none unless given); of a data set the folder or "
        "URL for its results",
    )
    predict.add_argument("--json", action="store_true", help="print JSON with the masks as COCO run-length encodings")
    for rule, what in _RULES.items():
        predict.add_argument(
            f"--{rule}",
            action="append",
            metavar="CONCEPT",
            help=f"concept that {what}, by its name in the concept dictionary; may be given several times",
        )
    predict_dataset.add_arguments(predict)
    predict.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> None:
    rules = {rule: getattr(args, rule) for rule in _RULES if getattr(args, rule)}
    if args.dataset is not None:
        if rules:
            raise UserError(f"--{next(iter(rules))} belongs to one image; the rows of a --dataset hold no guardrails.")
        predict_dataset.run(args)
        return
    predict_dataset.refuse_without_dataset(args)
    missing = [name for name in ("image", "instruction") if getattr(args, name) is None]
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(missing)} (or --dataset)")
    args.output = None if args.output is None else Path(args.output)
    check_question(args, FIGURES, "not a picture; name a .png, .jpg, .pdf or .svg file")
    if args.output is not None or not args.json:
        need_figures()
    image, model, processor, name = ask(args)
    answer = answer_row(model, processor, image, args.instruction, args.reasoning, **rules)
    output = args.output
    if output is None and not args.json:
        output = Path(f"{Path(args.image).stem}.segcompass.png")
    if output is not None:
        make_folder(output.parent)
        save_figure([figure_row(image, args.instruction, answer)], output)
    if args.json:
        print(json.dumps(_as_json(args, image, name, processor, answer, output), indent=2))
        return
    print_answer(answer)
    print(f"figure: {output}")


def answer_row(
    model: Any, processor: Any, image: Any, instruction: str, reasoning: str, **rules: list[str]
) -> dict[str, Any]:
    """Post-processed answer of one image: `kept` (the slots that are its answer) and `every` (all slots); `rules` are
    the `forbid` and `require` of `segment`."""
    import torch

    with user_errors(), torch.no_grad():
        inputs = processor(images=image, instruction=instruction, return_tensors="pt").to(model.device)
        segmentation = model.segment(**inputs, reasoning=reasoning, **rules)
    return processed_answer(processor, segmentation, inputs["original_sizes"], inputs["reshaped_input_sizes"])


def processed_answer(
    processor: Any, segmentation: Any, original_sizes: Any, reshaped_input_sizes: Any
) -> dict[str, Any]:
    """[`answer_row`] of a segmentation that is already there, with the sizes of its inputs."""
    import torch

    if not (torch.isfinite(segmentation.pred_masks).all() and torch.isfinite(segmentation.slot_logits).all()):
        raise UserError("the checkpoint computes values that are not finite; its weights are damaged.")
    sizes = {"original_sizes": original_sizes, "reshaped_input_sizes": reshaped_input_sizes}
    with user_errors():  # guardrails that cannot be judged
        return {
            "kept": processor.post_process_segmentation(segmentation, **sizes)[0],
            "every": processor.post_process_slots(segmentation, **sizes)[0],
        }


def figure_row(image: Any, instruction: str, answer: dict[str, Any]) -> Any:
    from ..figure import SegmentationRow

    return SegmentationRow.from_answer(image, instruction, answer["kept"], answer["every"])


def save_figure(rows: list[Any], path: Path) -> None:
    from ..figure import plot_segmentations, write_figure

    with user_errors(f"cannot write the figure {path}"):
        write_figure(plot_segmentations(rows), path)


def print_answer(answer: dict[str, Any], indent: str = "") -> None:
    kept = answer["kept"]
    print(f"{indent}reasoning: {kept['reasoning'] or '(none)'}")
    if len(kept["scores"]) == 0:
        best = max((float(score) for score in answer["every"]["scores"]), default=0.0)
        print(f"{indent}nothing found (best slot {best:.2f})")
    for slot, score, mask in zip(kept["slots"], kept["scores"], kept["masks"], strict=True):
        print(f"{indent}slot {int(slot)}: score {float(score):.2f}, {int(mask.sum())} pixels")
    for slot in kept["duplicates"]:
        print(f"{indent}slot {slot}: left out, the same object as a better mask")
    for entry in kept.get("guardrails", ()):
        print(f"{indent}guardrail: {entry['reason']}")


def _as_json(
    args: argparse.Namespace, image: Any, name: str, processor: Any, answer: dict[str, Any], output: Path | None
) -> dict[str, Any]:
    import numpy as np

    from ..data.schema import encode_mask

    kept = answer["kept"]
    with user_errors():  # the encoding needs pycocotools
        segments = [
            {
                "slot": int(slot),
                "score": float(score),
                "area": int(np.asarray(mask).sum()),  # pixels
                "mask": encode_mask(np.asarray(mask)),
            }
            for slot, score, mask in zip(kept["slots"], kept["scores"], kept["masks"], strict=True)
        ]
    return {
        "image": args.image,
        "size": [image.height, image.width],
        "instruction": args.instruction,
        "model": name,
        "unknown_words": processor.unknown_words(args.instruction),  # that the checkpoint was not trained on
        "reasoning": kept["reasoning"],
        "text": kept["text"],
        "slot_scores": [float(score) for score in answer["every"]["scores"]],
        "segments": segments,
        "duplicates": kept["duplicates"],  # slots left out: each the same object as a better one
        **({"guardrails": kept["guardrails"]} if "guardrails" in kept else {}),  # what broke which rule, and why
        "figure": None if output is None else str(output),
    }
