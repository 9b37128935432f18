# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The `segcompass` command. Parsing and printing only; every import that costs time stands inside a command."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .commands import convert, data, evaluate, explain, init, push, serve
from .commands.common import BUNDLED_DOMAIN, UserError, load_checkpoint, make_folder, one_line, positive

_COMMANDS = (explain, evaluate, serve, data, init, convert, push)  # each in a module of its own


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: exit code, 0 on success and 2 on bad input.
    """
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"segcompass {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="segcompass", description="Reasoning segmentation: an instruction to reasoning and masks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="scenes and instructions to reasoning, heatmaps and masks, as pictures")
    demo.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the pictures (%(default)s)")
    demo.add_argument("--model", help="checkpoint folder or Hub id (the bundled checkpoint)")
    demo.add_argument("--split", default="val", help="split of Scenes (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the scenes (%(default)s)")
    demo.add_argument(
        "--samples", type=positive, default=8, help="number of scenes: the first of every kind, then the next"
    )
    demo.set_defaults(run=_demo)

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
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _demo(args: argparse.Namespace) -> None:
    rows = _demo_rows(args.split, args.samples, args.seed)
    model, processor, name = load_checkpoint(args.model)

    from .data.scenes.drawing import GRID
    from .data.schema import decode_masks
    from .metrics.segmentation import score_sample

    make_folder(args.output)
    print(f"{name} on {len(rows)} scenes of {args.split}, seed {args.seed}\n")
    drawn, scores = [], []
    for index, row in enumerate(rows):
        image = row["image"]
        answer = _answer(model, processor, image, row["instruction"], "full")
        figure_row = _figure_row(image, row["instruction"], answer)
        figure_row.true_masks = decode_masks(row["masks"], image.size[::-1])
        figure_row.grid = GRID
        scores.append(score_sample(figure_row.masks, figure_row.true_masks))
        figure_row.caption = f"{row['kind']},  IoU {scores[-1].iou:.2f}"
        drawn.append(figure_row)
        path = args.output / f"scene_{index:02d}_{row['kind']}.png"
        _save_figure([figure_row], path)
        print(f"[{index}] {row['instruction']}")
        _print_answer(answer, indent="    ")
        print(f"    IoU with the truth {scores[-1].iou:.2f}   {path}\n")
    overview = args.output / "overview.png"
    _save_figure(drawn, overview)
    print(f"mean IoU of these {len(rows)} scenes: {sum(score.iou for score in scores) / len(scores):.2f}")
    print(f"all in one picture: {overview}")


def _demo_rows(split: str, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """The first scene of every kind of instruction, in the data set's order, then the next ones; nothing is chosen
    by how well it is answered."""
    try:
        from .data import scenes
        from .data.schema import decode_mask
    except ImportError as error:
        raise UserError(f"the demo needs the Scenes data set: {error}") from error
    try:
        rows = list(scenes.iterate(split, max(60, num_samples), seed))
        decode_mask(next(row["masks"][0] for row in rows if row["masks"]))
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    firsts = {row["kind"]: row for row in reversed(rows)}
    chosen = {id(row) for row in firsts.values()}
    return sorted(rows, key=lambda row: id(row) not in chosen)[:num_samples]  # the sort is stable


def _predict(args: argparse.Namespace) -> None:
    if not args.instruction.strip():
        raise UserError("the instruction is empty; say in words what to find.")
    if args.output is not None and args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise UserError(f"--output {args.output} is not a picture; name a .png, .jpg, .pdf or .svg file.")
    image = _open_image(args.image)
    model, processor, name = load_checkpoint(args.model)
    if args.model is None:
        print(f"note: {BUNDLED_DOMAIN}", file=sys.stderr)
    unknown = unknown_words(processor.tokenizer, args.instruction)
    if unknown:
        print(f"note: the checkpoint does not know the words: {', '.join(unknown)}.", file=sys.stderr)

    answer = _answer(model, processor, image, args.instruction, args.reasoning)
    output = args.output
    if output is None and not args.json:
        output = Path(f"{Path(args.image).stem}.segcompass.png")
    if output is not None:
        make_folder(output.parent)
        _save_figure([_figure_row(image, args.instruction, answer)], output)
    if args.json:
        print(json.dumps(_as_json(args, image, name, answer, output), indent=2))
        return
    _print_answer(answer)
    print(f"figure: {output}")


def unknown_words(tokenizer: Any, instruction: str) -> list[str]:
    """Words of an instruction that a tokenizer maps to its unknown token, in order, each once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): One without an unknown token knows every word.
        instruction (`str`): The user's words.
    """
    if tokenizer.unk_token_id is None:
        return []
    words = dict.fromkeys(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", instruction))
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]]


def _open_image(path: str) -> Any:
    if not Path(path).exists():
        raise UserError(f"there is no file {path!r}; give the path of an image.")
    from .images_segcompass import to_rgb_image

    try:
        return to_rgb_image(path)
    except Exception as error:  # PIL's readers raise many kinds on damaged files, and on bombs
        raise UserError(str(error)) from error


def _answer(model: Any, processor: Any, image: Any, instruction: str, reasoning: str) -> dict[str, Any]:
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


def _figure_row(image: Any, instruction: str, answer: dict[str, Any]) -> Any:
    import numpy as np

    from .explain import SegmentationRow

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


def _save_figure(rows: list[Any], path: Path) -> None:
    from .explain import plot_segmentations

    try:
        plot_segmentations(rows).savefig(path)
    except (ImportError, OSError) as error:
        raise UserError(f"cannot write the figure {path}: {error}") from error


def _print_answer(answer: dict[str, Any], indent: str = "") -> None:
    kept = answer["kept"]
    print(f"{indent}reasoning: {kept['reasoning'] or '(none)'}")
    if len(kept["scores"]) == 0:
        best = max((float(score) for score in answer["every"]["scores"]), default=0.0)
        print(f"{indent}nothing found (best slot {best:.2f})")
    for slot, score, mask in zip(kept["slots"], kept["scores"], kept["masks"], strict=True):
        print(f"{indent}slot {int(slot)}: score {float(score):.2f}, {int(mask.sum())} pixels")


def _as_json(args: argparse.Namespace, image: Any, name: str, answer: dict[str, Any], output: Path | None) -> dict:
    import numpy as np

    from .data.schema import encode_mask

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


if __name__ == "__main__":
    sys.exit(main())
