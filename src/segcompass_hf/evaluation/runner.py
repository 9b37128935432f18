# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluate a predictor on a data set: every sample once, whatever the number of processes and interruptions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from ..files import read_json_object, write_whole
from ..locks import alone_with
from ..printable import printable
from .figures import summarize
from .prediction import Predictor
from .processes import Processes
from .records import (
    SAMPLES_FILE,
    RecordWriter,
    failed_record,
    read_records,
    record_files,
    record_of,
    repair_records,
    with_choice,
    write_samples,
)
from .report import SUMMARY_FILE, write_reports
from .rows import EvaluationRow, EvaluationRows
from .run_settings import check_same_run

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"  # what a folder of results was started with


@dataclass
class EvaluationSummary:
    """What an evaluation came to.

    Args:
        output_dir (`Path`): The folder of its files.
        figures (`dict`): The content of `summary.json`, see `figures.summarize`.
    """

    output_dir: Path
    figures: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """The values over all samples, in [0, 1], by name."""
        return {name: figure["value"] for name, figure in self.figures["metrics"].items()}


def evaluate_dataset(
    predictor: Predictor,
    dataset: Any,
    output_dir: str | os.PathLike,
    batch_size: int = 8,
    num_samples: int | None = None,
    dataset_name: str = "dataset",
    unreadable: Literal["error", "count"] = "error",
    resume: bool = True,
    notes: dict[str, Any] | None = None,
    page_samples: int = 12,
) -> EvaluationSummary:
    """Evaluate, and write records, figures and reports.

    Batches are fixed by index (batch `b` holds rows `b * batch_size` onwards) and dealt to the processes as wholes, so
    that records and figures depend neither on their number nor on interruptions. Call it in every process that
    accelerate or torchrun started, and `Processes.current().finish()` at the end of the program. A folder that holds a
    part of the same run is continued.

    Args:
        predictor (`Predictor`): What to evaluate.
        dataset (`datasets.Dataset`, `Sequence[dict]` or an iterable of `dict`): In the row schema.
        output_dir (path): Folder for the results, on a disk that all processes share.
        batch_size (`int`, *optional*, defaults to 8): Rows at a time; part of what makes a run repeatable.
        num_samples (`int`, *optional*): The first so many rows; all by default.
        dataset_name (`str`, *optional*, defaults to `"dataset"`): What reports call it.
        unreadable (`str`, *optional*, defaults to `"error"`): Rows whose image or masks cannot be read, or whose text
            the predictor refuses: `"error"` stops; `"count"` lists them and counts each as a failure with IoU 0.
        resume (`bool`, *optional*, defaults to `True`): `False` drops the results that the folder holds.
        notes (`dict`, *optional*): Further entries of the summary, such as the command.
        page_samples (`int`, *optional*, defaults to 12): Worst and best samples on `samples.html`, so many of each.

    Returns:
        `EvaluationSummary`: the same in every process.

    Raises:
        ValueError: a row or a prediction cannot be used, or the folder holds results of other settings.
        FileExistsError: another process is evaluating into it.
    """
    check_settings(batch_size, unreadable)
    processes, output_dir = Processes.current(), Path(output_dir)
    rows = EvaluationRows(dataset, num_samples)
    with alone_in_results(output_dir) if processes.is_main else nullcontext():
        return _evaluate(
            predictor, rows, output_dir, batch_size, dataset_name, unreadable, resume, notes, page_samples, processes
        )


def check_settings(batch_size: int, unreadable: str) -> None:
    """A `ValueError` for settings of [`run_batches`] that are none, before a folder is made."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected a positive number.")
    if unreadable not in ("error", "count"):
        raise ValueError(f"unreadable is {unreadable!r}; it must be 'error' or 'count'.")


def alone_in_results(output_dir: Path) -> AbstractContextManager[None]:
    """Hold a folder of results, made where it is not there; a `FileExistsError` where another process does."""
    output_dir.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is evaluating into {output_dir}; wait for it, or choose another folder."
    return alone_with(output_dir / ".lock", refusal)


def _evaluate(
    predictor: Predictor,
    rows: EvaluationRows,
    output_dir: Path,
    batch_size: int,
    dataset_name: str,
    unreadable: str,
    resume: bool,
    notes: dict[str, Any] | None,
    page_samples: int,
    processes: Processes,
) -> EvaluationSummary:
    started = time.perf_counter()
    settings, known = run_batches(predictor, rows, output_dir, batch_size, dataset_name, unreadable, resume, processes)
    figures = None
    if processes.is_main:
        records = _with_choices(output_dir, finished_records(output_dir, rows, unreadable), rows)
        run = {"predictor": predictor.name, "dataset": dataset_name, "settings": settings, **(notes or {})}
        wall = {"samples": len(rows) - len(known), "seconds": round(time.perf_counter() - started, 2)}
        figures = summarize(records, run, {"processes": processes.count, "last_start": wall})
        write_reports(output_dir, figures, records, rows, page_samples)
    return EvaluationSummary(output_dir, processes.from_main(figures))


def run_batches(
    predictor: Any,
    rows: EvaluationRows,
    output_dir: Path,
    batch_size: int,
    dataset_name: str,
    unreadable: str,
    resume: bool,
    processes: Processes,
    record: Callable[[EvaluationRow, Any], dict[str, Any]] = record_of,
    failed: Callable[[EvaluationRow], dict[str, Any]] = failed_record,
) -> tuple[dict[str, Any] | None, set[int]]:
    """Answer all rows that the folder has no record of, each process its share of the batches.

    Args:
        predictor (`Predictor`): Or whatever answers a list of rows with a list that `record` understands.
        record, failed (`Callable`): A row and its answer, or a row that cannot be read -> what is kept of it, which
            `index` is part of.
        rows, output_dir, batch_size, dataset_name, unreadable, resume, processes: As of [`evaluate_dataset`], which
            holds the folder.

    Returns:
        `tuple`: the settings (in the main process), and the indices of rows that had a record before.
    """
    settings, known = None, None
    if processes.is_main:
        settings = _settings(predictor, rows, batch_size)
        known = _open_folder(output_dir, settings, resume)
    known = processes.from_main(known)
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    left = [batch for batch in batches if not known.issuperset(batch)]
    with RecordWriter(output_dir, processes.index) as writer:
        mine = left[processes.index :: processes.count]
        for batch in logging.tqdm(mine, desc=dataset_name, disable=None if processes.is_main else True):
            start = time.perf_counter()
            records = _evaluate_batch(predictor, [rows[index] for index in batch], unreadable, record, failed)
            new = [its for its in records if its["index"] not in known]
            writer.append(new, time.perf_counter() - start)
    processes.wait()
    return settings, known


def _settings(predictor: Predictor, rows: EvaluationRows, batch_size: int) -> dict[str, Any]:
    """What two runs must share for their records to be the same."""
    settings = {
        "predictor": {"name": predictor.name, **getattr(predictor, "settings", {})},
        "dataset": rows.digest(),
        "num_samples": len(rows),
        "batch_size": batch_size,
    }
    return json.loads(json.dumps(settings, default=str))


def _open_folder(output_dir: Path, settings: dict[str, Any], resume: bool) -> set[int]:
    """Make the folder ready for appending; indices of the samples that it holds."""
    run_file = output_dir / RUN_FILE
    if not resume:
        for name in (RUN_FILE, SAMPLES_FILE, SUMMARY_FILE):
            (output_dir / name).unlink(missing_ok=True)
    if run_file.is_file():
        remedy = "choose another folder, or drop its results with resume=False (--restart)"
        check_same_run(output_dir, read_json_object(run_file, remedy), settings)
    else:
        for path in record_files(output_dir):  # of no known run
            path.unlink()
        write_whole(run_file, json.dumps(settings, indent=1) + "\n")
    repair_records(output_dir)
    known = set(read_records(output_dir))
    if known:
        logger.warning(f"{output_dir}: {len(known)} of {settings['num_samples']} samples are there already and kept.")
    return known


def _evaluate_batch(
    predictor: Predictor, rows: list[EvaluationRow], unreadable: str, record: Callable, failed: Callable
) -> list[dict[str, Any]]:
    """Records of a batch; the predictor sees the rows that can be read."""
    check_row = getattr(predictor, "check_row", None)
    for row in rows:
        if row.problem is None and check_row is not None:
            try:
                check_row(row.columns)
            except ValueError as error:
                row.problem = f"{type(error).__name__}: {error}"
        if row.problem is not None:
            logger.warning(f"row {row.index} ({row.sample_id!r}) is unreadable: {printable(row.problem)}")
            if unreadable == "error":
                raise ValueError(
                    f"row {row.index} ({row.sample_id!r}) is unreadable: {row.problem} Repair it, or count such rows "
                    'as failures with unreadable="count"; what is evaluated so far is kept.'
                )
    readable = [row for row in rows if row.problem is None]
    predictions = predictor.predict([row.columns for row in readable]) if readable else []
    if len(predictions) != len(readable):
        raise ValueError(f"{predictor.name} gave {len(predictions)} predictions for {len(readable)} rows.")
    answers = {row.index: prediction for row, prediction in zip(readable, predictions, strict=True)}
    return [record(row, answers[row.index]) if row.index in answers else failed(row) for row in rows]


def finished_records(output_dir: Path, rows: EvaluationRows, unreadable: str) -> list[dict[str, Any]]:
    """All records in the order of the data set.

    Raises:
        RuntimeError: Some are missing.
        ValueError: Some are of unreadable rows, and `unreadable` is `"error"`.
    """
    records = read_records(output_dir)
    missing = sorted(set(range(len(rows))) - set(records))
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(rows)} samples have no record in {output_dir} (first: {missing[0]}). Do all "
            "processes write to the same disk? Run the same command again for what is missing."
        )
    ordered = [records[index] for index in range(len(rows))]
    failed = [record for record in ordered if record["problem"] is not None]
    if failed and unreadable == "error":
        raise ValueError(
            f"{len(failed)} rows in {output_dir} are unreadable and were counted as failures by an earlier start "
            f'(first: {failed[0]["sample_id"]!r}); go on with unreadable="count", or start again with resume=False.'
        )
    return ordered


def _with_choices(output_dir: Path, records: list[dict[str, Any]], rows: EvaluationRows) -> list[dict[str, Any]]:
    """The records, each with what its answer chose; also written to `samples.jsonl`."""
    records = [
        record if "choice" in record else with_choice(record, rows[index]) for index, record in enumerate(records)
    ]
    write_samples(output_dir, records)
    return records
