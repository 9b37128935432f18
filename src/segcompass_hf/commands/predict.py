# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass predict`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import BUNDLED_DOMAIN, UserError, load_checkpoint, make_folder, open_image, unknown_words


def add_parser(commands: Any) -> None:
    """Register the command."""
    predict = commands.add_parser("predict", help="one image and instruction to reasoning, scores, masks and a figure")
    predict.add_argument("image", help="image file")
    predict.add_argument("instruction", help="what to find, in words")
    predict.add_argument("--model", help="checkpoint folder or Hub id (the bundled checkpoint)")
    predict.add_argument(
        "--output", type=Path, help="figure to write (IMAGE.segcompass.png here; with --json none unless given)"
    )
    predict.add_argument("--json", action="store_true", help="print JSON with the masks as COCO run-length encodings")
    predict.add_argument(
        "--reasoning", choices=("full", "short", "none"), default="full", help="how much to think (%(default)s)"
    )
    predict.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> None:
    if not args.instruction.strip():
        raise UserError("the instruction is empty; say in words what to find.")
    if args.output is not None and args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise UserError(f"--output {args.output} is not a picture; name a .png, .jpg, .pdf or .svg file.")
    image = open_image(args.image)
    model, processor, name = load_checkpoint(args.model)
    if args.model is None:
        print(f"note: {BUNDLED_DOMAIN}", file=sys.stderr)
    unknown = unknown_words(processor.tokenizer, args.instruction)
    if unknown:
        print(f"note: the checkpoint does not know the words: {', '.join(unknown)}.", file=sys.stderr)

    answer = answer_row(model, processor, image, args.instruction, args.reasoning)
    output = args.output
    if output is None and not args.json:
        output = Path(f"{Path(args.image).stem}.segcompass.png")
    if output is not None:
        make_folder(output.parent)
        save_figure([figure_row(image, args.instruction, answer)], output)
    if args.json:
        print(json.dumps(_as_json(args, image, name, answer, output), indent=2))
        return
    print_answer(answer)
    print(f"figure: {output}")


def answer_row(model: Any, processor: Any, image: Any, instruction: str, reasoning: str) -> dict[str, Any]:
    """Post-processed answer of one image: `kept` (the slots above the model's threshold) and `every` (all slots)."""
    import torch

    try:
        inputs = processor(images=image, instruction=instruction, return_tensors="pt").to(model.device)
        with torch.no_grad():
            segmentation = model.segment(**inputs, reasoning=reasoning)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not (torch.isfinite(segmentation.pred_masks).all() and torch.isfinite(segmentation.slot_logits).all()):
        raise UserError("the checkpoint computes values that are not finite; its weights are damaged.")
    sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
    return {
        "kept": processor.post_process_segmentation(segmentation, **sizes)[0],
        "every": processor.post_process_segmentation(segmentation, **sizes, slot_logit_threshold=float("-inf"))[0],
    }


def figure_row(image: Any, instruction: str, answer: dict[str, Any]) -> Any:
    import numpy as np

    from ..explain import SegmentationRow

    kept, every = answer["kept"], answer["every"]
    return SegmentationRow(
        image=image,
        instruction=instruction,
        reasoning=kept["reasoning"],
        masks=np.asarray(kept["masks"]),
        scores=np.asarray(kept["scores"]),
        slots=np.asarray(kept["slots"]),
        heatmaps=np.asarray(every["heatmaps"]),
        confidences=np.asarray(every["scores"]),
    )


def save_figure(rows: list[Any], path: Path) -> None:
    from ..explain import plot_segmentations

    try:
        plot_segmentations(rows).savefig(path)
    except (ImportError, OSError) as error:
        raise UserError(f"cannot write the figure {path}: {error}") from error


def print_answer(answer: dict[str, Any], indent: str = "") -> None:
    kept = answer["kept"]
    print(f"{indent}reasoning: {kept['reasoning'] or '(none)'}")
    if len(kept["scores"]) == 0:
        best = max((float(score) for score in answer["every"]["scores"]), default=0.0)
        print(f"{indent}nothing found (best slot {best:.2f})")
    for slot, score, mask in zip(kept["slots"], kept["scores"], kept["masks"], strict=True):
        print(f"{indent}slot {int(slot)}: score {float(score):.2f}, {int(mask.sum())} pixels")


def _as_json(args: argparse.Namespace, image: Any, name: str, answer: dict[str, Any], output: Path | None) -> dict:
    import numpy as np

    from ..data.schema import encode_mask

    kept = answer["kept"]
    try:
        segments = [
            {
                "slot": int(slot),
                "score": float(score),
                "area": int(np.asarray(mask).sum()),  # pixels
                "mask": encode_mask(np.asarray(mask)),
            }
            for slot, score, mask in zip(kept["slots"], kept["scores"], kept["masks"], strict=True)
        ]
    except ImportError as error:
        raise UserError(str(error)) from error
    return {
        "image": args.image,
        "size": [image.height, image.width],
        "instruction": args.instruction,
        "model": name,
        "reasoning": kept["reasoning"],
        "text": kept["text"],
        "slot_scores": [float(score) for score in answer["every"]["scores"]],
        "segments": segments,
        "figure": None if output is None else str(output),
    }
