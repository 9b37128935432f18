# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Answer a data set shard by shard, on the processes of a launcher, and go on where a run was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from transformers.utils import logging

from ..evaluation.processes import Processes
from .job import PredictionJob
from .output import SUMMARY_FILE, OutputFolder
from .rows import parquet_bytes
from .shards import Shard, Source, num_rows

logger = logging.get_logger(__name__)


@dataclass
class PredictionSummary:
    """What a run, or its share, came to.

    Args:
        output (`str`): Folder or URL of the results.
        shards, rows, errors (`int`): That are there, of this share; errors are rows too.
        digest (`str`): SHA-256 of all rows in order: the same for the same settings, however they were made.
        is_complete (`bool`): Whether all shards of the data set are there, also those of other shares.
        predicted (`int`): Rows that were made since this start.
        seconds (`float`): Since this start, without loading the model.
    """

    output: str
    shards: int
    rows: int
    errors: int
    digest: str
    is_complete: bool
    predicted: int
    seconds: float


@dataclass
class Progress:
    """Where a run stands; see `predict_dataset`.

    Args:
        done (`int`): Rows since this start.
        errors (`int`): Of these.
        total (`int`, *optional*): Rows to be done since this start; `None` where files are counted by reading them.
    """

    done: int = 0
    errors: int = 0
    total: int | None = None


def predict_dataset(
    job: PredictionJob,
    share: tuple[int, int] = (0, 1),
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    predictor: Any = None,
) -> PredictionSummary:
    """Answer a data set into Parquet files, one per shard.

    Shards are dealt as wholes to the processes that torchrun or accelerate started, and of several jobs each takes its
    share: rows depend neither on their number nor on interruptions. A shard is there whole or not at all; the same
    call goes on with those that are missing. Call it in every process, and `Processes.current().finish()` at the end
    of the program.

    Args:
        job ([`PredictionJob`]): What to ask.
        share (`tuple[int, int]`, *optional*, defaults to `(0, 1)`): Which of how many jobs this is, from 0: shard
            `s` is of job `s % n`.
        resume (`bool`, *optional*, defaults to `True`): `False` drops the results that the output holds.
        on_progress (`Callable`, *optional*): Called with a [`Progress`] after each batch, in the main process, whose
            own rows it counts.
        predictor ([`ModelPredictor`], *optional*): Answers in place of what `job.load_predictor` loads, such as a
            [`VllmPredictor`].

    Returns:
        [`PredictionSummary`]: the same in every process.

    Raises:
        ValueError: The data set or the checkpoint cannot be used, or the output holds results of other settings.
        OSError: A file cannot be read or written now; what is finished stays.
        FileExistsError: Another process writes this share.
    """
    check_share(share, resume)
    processes, output = Processes.current(), OutputFolder(job.output)
    with output.alone(share) if processes.is_main else nullcontext():
        with processes.main_first():
            source = job.open_source()
        predictor = job.load_predictor(processes.device) if predictor is None else predictor
        left = None
        if processes.is_main:
            left = begin(job.settings(predictor, source), source, output, share, resume)
        left = processes.from_main(left)
        mine = [source.shards[number] for number in left[processes.index :: processes.count]]
        started = time.perf_counter()
        for _ in write_shards(job, predictor, source, output, mine, on_progress if processes.is_main else None):
            pass
        processes.wait()
        summary = None
        if processes.is_main:
            summary = finish(source, output, share, left, time.perf_counter() - started)
    return processes.from_main(summary)


def check_share(share: tuple[int, int], resume: bool) -> None:
    """Refuse a share that is none, and one that would drop the results of the others.

    Raises:
        ValueError: It is.
    """
    index, count = share
    if not 0 <= index < count:
        raise ValueError(f"the share is {index} of {count}; of {count} jobs they are 0 to {count - 1}.")
    if not resume and count > 1:
        raise ValueError("one of several jobs cannot drop the results of all; delete the folder, then start them.")


def begin(
    settings: dict[str, Any], source: Source, output: OutputFolder, share: tuple[int, int], resume: bool
) -> list[int]:
    """Open the output; numbers of the shards of a share that are missing.

    Raises:
        ValueError: The output holds results of other settings.
    """
    if not source.shards:
        raise ValueError(f"{source.name!r} has no rows.")
    there = output.begin(settings, resume)
    mine = _numbers_of(source, share)
    left = [number for number in mine if number not in there]
    if len(left) < len(mine):
        logger.warning(f"{output.target}: {len(mine) - len(left)} of {len(mine)} shards are there already and kept.")
    return left


def _numbers_of(source: Source, share: tuple[int, int]) -> list[int]:
    return list(range(len(source.shards)))[share[0] :: share[1]]


def write_shards(
    job: PredictionJob,
    predictor: Any,
    source: Source,
    output: OutputFolder,
    shards: Sequence[Shard],
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer shards and write each; the counts of each, see `parquet_bytes`."""
    progress = Progress(total=expected_rows(job, shards))

    def on_batch(rows: int, errors: int) -> None:
        progress.done += rows
        progress.errors += errors
        if on_progress is not None:
            on_progress(progress)

    for shard, rows in job.shard_predictor(predictor, source, on_batch).predict(shards):
        content, counts = parquet_bytes(rows, bool(job.concepts))
        output.write_shard(shard.number, len(source.shards), content)
        yield counts


def expected_rows(job: PredictionJob, shards: Sequence[Shard]) -> int | None:
    """Rows that shards will have; `None` where that is known by reading them."""
    rows = num_rows(shards)
    return None if rows is None else rows * max(1, len(job.instructions))


def finish(
    source: Source, output: OutputFolder, share: tuple[int, int], made: Sequence[int], seconds: float
) -> PredictionSummary:
    """Count what is there; where that is all, `summary.json` says so.

    Raises:
        ValueError: A shard is damaged.
    """
    counts = output.counts(_numbers_of(source, share))
    predicted = output.counts(made)["rows"]
    is_complete = output.shards_there() == set(range(len(source.shards)))
    summary = PredictionSummary(output.target, **counts, is_complete=is_complete, predicted=predicted, seconds=seconds)
    if is_complete:
        whole = counts if share[1] == 1 else output.counts(range(len(source.shards)))
        output.write(SUMMARY_FILE, (json.dumps({"dataset": source.name, **whole}, indent=1) + "\n").encode())
    return summary


def summary_dict(summary: PredictionSummary) -> dict[str, Any]:
    """For json, with rows per second."""
    speed = summary.predicted / summary.seconds if summary.seconds else 0.0
    return asdict(summary) | {"seconds": round(summary.seconds, 2), "rows_per_second": round(speed, 2)}
