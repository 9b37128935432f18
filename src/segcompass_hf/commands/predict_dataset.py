# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass predict --dataset`: a checkpoint's answers to a data set, shards in, Parquet out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from ..allocator import keep_freed_memory
from ..checkpoint import BUNDLED, default_checkpoint
from .common import UserError, positive, user_errors

EPILOG = """\
A data set is a folder, pattern or URL (hf://datasets/OWNER/NAME, s3://...) of .parquet files, webdataset .tar files or
pictures, or one that `segcompass evaluate` knows by name. --output gets data/part-*.parquet; errors are rows too. The
same command goes on where a kill has stopped it. Many processes: torchrun --nproc_per_node N -m segcompass_hf.cli
predict ...; many machines: --engine ray, or --shard, see docs/how-to/million-images.md.
"""
_DEFAULTS = {"batch_size": 8, "rows_per_shard": 500, "concepts": 0, "engine": "local"}
# Arguments that mean something with --dataset alone, as argparse calls them.
_OWN = ("instructions", "instruction_column", "max_new_tokens", "shard", "workers", "restart", "allow_outside")
_OWN += tuple(_DEFAULTS)
_SECONDS_PER_LINE = {True: 0.5, False: 30.0}  # of progress: on a terminal, which is written over, and in a log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of data sets. Those that are not given are `None`, so that one image can refuse them."""
    group = parser.add_argument_group("data sets")
    group.add_argument("--dataset", help="what to answer in place of IMAGE and INSTRUCTION, see below")
    group.add_argument(
        "--instruction",
        dest="instructions",
        action="append",
        metavar="TEXT",
        help="asked about every image; may be given several times",
    )
    group.add_argument("--instruction-column", metavar="NAME", help="column, field or suffix with them (instruction)")
    group.add_argument("--batch-size", type=positive, help="questions at a time (8)")
    group.add_argument("--rows-per-shard", type=positive, help="rows that are written as a whole (500)")
    group.add_argument("--max-new-tokens", type=positive, help="limit of an answer, in tokens (the model's)")
    group.add_argument("--concepts", type=positive, metavar="N", help="also list the N strongest concepts (none)")
    group.add_argument("--shard", type=_share, metavar="I/N", help="job I of N, from 0, takes every Nth shard (0/1)")
    group.add_argument(
        "--engine", choices=("local", "ray"), help="who deals the shards: torchrun if any, or Ray (local)"
    )
    group.add_argument("--workers", type=positive, help="with --engine ray: actors (one per GPU of the cluster)")
    group.add_argument("--restart", action="store_true", default=None, help="drop the results that --output holds")
    group.add_argument(
        "--allow-outside",
        action="store_true",
        default=None,
        help="read files outside of the data set's folder too, where its rows or links lead there",
    )


def _share(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; expected I/N with I from 0 to N - 1, such as 0/8")
    return int(index), int(count)


def _option(name: str) -> str:
    return "--" + {"instructions": "instruction"}.get(name, name).replace("_", "-")


def refuse_without_dataset(args: argparse.Namespace) -> None:
    """Raises `UserError` where one image is asked about with what belongs to data sets."""
    given = [name for name in _OWN if getattr(args, name) is not None]
    if given:
        raise UserError(f"{_option(given[0])} belongs to --dataset.")


def run(args: argparse.Namespace) -> None:
    """Answer the data set that the command line names."""
    if args.image is not None:
        raise UserError(f"there is an image ({args.image!r}) and a --dataset; ask about one of the two.")
    if args.output is None:
        raise UserError("--output is missing; name a folder or URL for the results.")
    if args.workers is not None and args.engine != "ray":
        raise UserError("--workers belongs to --engine ray; for processes on this machine use torchrun.")
    from ..bulk import PredictionJob, predict_dataset, predict_dataset_with_ray
    from ..bulk.running import summary_dict
    from ..evaluation.processes import Processes

    model = args.model or default_checkpoint(args.dataset)
    values = {name: getattr(args, name) for name in ("batch_size", "rows_per_shard", "concepts")}
    values = {name: _DEFAULTS[name] if value is None else value for name, value in values.items()}
    with user_errors():
        job = PredictionJob(
            args.dataset,
            args.output,
            model=model,
            instructions=tuple(args.instructions or ()),
            instruction_column=args.instruction_column,
            reasoning=args.reasoning,
            max_new_tokens=args.max_new_tokens,
            allow_outside=bool(args.allow_outside),
            **values,
        )
    with user_errors(kinds=(RuntimeError,)):
        processes = Processes() if args.engine == "ray" else Processes.current()
    is_known = args.dataset.startswith("scenes:") or model not in BUNDLED
    line = ProgressLine(None if is_known else f"note: {BUNDLED[model]}")
    options = {"share": args.shard or (0, 1), "resume": not args.restart, "on_progress": line}
    keep_freed_memory()
    with user_errors(kinds=(ValueError, OSError)):
        if args.engine == "ray":
            summary = predict_dataset_with_ray(job, args.workers, **options)
        else:
            summary = predict_dataset(job, **options)
    line.end()
    if processes.is_main:
        print(json.dumps(summary_dict(summary), indent=1) if args.json else _in_words(summary))
    processes.finish()


def _in_words(summary: Any) -> str:
    text = f"{summary.output}: {summary.rows:,} rows in {summary.shards:,} shards, {summary.errors:,} of them errors"
    if summary.predicted:
        speed = summary.predicted / summary.seconds
        text += f"; {summary.predicted:,} made now, {speed:.2f} a second"
    if not summary.is_complete:
        text += "; shards of other jobs are missing"
    return f"{text}\ndigest of the rows: {summary.digest}"


class ProgressLine:
    """Rows per second and time left, on standard error: one line on a terminal, else a line now and then."""

    def __init__(self, note: str | None = None):
        self._note = note  # said when the first answers are there, behind which no error of input comes
        self._terminal = sys.stderr.isatty()
        self._shown = time.perf_counter()
        self._first: tuple[float, int] | None = None  # time and rows when the first batch was done
        self._width = 0

    def __call__(self, progress: Any) -> None:
        now = time.perf_counter()
        self._first = self._first or (now, progress.done)
        if self._note is not None:
            print(self._note, file=sys.stderr)
            self._note = None
        is_end = progress.done == progress.total
        if not is_end and now - self._shown < _SECONDS_PER_LINE[self._terminal]:
            return
        self._shown = now
        text = self._text(progress, now)
        end = "" if self._terminal else "\n"
        start = "\r" if self._terminal else ""
        print(start + text.ljust(self._width), end=end, file=sys.stderr, flush=True)
        self._width = len(text) if self._terminal else 0

    def _text(self, progress: Any, now: float) -> str:
        since, before = self._first
        speed = (progress.done - before) / (now - since) if now > since else None
        of = "" if progress.total is None else f" of {progress.total:,}"
        text = f"{progress.done:,}{of} rows, {progress.errors:,} errors"
        text += "" if speed is None else f", {speed:.2f} a second"
        if progress.total is not None and speed:
            text += f", {_in_time((progress.total - progress.done) / speed)} left"
        return text

    def end(self) -> None:
        """Leave the line."""
        if self._width:
            print(file=sys.stderr)


def _in_time(seconds: float) -> str:
    """`59 s`, `12 min`, `3 h 05 min`"""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
