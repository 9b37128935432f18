# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One line of json per sample, on disk as soon as its batch is done: what a kill leaves is whole and counts."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.schema import decode_masks, encode_mask
from ..files import write_whole
from ..metrics.calibration import best_ious, count_duplicates
from ..metrics.segmentation import LeftOutScore, SampleScore, score_sample
from ..metrics.selection import choose_objects
from .prediction import Prediction
from .rows import EvaluationRow

logger = logging.get_logger(__name__)

SAMPLES_FILE = "samples.jsonl"  # of a finished run, in the order of the data set
RECORDS_FOLDER = "records"  # of a run under way: a file per process
_COUNTS = SampleScore._fields
CHECKSUM = "checksum"  # of a line's other values: a digit that has changed since makes no figure
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # half a character has no UTF-8
_SCORE_DIGITS = 6  # beyond these, the number of threads of a CPU shows


def record_of(row: EvaluationRow, prediction: Prediction) -> dict[str, Any]:
    """What is kept of a sample.

    Args:
        row (`EvaluationRow`): The row with its targets.
        prediction (`Prediction`): Its answer.

    Returns:
        `dict`: `index` in the data set, `sample_id`, `image_id`, `source`, `split`, `kind`, `instruction`,
        `num_targets`, the counts of `SampleScore` and `left_out`, `scores` and COCO RLE `masks` of the prediction,
        `mask_ious` (of each mask with the target that it overlaps most), `duplicates` (masks whose IoU with one of the
        prediction's before them is 0.5 or more) and `duplicates_dropped`, `reasoning`, `text`, `problem`, which is
        `None` here, and `choice` (what the masks show, see [`choice_score_of`]; `None` where not all objects are
        known).

    Raises:
        ValueError: the masks do not have the size of the image.
    """
    try:
        score = score_sample(prediction.masks, row.targets, row.ignore)
    except ValueError as error:
        raise ValueError(f"row {row.index} ({row.sample_id!r}): {error}") from error
    return {
        **_described(row),
        **_counted(score),
        "scores": [round(float(value), _SCORE_DIGITS) for value in prediction.scores],
        "masks": [encode_mask(mask) for mask in prediction.masks],
        "mask_ious": [
            None if iou is None else round(iou, _SCORE_DIGITS)
            for iou in best_ious(prediction.masks, row.read_targets, row.ignore)
        ],
        "duplicates": count_duplicates(prediction.masks),
        "duplicates_dropped": prediction.duplicates_dropped,
        "reasoning": prediction.reasoning,
        "text": prediction.text,
        "problem": None,
        "choice": _choice(prediction.masks, row),
    }


def failed_record(row: EvaluationRow) -> dict[str, Any]:
    """The record of an unreadable row: an empty prediction, and always a failure.

    A target that can be read is missed as a whole. Where none can, or none is meant, the sample counts one pixel that
    is missed or wrongly predicted: its IoU is 0, and sums of pixels hardly change.
    """
    target = 0 if row.targets is None else int(np.count_nonzero(row.targets.any(axis=0)))
    nothing_meant = row.targets is not None and not target
    score = SampleScore(0, 1, 1, 0) if nothing_meant else SampleScore(0, max(target, 1), 0, max(target, 1))
    empty = {"scores": [], "masks": [], "mask_ious": [], "duplicates": 0, "duplicates_dropped": 0}
    empty |= {"reasoning": None, "text": None}
    return {**_described(row), **_counted(score), **empty, "problem": row.problem, "choice": None}


def with_choice(record: dict[str, Any], row: EvaluationRow) -> dict[str, Any]:
    """A record of an older version, which says nothing of the choice, with it: from its masks, without a model."""
    if row.others is None or record["problem"] is not None:
        return record | {"choice": None}
    return record | {"choice": _choice(decode_masks(record["masks"], row.others.shape[1:]), row)}


def choice_score_of(record: dict[str, Any]) -> SampleScore | None:
    """The score of the true masks of what a prediction chose, see [`choose_objects`]; `None` where not all objects are
    known, or no metric counts the sample.

    `choice` of a record holds `objects`, per mask the numbers of the objects that it shows (targets come first, then
    the other objects), and the counts of `SampleScore`.
    """
    choice = record.get("choice")
    return None if choice is None or record["left_out"] else SampleScore(*(choice[name] for name in _COUNTS))


def _choice(masks: np.ndarray, row: EvaluationRow) -> dict[str, Any] | None:
    if row.others is None:
        return None
    objects, score = choose_objects(masks, row.read_targets, row.others, row.ignore)
    return {"objects": objects, **score._asdict()}


def _described(row: EvaluationRow) -> dict[str, Any]:
    names = ("sample_id", "image_id", "source", "split", "kind", "instruction")
    columns = {name: row.columns.get(name) for name in names}
    num_targets = None if row.targets is None else len(row.targets)
    return {"index": row.index, **columns, "num_targets": num_targets}


def _counted(score: SampleScore) -> dict[str, Any]:
    return score._asdict() | {"left_out": score.left_out}


def score_of(record: dict[str, Any]) -> SampleScore:
    """The pixel counts of a record; those of older versions leave no sample out."""
    kind = LeftOutScore if record.get("left_out") else SampleScore
    return kind(*(record[name] for name in _COUNTS))


class RecordWriter:
    """Appends records to the file of one process; a batch is on the disk when `append` returns."""

    def __init__(self, output_dir: Path, process_index: int):
        folder = output_dir / RECORDS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"process-{process_index:05d}.jsonl", "a", **_TEXT)

    def append(self, records: Iterable[dict[str, Any]], seconds: float) -> None:
        """Add a batch that took `seconds`, which are shared out to its records."""
        records = list(records)
        lines = [record | {"seconds": round(seconds / len(records), 6)} for record in records]
        self._file.write("".join(map(_line, lines)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def record_files(output_dir: Path) -> list[Path]:
    """Those of all processes that have written to a folder, also in earlier starts."""
    return sorted((output_dir / RECORDS_FOLDER).glob("process-*.jsonl"))


def repair_records(output_dir: Path) -> None:
    """Cut off last lines that a kill left half-written, so that what is appended starts on a line of its own."""
    for path in record_files(output_dir):
        with open(path, "rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                logger.warning(f"{path}: dropped a last line that was cut short; its batch is evaluated again.")
                file.truncate(whole)


def read_records(output_dir: Path) -> dict[int, dict[str, Any]]:
    """Records of all processes by index; of one written twice, the first. Lines that are no record, or not as they
    were written, are left out."""
    records: dict[int, dict[str, Any]] = {}
    for path in record_files(output_dir):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                record = _parsed(line, needs_checksum=True)
                if record is None:
                    logger.warning(f"{path}, line {number} is damaged or no record; its batch is evaluated again.")
                else:
                    records.setdefault(record["index"], record)
    return records


def _parsed(line: str, needs_checksum: bool) -> dict[str, Any] | None:
    """The record of a line; `None` where it is none, or not as it was written."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or (needs_checksum and CHECKSUM not in record) or not is_as_written(record):
        return None
    record.pop(CHECKSUM, None)
    return record


def is_as_written(record: dict[str, Any]) -> bool:
    """Whether a record agrees with its checksum; older versions wrote none, and they count as they are."""
    return CHECKSUM not in record or record[CHECKSUM] == _checksum(record)


def _checksum(record: dict[str, Any]) -> str:
    """CRC-32 of a record's values, 8 hexadecimal digits."""
    values = {name: value for name, value in record.items() if name != CHECKSUM}
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def write_samples(output_dir: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write the records of a finished run, without times: equal runs give equal files."""
    kept = ({name: value for name, value in record.items() if name != "seconds"} for record in records)
    write_whole(output_dir / SAMPLES_FILE, "".join(map(_line, kept)))


def read_samples(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Records of a finished run, in the order of the data set; see `record_of` for their fields.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a line is no record, or not as it was written.
    """
    path = Path(output_dir) / SAMPLES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{os.fspath(output_dir)!r} holds no finished evaluation: there is no {SAMPLES_FILE}.")
    records = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            record = _parsed(line, needs_checksum=False)
            if record is None:
                raise ValueError(
                    f"{path}, line {number} is damaged or no record; run the same evaluation again, which writes the "
                    "file anew from what is there."
                )
            records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record | {CHECKSUM: _checksum(record)}, ensure_ascii=False, allow_nan=False) + "\n"
