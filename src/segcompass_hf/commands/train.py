# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass train`: the stages of a recipe, in order, each resumable."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

from ..allocator import keep_freed_memory
from ..stopping import SIGNALS, STARTED_BY_US, Stopped
from .common import UserError, positive, print_page, user_errors

_PATIENCE = "300"  # seconds that they have to finish a step and save it, after Ctrl-C or SIGTERM

_EPILOG = """\
A recipe is a yaml file: what to start from (model, or vlm, sam, sae), output_dir, and the sections warmup, sae,
segmentation, grpo, of which any may be left out. Keys of a section are the fields of its trainer's settings; data sets
are named as in `segcompass evaluate`. examples/configs/your_vlm_your_folder.yaml has every part explained.

The same command goes on after a kill, from the last whole checkpoint; stages that are done are skipped. On GPUs:
accelerate launch -m segcompass_hf.cli train RECIPE.yaml
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="run a recipe: warm-up, SAE, segmentation, reinforcement, to one checkpoint and a page of curves",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan, train nothing")
    parser.add_argument("--processes", type=positive, help="processes that share the work on a CPU")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="a key over the recipe's, such as segmentation.max_steps=10 or output_dir=runs/other; once for each key",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train what the recipe says."""
    from ..training.recipe.settings import RecipeError, read_recipe

    _end_with_parent()
    try:
        recipe = read_recipe(args.recipe, args.changes)
        _run(args, recipe)
    except RecipeError as error:
        raise UserError(str(error)) from error


def _run(args: argparse.Namespace, recipe: Any) -> None:
    import torch

    from ..evaluation.processes import Processes
    from ..training.recipe.check import check_recipe, describe_plans
    from ..training.recipe.running import run_recipe
    from ..training.recipe.summary import PAGE

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = args.processes or recipe.settings.processes or 1
    alone = launched == 1 and not torch.accelerator.is_available() and wanted > 1
    is_main = int(os.environ.get("RANK", "0")) == 0
    if STARTED_BY_US not in os.environ:
        plans = check_recipe(recipe, wanted if alone else launched, with_memory=args.dry_run)
        if args.dry_run:
            if is_main:
                print(describe_plans(plans))
            return
    if alone:
        _run_in_processes(args.argv, wanted)
        return
    keep_freed_memory()
    with user_errors(kinds=(OSError,)):  # a full disk, a folder that another process trains in
        result = run_recipe(recipe, shlex.join(["segcompass", *args.argv]), lambda line: print(line, flush=True))
    if is_main:
        print(result)
        print_page(Path(recipe.settings.output_dir) / PAGE)
    Processes.current().finish()


def _run_in_processes(argv: list[str], count: int) -> None:
    """This command again, as several processes of one thread each, under torch's own launcher."""
    os.environ |= {"OMP_NUM_THREADS": "1", STARTED_BY_US: str(os.getpid())}
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    one_node = {"min_nodes": 1, "max_nodes": 1, "max_restarts": 0, "run_id": uuid.uuid4().hex}
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    launch = elastic_launch(LaunchConfig(nproc_per_node=count, **one_node, **place), sys.executable)
    logging.disable(logging.ERROR)  # pages of text of the launcher, which say less than one line
    try:
        launch("-m", "segcompass_hf.cli", *argv)
    except SignalException as stop:
        raise Stopped(stop.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in SIGNALS:  # it was sent one by itself, and stopped the others too
            raise Stopped(failure.exitcode - 128) from None
        if failure.exitcode > 0:
            raise SystemExit(failure.exitcode) from None  # it has said why
        name = signal.Signals(-failure.exitcode).name
        raise UserError(f"process {rank + 1} of {count} was ended by {name}; the same command goes on.") from None
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[STARTED_BY_US]


def _end_with_parent() -> None:
    """On Linux a process of `--processes` gets SIGKILL when its launcher ends: none trains on unseen after a kill."""
    if STARTED_BY_US in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[STARTED_BY_US]):
            os._exit(1)  # it had ended before it was said so
