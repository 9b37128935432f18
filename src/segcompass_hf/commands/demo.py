# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass demo`: photographs by photos-small where it is there, then scenes by scenes-tiny or another model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoint import PHOTOS, SCENES, words_note
from .common import load_checkpoint, make_folder, need_figures, open_image, positive, user_errors
from .predict import answer_row, figure_row, print_answer, save_figure

PHOTOGRAPHS = "examples/photos/photographs.yaml"  # in a clone of the repository: what is shown of photos-small


def add_parser(commands: Any) -> None:
    """Register the command."""
    demo = commands.add_parser(
        "demo",
        help="photographs (in a clone of the repository) and scenes, to reasoning, heatmaps and masks, as pictures",
    )
    demo.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the pictures (%(default)s)")
    demo.add_argument(
        "--model",
        help="checkpoint folder or Hub id, which is shown on scenes alone (photos-small on photographs where it is "
        "there, then scenes-tiny on scenes)",
    )
    demo.add_argument("--split", default="val", help="split of Scenes (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the scenes (%(default)s)")
    demo.add_argument(
        "--samples", type=positive, default=8, help="number of scenes: the first of every kind, then the next"
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    need_figures()
    rows = _demo_rows(args.split, args.samples, args.seed)
    make_folder(args.output)
    drawn = [] if args.model is not None else _show_photographs(args.output)
    drawn += _show_scenes(rows, args)
    overview = args.output / "overview.png"
    save_figure(drawn, overview)
    print(f"all in one picture: {overview}")


def _show_photographs(output: Path) -> list[Any]:
    """Answers to the photographs of the repository, as rows of a figure; none where the checkpoint is not there."""
    from .. import bundled_checkpoint

    try:
        listed = bundled_checkpoint(PHOTOS).parents[1] / PHOTOGRAPHS
    except FileNotFoundError as error:
        print(f"No photographs are shown: {error}\n")
        return []
    grid, photographs = read_photographs(listed)
    model, processor, name = load_checkpoint(PHOTOS)
    print(f"{name} on {len(photographs)} photographs. Their true masks are not known, so there are no scores: look.\n")
    drawn = []
    for index, photograph in enumerate(photographs):
        file, instruction = listed.parent / photograph["image"], photograph["instruction"]
        failure = photograph.get("failure")
        notes = [f"A typical failure: {failure}"] if failure else []
        image = open_image(str(file))
        answer = answer_row(model, processor, image, instruction, "full")
        drawing = figure_row(image, instruction, answer)
        drawing.grid, drawing.caption = grid, "  ".join(notes)
        drawn.append(drawing)
        path = output / f"photograph_{index:02d}_{file.stem}.png"
        save_figure([drawing], path)
        print(f"[{index}] {file.name}: {instruction}")
        print_answer(answer, indent="    ")
        for note in (*notes, words_note(processor, instruction), path):
            if note is not None:
                print(f"    {note}")
        print()
    return drawn


def read_photographs(listed: Path) -> tuple[int, list[dict[str, str]]]:
    """What is shown of a checkpoint for photographs.

    Args:
        listed (`Path`): A YAML file with `grid`, cells per side of the grid of places that the reasoning uses, and
            `photographs`: of each `image`, a file beside it, `instruction`, and `failure`, a sentence about what is
            wrong where it stands for others that fail.

    Returns:
        `tuple`: grid, and the photographs in the order of the file.

    Raises:
        UserError: It cannot be read.
    """
    import yaml

    with user_errors(f"cannot read {listed}", (OSError, ValueError, KeyError, TypeError, yaml.YAMLError)):
        content = yaml.safe_load(listed.read_text(encoding="utf-8"))
        photographs = content["photographs"]
        wrong = [one for one in photographs if not {"image", "instruction"} <= set(one)]
        if wrong:
            raise ValueError(f"a photograph needs image and instruction: {wrong[0]}")
        return int(content["grid"]), photographs


def _show_scenes(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[Any]:
    """Answers to scenes, as rows of a figure."""
    model, processor, name = load_checkpoint(args.model or SCENES)

    from ..data.scenes.drawing import GRID
    from ..data.schema import decode_masks
    from ..metrics.segmentation import score_sample

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
    print(f"mean IoU of these {len(rows)} scenes: {sum(score.iou for score in scores) / len(scores):.2f}")
    return drawn


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
