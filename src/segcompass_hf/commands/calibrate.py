# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass calibrate`: make the scores of a checkpoint say how often its masks are right."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from .common import UserError, load_checkpoint, positive, show_progress, user_errors

_EPILOG = """\
Segments held-out rows, fits how likely a mask is right (IoU of 0.5 or more with an object asked for) from the slot's
confidence, the surprisal of the reasoning and the certainty of the mask, and writes the fit into the checkpoint's
config.json. Which masks are shown stays the same, unless --threshold is given: then slots are shown from the
confidence on that has the highest gIoU on these rows, which should have as many without target as the model will meet.
Take rows that the model was neither trained nor is reported on.
`segcompass evaluate --help` lists the forms of --dataset.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "calibrate",
        help="make the scores of a checkpoint say how often its masks are right",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a saved model; its config.json is changed")
    parser.add_argument("--dataset", required=True, help="held-out rows, such as scenes:val:11")
    parser.add_argument("--num-samples", type=positive, help="only the first so many (all; of Scenes 500)")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows at a time (%(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, help="limit of an answer, in tokens (the model's)")
    parser.add_argument(
        "--threshold", action="store_true", help="also choose the confidence from which slots are shown"
    )
    parser.add_argument("--json", action="store_true", help="print the fit and its figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fit, and write into the checkpoint."""
    path = args.checkpoint / "config.json"
    if not path.is_file():
        raise UserError(f"{args.checkpoint} holds no config.json; name the folder of a saved model (no adapter).")
    from ..evaluation import ModelPredictor, calibrate, load_dataset_of
    from ..evaluation.rows import EvaluationRows
    from ..files import write_whole

    model, processor, _ = load_checkpoint(str(args.checkpoint.absolute()))
    show_progress()
    limits: dict[str, Any] = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    with user_errors():
        named = load_dataset_of(args.dataset, args.num_samples)
        rows = EvaluationRows(named.dataset, args.num_samples)
        if args.threshold:  # among all slots; an earlier fit must not choose between doubles
            model.config.score_calibration = None
            limits["slot_logit_threshold"] = -math.inf
        predictor = ModelPredictor(model, processor, **limits)
        calibration, figures = calibrate(predictor, rows, args.batch_size, args.threshold)
        fit = {"dataset": named.name, "samples": figures["samples"], **figures["after"]}
        config = json.loads(path.read_text(encoding="utf-8"))
        config["score_calibration"] = calibration | {"fit": fit}
        if figures["threshold"]:
            config["slot_logit_threshold"] = figures["threshold"]["slot_logit_threshold"]
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if args.json:
        print(json.dumps({"calibration": calibration, **figures}, indent=1))
        return
    print(f"{path}: scores calibrated on {figures['after']['num_masks']} masks of {named.name}")
    if figures["threshold"]:
        chosen = ", ".join(f"{name} {value:.3f}" for name, value in figures["threshold"].items())
        print(f"  {chosen} on these rows")
    for name in ("before", "after"):
        shown = figures[name]
        ranking = f"ranking {shown['ranking']:.3f}"  # both kinds are there, or nothing would have been fitted
        error = f"expected calibration error {shown['expected_calibration_error']:.3f}"
        print(f"  {name:6} {error}, {ranking}, mean score {shown['mean_score']:.3f}, right {shown['right']:.3f}")
