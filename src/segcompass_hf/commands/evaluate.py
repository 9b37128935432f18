# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass evaluate`: a checkpoint, masks, boxes or baseline on any data set, resumable, on several processes."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import BUNDLED, default_checkpoint
from .common import (
    UserError,
    add_model,
    load_checkpoint,
    make_folder,
    positive,
    print_page,
    show_progress,
    user_errors,
)

_EPILOG = """\
On several GPUs or CPUs: torchrun --nproc_per_node N -m segcompass_hf.cli evaluate ..., or accelerate launch. The same
command continues what a kill interrupted. `--compare` alone, with `--output`, compares two finished runs.

data sets:
  scenes:SPLIT[:SEED]                       the procedural benchmark of this package
  refcoco:ROOT:IMAGES:SPLIT[:SPLIT_BY]      also refcoco+, refcocog, grefcoco
  reasonseg:ROOT[:SPLIT]
  hosted:PARQUET_OR_ID[:SPLIT]              a mirror with image, text, mask, image_id, ann_id
  folder:ROOT[:ANNOTATIONS[:SPLIT]]         images and a JSONL or CSV of your own
  coco:ANNOTATIONS:IMAGES
  labelme:ROOT                              a json of labelled shapes for each image
  yolo:DATA.yaml:SPLIT                      YOLO's label files with corners
  FILE.parquet, FOLDER[:SPLIT], OWNER/NAME[:SPLIT]   in the row schema
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="a checkpoint, masks, boxes of a VLM or a baseline on a data set, to metrics, tables and a page",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", help="what to evaluate on, see below")
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="read files outside of the data set's folder too, where its annotations or links lead there",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--predictions", type=Path, metavar="FOLDER", help="masks of any other model, from a folder")
    what.add_argument("--baseline", metavar="NAME", help="an answer to compare with; a wrong name lists them")
    what.add_argument("--boxes", metavar="VLM", help="folder or Hub id of a VLM that writes boxes")
    parser.add_argument("--sam", help="with --boxes: folder or Hub id of the SAM that segments them")
    parser.add_argument(
        "--coordinates",
        choices=("absolute", "resized", "thousand", "unit"),
        help="with --boxes: what the VLM's numbers are: pixels of the image, pixels of the image as its processor "
        "resized it, 0 to 1000, or 0 to 1 (absolute)",
    )
    parser.add_argument(
        "--image-size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="with --boxes: of the VLM's image"
    )
    add_model(parser)
    parser.add_argument("--num-samples", type=positive, help="only the first so many (all; of Scenes 500)")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows at a time (%(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, help="limit of an answer, in tokens (the model's)")
    parser.add_argument(
        "--unreadable",
        choices=("error", "count"),
        default="error",
        help="rows that cannot be read: stop, or list them and count them as failures (%(default)s)",
    )
    parser.add_argument(
        "--missing",
        choices=("error", "empty"),
        default="error",
        help="samples that --predictions lacks, or whose other objects a --baseline does not know: stop, or take "
        "nothing as their answer (%(default)s)",
    )
    parser.add_argument(
        "--pass-at-k",
        type=positive,
        nargs="*",
        metavar="K",
        help="sample every prompt as often as the largest K says, and write what share of K samples is right, as a "
        "prediction of what reinforcement can reach (1 4 16 64)",
    )
    parser.add_argument("--temperature", type=float, help="with --pass-at-k: of the samples (1)")
    parser.add_argument("--restart", action="store_true", help="drop the results that --output holds")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="results of another run, to list differences")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate what the command line asks for."""
    _check_sampling(args)
    if args.dataset is None:
        if args.compare is None:
            raise UserError("--dataset is missing; name what to evaluate on, such as scenes:val.")
        _print_comparison(args)
        return
    _check_boxes(args)
    from ..evaluation import ModelPredictor, datasets_spec

    show_progress()
    processes, kind = _processes(), args.dataset.partition(":")[0]
    with user_errors(kind), processes.main_first():
        named = datasets_spec.load_dataset_of(args.dataset, args.num_samples, args.allow_outside)
    make_folder(args.output)
    predictor = _predictor(args, named, processes.device)
    if isinstance(predictor, ModelPredictor) and predictor.name in BUNDLED and named.kind != "scenes":
        print(f"note: {BUNDLED[predictor.name]}", file=sys.stderr)
    if args.pass_at_k is not None:
        figures = _measure_pass_at_k(args, predictor, named)
        if processes.is_main:
            _print_pass_at_k(args, figures)
        processes.finish()
        return
    summary = _evaluate(args, predictor, named)
    if processes.is_main:
        _print_results(args, summary)
    processes.finish()


def _print_results(args: argparse.Namespace, summary: Any) -> None:
    from ..evaluation.report import SAMPLES_PAGE

    comparison = None if args.compare is None else _compare(args)
    if args.json:
        extra = {} if comparison is None else {"comparison": comparison.to_dict()}
        print(json.dumps(summary.figures | extra, indent=1))
        return
    _print_summary(summary)
    if args.boxes is not None:
        _print_malformed(args.output)
    if comparison is not None:
        print(comparison.to_text())
    print_page(args.output / SAMPLES_PAGE)


def _print_summary(summary: Any) -> None:
    figures, counts = summary.figures, summary.figures["counts"]
    samples = f"{counts['samples']} samples, {counts['no_target']} without target"
    if counts["left_out"]:
        samples += f", {counts['left_out']} left out, for all of their target is ignored"
    print(f"{figures['predictor']} on {figures['dataset']}: {samples}")
    kept = counts["samples"] - figures["timing"]["last_start"]["samples"]
    if kept:
        print(f"  {kept} of them were evaluated before and kept")
    for name, figure in figures["metrics"].items():
        if figure["num_samples"]:
            print(f"  {name:14} {figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]")
    scores = figures["calibration"]
    if scores is not None:
        error, right = scores["expected_calibration_error"], scores["right"]
        print(f"  scores: mean {scores['mean_score']:.3f}, right {right:.3f}, expected calibration error {error:.3f}")
        print(f"  duplicates: {counts['duplicates']}, left out: {counts['duplicates_dropped']}")
    _print_selection(figures)
    if counts["unreadable"]:
        print(f"  {counts['unreadable']} unreadable samples count as failures, see summary.md")
    print(f"{summary.output_dir}: {', '.join(figures['files'])}")


def _print_selection(figures: dict[str, Any]) -> None:
    """What was lost to choosing the wrong objects and what to drawing badly, where all objects are known."""
    from ..evaluation.tables import SELECTION_TITLES, selection_rows
    from ..printable import printable

    rows = [[printable(cell) for cell in row] for row in selection_rows(figures)]
    if rows:
        lines = [["choosing, drawing", "samples", *SELECTION_TITLES.values()], *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_malformed(output: Path) -> None:
    from ..evaluation import is_malformed, read_samples

    number = sum(is_malformed(record["text"]) for record in read_samples(output))
    if number:
        print(f"  {number} answers could not be understood and count as empty predictions")


def _evaluate(args: argparse.Namespace, predictor: Any, named: Any) -> Any:
    from ..evaluation import evaluate_dataset

    show_progress()  # loading the checkpoint has switched it off
    with user_errors():
        return evaluate_dataset(
            predictor,
            named.dataset,
            args.output,
            batch_size=args.batch_size,
            num_samples=args.num_samples,
            dataset_name=named.name,
            unreadable=args.unreadable,
            resume=not args.restart,
            notes={"command": shlex.join(["segcompass", *args.argv]), **named.notes()},
        )


def _measure_pass_at_k(args: argparse.Namespace, predictor: Any, named: Any) -> dict[str, Any]:
    from ..evaluation import measure_pass_at_k

    with user_errors():
        return measure_pass_at_k(
            predictor,
            named.dataset,
            args.output,
            _ks(args),
            batch_size=args.batch_size,
            num_samples=args.num_samples,
            dataset_name=named.name,
            unreadable=args.unreadable,
            resume=not args.restart,
            notes={"command": shlex.join(["segcompass", *args.argv]), **named.notes()},
        )


def _ks(args: argparse.Namespace) -> tuple[int, ...]:
    from ..evaluation.pass_at_k import KS

    return tuple(args.pass_at_k) or KS


def _print_pass_at_k(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    from ..evaluation.tables import figure_cell
    from ..printable import printable

    if args.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{figures['predictor']} on {figures['dataset']}: {figures['all']['num_prompts']} prompts, share right")
    for name, group in ({"all": figures["all"]} | figures["by_kind"]).items():
        cells = [f"pass@{k} {figure_cell(its['pass'])}" for k, its in group["by_k"].items()]
        print(f"  {printable(name):12} {'  '.join(cells)}")
    print(f"{args.output}: prediction.md, prediction.json, prompts.jsonl")


def _check_sampling(args: argparse.Namespace) -> None:
    """`--pass-at-k` asks a model, and `--temperature` belongs to it."""
    if args.pass_at_k is None:
        if args.temperature is not None:
            raise UserError("--temperature belongs to --pass-at-k; other evaluation is greedy.")
        return
    for name in ("predictions", "baseline", "boxes", "compare"):
        if getattr(args, name) is not None:
            raise UserError(f"--pass-at-k samples a checkpoint (--model); leave --{name} out.")


def _predictor(args: argparse.Namespace, named: Any, device: Any) -> Any:
    from ..evaluation import ModelPredictor
    from ..evaluation.predictors import baselines, external
    from ..evaluation.rows import EvaluationRows

    limits = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    with user_errors():
        if args.predictions is not None:
            sample_ids = EvaluationRows(named.dataset, args.num_samples).sample_ids()
            return external.FolderPredictor(args.predictions, sample_ids, args.missing)
        if args.baseline is not None and args.baseline not in baselines.SAM_BASELINES:
            return baselines.make_baseline(args.baseline, unknown=args.missing)
        if args.boxes is not None:
            return _box_localizer(args, device, limits)
    model, processor, name = load_checkpoint(args.model or default_checkpoint(args.dataset), device)
    if args.baseline is not None:
        return baselines.make_baseline(args.baseline, model.sam, processor)
    name = Path(name).name
    if args.pass_at_k is not None:
        from ..evaluation import SamplingPredictor

        with user_errors():
            temperature = 1.0 if args.temperature is None else args.temperature
            sampling = {"num_samples": max(_ks(args)), "temperature": temperature}
            return SamplingPredictor(model, processor, name, **sampling, **limits)
    return ModelPredictor(model, processor, name, **limits)


def _check_boxes(args: argparse.Namespace) -> None:
    """`--boxes` needs a SAM, and what belongs to it nothing else takes."""
    given = [name for name in ("sam", "coordinates", "image_size") if getattr(args, name) is not None]
    if args.boxes is None and given:
        raise UserError(f"--{given[0].replace('_', '-')} belongs to --boxes.")
    if args.boxes is not None and args.sam is None:
        raise UserError("--boxes needs --sam, the SAM that segments what the VLM points at.")


def _box_localizer(args: argparse.Namespace, device: Any, limits: dict[str, int]) -> Any:
    from ..evaluation import BoxLocalizerPredictor

    image_size = None if args.image_size is None else tuple(args.image_size)
    coordinates, name = args.coordinates or "absolute", f"{Path(args.boxes).name} with {Path(args.sam).name}"
    return BoxLocalizerPredictor.from_pretrained(
        args.boxes, args.sam, device, coordinates=coordinates, image_size=image_size, name=name, **limits
    )


def _processes() -> Any:
    from ..evaluation.processes import Processes

    with user_errors(kinds=(RuntimeError,)):
        return Processes.current()


def _compare(args: argparse.Namespace) -> Any:
    from ..evaluation import compare_runs
    from ..files import write_whole

    with user_errors():
        comparison = compare_runs(args.output, args.compare)
    write_whole(args.output / "comparison.json", json.dumps(comparison.to_dict(), indent=1) + "\n")
    return comparison


def _print_comparison(args: argparse.Namespace) -> None:
    comparison = _compare(args)
    print(json.dumps(comparison.to_dict(), indent=1) if args.json else comparison.to_text())
