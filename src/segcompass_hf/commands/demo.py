# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import load_checkpoint, make_folder, need_figures, positive, user_errors
from .predict import answer_row, figure_row, print_answer, save_figure


def add_parser(commands: Any) -> None:
    """Register the command."""
    demo = commands.add_parser("demo", help="scenes and instructions to reasoning, heatmaps and masks, as pictures")
    demo.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the pictures (%(default)s)")
    demo.add_argument("--model", help="checkpoint folder or Hub id (the bundled checkpoint)")
    demo.add_argument("--split", default="val", help="split of Scenes (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the scenes (%(default)s)")
    demo.add_argument(
        "--samples", type=positive, default=8, help="number of scenes: the first of every kind, then the next"
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    need_figures()
    rows = _demo_rows(args.split, args.samples, args.seed)
    model, processor, name = load_checkpoint(args.model)

    from ..data.scenes.drawing import GRID
    from ..data.schema import decode_masks
    from ..metrics.segmentation import score_sample

    make_folder(args.output)
    print(f"{name} on {len(rows)} scenes of {args.split}, seed {args.seed}\n")
    drawn, scores = [], []
    for index, row in enumerate(rows):
        image = row["image"]
        answer = answer_row(model, processor, image, row["instruction"], "full")
        drawing = figure_row(image, row["instruction"], answer)
        drawing.true_masks = decode_masks(row["masks"], image.size[::-1])
        drawing.grid = GRID
        scores.append(score_sample(drawing.masks, drawing.true_masks))
        drawing.caption = f"{row['kind']},  IoU {scores[-1].iou:.2f}"
        drawn.append(drawing)
        path = args.output / f"scene_{index:02d}_{row['kind']}.png"
        save_figure([drawing], path)
        print(f"[{index}] {row['instruction']}")
        print_answer(answer, indent="    ")
        print(f"    IoU with the truth {scores[-1].iou:.2f}   {path}\n")
    overview = args.output / "overview.png"
    save_figure(drawn, overview)
    print(f"mean IoU of these {len(rows)} scenes: {sum(score.iou for score in scores) / len(scores):.2f}")
    print(f"all in one picture: {overview}")


def _demo_rows(split: str, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """The first scene of every kind of instruction, in the data set's order, then the next ones; nothing is chosen
    by how well it is answered."""
    with user_errors("the demo needs the Scenes data set", (ImportError,)):
        from ..data import scenes
        from ..data.schema import decode_mask
    with user_errors():
        rows = list(scenes.iterate(split, max(60, num_samples), seed))
        decode_mask(next(row["masks"][0] for row in rows if row["masks"]))
    firsts = {row["kind"]: row for row in reversed(rows)}
    chosen = {id(row) for row in firsts.values()}
    return sorted(rows, key=lambda row: id(row) not in chosen)[:num_samples]  # the sort is stable
