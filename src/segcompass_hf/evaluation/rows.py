# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows as evaluation reads them: every one in its place, whether it can be read or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.readable_rows import keep_images_encoded
from ..data.schema import decode_masks
from ..images_segcompass import to_rgb_image
from ..printable import printable

logger = logging.get_logger(__name__)

# What the digest of a data set covers: what answers are compared with, baselines answer from, and records hold.
_DIGESTED = ("sample_id", "instruction", "masks", "ignore", "distractor_masks", "kind", "source", "split")


@dataclass
class EvaluationRow:
    """One row, decoded.

    Args:
        index (`int`): Its place in the data set.
        columns (`dict`): In the row schema, with `image` as an RGB `PIL.Image.Image`; without it where unreadable.
        targets (`np.ndarray` of shape `(num_objects, height, width)`, *optional*): bool; `None` where unreadable.
        ignore (`np.ndarray` of shape `(height, width)`, *optional*): bool, pixels that do not count.
        others (`np.ndarray` of shape `(num_others, height, width)`, *optional*): bool, all other objects of the image;
            `None` where they are not known.
        problem (`str`, *optional*): Why the row cannot be read.
    """

    index: int
    columns: dict[str, Any]
    targets: np.ndarray | None = None
    ignore: np.ndarray | None = None
    others: np.ndarray | None = None
    problem: str | None = None

    @property
    def sample_id(self) -> str | None:
        return self.columns.get("sample_id")

    @property
    def read_targets(self) -> np.ndarray:
        """`targets` of a row that was read.

        Raises:
            ValueError: It could not be read.
        """
        if self.targets is None:
            raise ValueError(f"row {self.index} has no targets: it could not be read ({self.problem}).")
        return self.targets


class EvaluationRows:
    """The first rows of a data set, read one at a time.

    Args:
        dataset (`datasets.Dataset`, `Sequence[dict]` or an iterable of `dict`): In the row schema. A stream's rows are
            kept in memory.
        num_samples (`int`, *optional*): How many; all by default.

    Raises:
        ValueError: There are none, or fewer than `num_samples`, or a column is missing.
    """

    def __init__(self, dataset: Any, num_samples: int | None = None):
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected a positive number, or None for all rows.")
        if getattr(dataset, "features", None) is not None:
            dataset = keep_images_encoded(dataset.with_format(None))
        if not hasattr(dataset, "__len__"):
            dataset = list(islice(dataset, num_samples))
        self._length = len(dataset) if num_samples is None else num_samples
        if not len(dataset) or self._length > len(dataset):
            wanted = "at least 1" if num_samples is None else num_samples
            raise ValueError(f"the data set has {len(dataset)} rows; {wanted} are to be evaluated.")
        names = getattr(dataset, "column_names", None) or list(dataset[0])
        missing = sorted({"image", "instruction", "masks"} - set(names))
        if missing:
            raise ValueError(f"the data set lacks the columns {missing} of the row schema; it has {names}.")
        self._dataset = dataset

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> EvaluationRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}.")
        columns = dict(self._dataset[index])
        encoded = columns.pop("image")
        row = EvaluationRow(index, columns)
        try:
            image = _read_image(encoded)
            size = (image.height, image.width)
            row.targets = decode_masks(columns["masks"], size)
            if columns.get("ignore") is not None:
                row.ignore = decode_masks([columns["ignore"]], size)[0]
            row.others = _others(row, size)
            columns["image"] = image
        except MemoryError:
            raise
        except Exception as error:  # damaged files raise about anything, from TypeError to struct.error
            row.problem = f"{type(error).__name__}: {error}"
            row.targets, row.ignore, row.others = _targets_without_image(columns["masks"]), None, None
        return row

    def sample_ids(self) -> list[str | None]:
        """In the order of the rows."""
        return [row.get("sample_id") for row in self._without_images()]

    def digest(self) -> str:
        """Changes with the samples asked about and their targets; images are not read for it."""
        hasher = hashlib.sha256()
        for row in self._without_images():
            answers = [row.get(name) for name in _DIGESTED]
            hasher.update(json.dumps(answers, default=repr, sort_keys=True).encode() + b"\n")
        return hasher.hexdigest()[:16]

    def _without_images(self) -> Iterator[dict[str, Any]]:
        rows = self._dataset
        if hasattr(rows, "select_columns"):
            rows = rows.select_columns([name for name in _DIGESTED if name in rows.column_names])
        return islice(rows, len(self))


def _read_image(encoded: Any) -> Any:
    try:
        return to_rgb_image(encoded)
    except OSError:  # a network disk may have a bad moment, a damaged file fails again
        return to_rgb_image(encoded)


def _others(row: EvaluationRow, size: tuple[int, int]) -> np.ndarray | None:
    """The other objects of a row; answers can be judged without them, so those that cannot be read are not known."""
    if row.columns.get("distractor_masks") is None:
        return None
    try:
        return decode_masks(row.columns["distractor_masks"], size)
    except ValueError as error:
        problem = printable(str(error))
        logger.warning(f"row {row.index} ({row.sample_id!r}): its other objects count as not known: {problem}")
        return None


def _targets_without_image(rles: Any) -> np.ndarray | None:
    """Targets at the size that they name themselves; `None` where they cannot be read either."""
    try:
        sizes = [tuple(rle["size"]) for rle in rles or []]
        return decode_masks(rles, sizes[0] if sizes else (0, 0))
    except Exception:
        return None
