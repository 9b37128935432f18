# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass drift`: whether a model uses the concepts on new data that it used on a reference set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import default_checkpoint
from .common import add_model, load_checkpoint, make_folder, positive, user_errors

_EPILOG = """\
Answers the rows of both, and compares which concepts were active, by Jensen-Shannon distance. The threshold comes from
the reference itself: samples of it, drawn anew, stay below it in 99 of 100 cases. `--save` keeps a reference in a file
that a later `--reference` takes. `segcompass evaluate --help` lists the forms of data sets.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "drift",
        help="whether a model uses the concepts on new data that it used on a reference set",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", required=True, help="rows, such as scenes:val:11, or a file that --save wrote")
    parser.add_argument("--dataset", help="rows to compare; left out, the reference is only made and saved")
    add_model(parser)
    parser.add_argument("--num-samples", type=positive, help="only the first so many of each (all; of Scenes 500)")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows at a time (%(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the reference into a file (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compare, and save the reference where that is asked for."""
    import datasets

    from ..explain.dictionary.dictionary import ConceptDictionary
    from ..explain.drift import DriftMonitor

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    model, processor, _ = load_checkpoint(args.model or default_checkpoint(args.reference, args.dataset))
    with user_errors():
        if Path(args.reference).is_file() and Path(args.reference).suffix == ".safetensors":
            monitor = DriftMonitor.load(args.reference, model)
        else:
            monitor = DriftMonitor(model, _histograms(args, model, processor, args.reference))
        if args.save is not None:
            make_folder(args.save.parent)
            monitor.save(args.save)
            print(f"{args.save}: {len(monitor.reference)} samples", file=sys.stderr)
        if args.dataset is None:
            return
        window = _histograms(args, model, processor, args.dataset)
        report = monitor.check(window, dictionary=ConceptDictionary.find(model))
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
        return
    verdict = "drifted" if report.drifted else "no drift"
    print(
        f"{args.dataset}: {verdict}. Distance {report.distance:.4f}, threshold {report.threshold:.4f} "
        f"(p {report.p_value:.3f}; {report.num_samples} samples against {report.num_reference})"
    )
    for change in report.changes:
        name = f"concept {change.feature}" + (f" {change.label}" if change.label else "")
        print(f"  {100 * change.part:5.1f} %  {name}: {100 * change.before:.2f} % -> {100 * change.now:.2f} %")


def _histograms(args: argparse.Namespace, model: Any, processor: Any, spec: str) -> Any:
    from ..evaluation import ModelPredictor, load_dataset_of
    from ..evaluation.rows import EvaluationRows
    from ..explain.drift import histograms_of_rows

    rows = EvaluationRows(load_dataset_of(spec, args.num_samples).dataset, args.num_samples)
    readable = (row.columns for row in (rows[index] for index in range(len(rows))) if row.problem is None)
    predictor = ModelPredictor(model, processor, output_concepts=True)
    return histograms_of_rows(predictor, readable, args.batch_size)
