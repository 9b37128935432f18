# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass demo`: photographs by photos-small where it is there, then scenes by scenes-tiny or another model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import PHOTOS, SCENES, words_note
from .common import load_checkpoint, make_folder, need_figures, open_image, positive, print_page, user_errors
from .predict import figure_row, print_answer, processed_answer, save_figure

PAGE = "index.html"  # of all answers, in --output
PHOTOGRAPHS = "examples/photos/photographs.yaml"  # in a clone of the repository: what is shown of photos-small


def add_parser(commands: Any) -> None:
    """Register the command."""
    demo = commands.add_parser(
        "demo",
        help="photographs (in a clone of the repository) and scenes, to reasoning, heatmaps, masks and concepts, as "
        "pictures and one page",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("out/demo"), help="folder for the page and the pictures (%(default)s)"
    )
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
    from ..explain.answers_page import answers_page
    from ..files import write_whole

    need_figures()
    rows = _demo_rows(args.split, args.samples, args.seed)
    make_folder(args.output)
    sections = [] if args.model is not None else _show_photographs(args.output)
    sections.append(_show_scenes(rows, args))
    overview, page = args.output / "overview.png", args.output / PAGE
    save_figure([answer.drawing for _, answers in sections for answer in answers], overview)
    print(f"all in one picture: {overview}")
    with user_errors(f"cannot write {page}"):
        shown = [(about, [answer.shown for answer in answers]) for about, answers in sections]
        write_whole(page, answers_page("Answers of SegCompass", shown).encode("utf-8", errors="replace"))
    print_page(page)


@dataclass
class _DemoAnswer:
    """An answer as a row of a figure, as a part of the page, and as what is printed of it."""

    drawing: Any
    shown: Any
    answer: dict[str, Any]


def _answer(model: Any, processor: Any, image: Any, instruction: str, grid: int) -> _DemoAnswer:
    from ..explain.answer import Answer
    from ..explain.answers_page import ShownAnswer
    from ..explain.explaining import explain_answer

    with user_errors():
        answered = Answer(model, processor, image, instruction)
        captured = answered.captured
        answer = processed_answer(processor, captured, captured.original_sizes, captured.reshaped_input_sizes)
        shown = ShownAnswer(explain_answer(answered), grid)
    drawing = figure_row(image, instruction, answer)
    drawing.grid = grid
    return _DemoAnswer(drawing, shown, answer)


def _write(answer: _DemoAnswer, output: Path, name: str) -> Path:
    """The picture of an answer, and the page of its explanation; returns the picture's path."""
    path = output / f"{name}.png"
    save_figure([answer.drawing], path)
    answer.shown.address = f"{name}.html"
    answer.shown.explanation.to_html(output / answer.shown.address)
    return path


def _show_photographs(output: Path) -> list[tuple[str, list[_DemoAnswer]]]:
    """Answers to the photographs of the repository; none where the checkpoint is not there."""
    from .. import bundled_checkpoint

    try:
        listed = bundled_checkpoint(PHOTOS).parents[1] / PHOTOGRAPHS
    except FileNotFoundError as error:
        print(f"No photographs are shown: {error}\n")
        return []
    grid, photographs = read_photographs(listed)
    model, processor, name = load_checkpoint(PHOTOS)
    about = f"{name} on {len(photographs)} photographs. Their true masks are not known, so there are no scores: look."
    print(f"{about}\n")
    answers = []
    for index, photograph in enumerate(photographs):
        file, instruction = listed.parent / photograph["image"], photograph["instruction"]
        failure = photograph.get("failure")
        notes = [f"A typical failure: {failure}"] if failure else []
        answer = _answer(model, processor, open_image(str(file)), instruction, grid)
        answer.drawing.caption = "  ".join(notes)
        unknown = words_note(processor, instruction)
        answer.shown.notes = notes + ([] if unknown is None else [unknown])
        answers.append(answer)
        path = _write(answer, output, f"photograph_{index:02d}_{file.stem}")
        print(f"[{index}] {file.name}: {instruction}")
        print_answer(answer.answer, indent="    ")
        for note in (*answer.shown.notes, path):
            print(f"    {note}")
        print()
    return [(about, answers)]


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


def _show_scenes(rows: list[dict[str, Any]], args: argparse.Namespace) -> tuple[str, list[_DemoAnswer]]:
    """Answers to scenes, with their scores."""
    model, processor, name = load_checkpoint(args.model or SCENES)

    from ..data.scenes.drawing import GRID
    from ..data.schema import decode_masks
    from ..metrics.segmentation import score_sample

    about = f"{name} on {len(rows)} scenes of {args.split}, seed {args.seed}"
    print(f"{about}\n")
    answers, scores = [], []
    for index, row in enumerate(rows):
        image = row["image"]
        answer = _answer(model, processor, image, row["instruction"], GRID)
        drawing = answer.drawing
        drawing.true_masks = decode_masks(row["masks"], image.size[::-1])
        scores.append(score_sample(drawing.masks, drawing.true_masks))
        drawing.caption = f"{row['kind']},  IoU {scores[-1].iou:.2f}"
        answer.shown.notes = [f"IoU with the truth {scores[-1].iou:.2f}"]
        answers.append(answer)
        path = _write(answer, args.output, f"scene_{index:02d}_{row['kind']}")
        print(f"[{index}] {row['instruction']}")
        print_answer(answer.answer, indent="    ")
        print(f"    IoU with the truth {scores[-1].iou:.2f}   {path}\n")
    mean = f"mean IoU of these {len(rows)} scenes: {sum(score.iou for score in scores) / len(scores):.2f}"
    print(mean)
    return f"{about}; {mean}.", answers


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
