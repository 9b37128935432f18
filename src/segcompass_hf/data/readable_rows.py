"""Data sets in the row schema whose damaged rows are named, counted, and skipped or fatal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..image_files_segcompass import open_image
from ..images_segcompass import to_rgb_image
from ..printable import printable
from .schema import decode_masks

logger = logging.get_logger(__name__)

RowCheck = Callable[[dict[str, Any]], None]  # raises what is wrong with a row
_UNREADABLE, _READABLE = 1, 2
MAX_IN_A_ROW = 1000  # unreadable neighbours, after which the data set rather than a row is taken to be broken


def is_image_dataset(dataset: Any) -> bool:
    """Whether a `datasets` data set has an `image` or `images` column."""
    names = getattr(dataset, "column_names", None) or []
    return "image" in names or "images" in names


def keep_images_encoded(dataset: Any) -> Any:
    """A `datasets` data set whose images come as bytes, so that a damaged image fails alone and can be named."""
    features = getattr(dataset, "features", None)
    if not features or (getattr(dataset, "format", None) or {}).get("type") == "custom":  # which is made for images
        return dataset
    from datasets import Image, List, Sequence

    for name, feature in features.items():
        if isinstance(feature, Image) and feature.decode:
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List | Sequence) and isinstance(feature.feature, Image) and feature.feature.decode:
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def check_row(row: dict[str, Any]) -> None:
    """Decode a row's images and masks in full.

    Args:
        row (`dict`): `image` or `images`, and where the row has them `masks`, `distractor_masks` and `ignore`: COCO
            RLEs of the size of the image.

    Raises:
        ValueError, FileNotFoundError: With what is wrong.
    """
    sizes = [to_rgb_image(image).size for image in _images_of(row)]
    for column in ("masks", "distractor_masks", "ignore"):
        rles = row.get(column)
        if rles is None:
            continue
        try:
            decode_masks([rles] if isinstance(rles, dict) else rles, sizes[0][::-1])
        except Exception as error:
            raise ValueError(f"{column}: {error}") from error


def _images_of(row: dict[str, Any]) -> list[Any]:
    return row["images"] if row.get("images") is not None else [row.get("image")]


def _check_files(row: dict[str, Any]) -> None:
    """Look at the heads of image files before `datasets` decodes them, whatever their format and size."""
    for image in _images_of(row):
        source = image and (image["bytes"] if image["bytes"] is not None else image["path"])
        if isinstance(source, bytes) or (source and os.path.isfile(source)):
            open_image(source)


class UnreadableLog:
    """Names unreadable rows, once per process: as warnings and as lines of a file that all processes append to.

    Args:
        file (`str` or `Path`, *optional*): `.jsonl`, kept when training resumes.
        name (`str`): of the data set, to tell those of one file apart.
    """

    def __init__(self, file: str | Path | None, name: str):
        self.file, self.name = None if file is None else Path(file), name
        self._named: set[tuple] = set()

    def add(self, index: int, sample_id: Any, reason: str, action: str, stable: bool = True) -> None:
        """`stable` tells whether the row has this index whenever it is read; in a stream it need not."""
        known_by = index if stable or sample_id is None else None
        if (known_by, sample_id) in self._named:
            return
        self._named.add((known_by, sample_id))
        shown = f"row {index}" + (f" ({printable(sample_id)})" if sample_id is not None else "")
        logger.warning(f"{self.name}: {shown} is unreadable and {action}: {reason}")
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            line = {"dataset": self.name, "index": known_by, "sample_id": sample_id, "reason": reason}
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")  # one small write in append mode: lines do not mix


def count_unreadable(file: str | Path) -> int:
    """Different unreadable rows that all processes, workers and starts of a run have listed in a file."""
    if not Path(file).is_file():
        return 0
    found = set()
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill is written again when the row comes up again
        found.add((row["dataset"], row["index"], None if row["index"] is not None else row["sample_id"]))
    return len(found)


class ReadableRows(torch.utils.data.Dataset):
    """A map-style data set without its unreadable rows: same length, each in turn the next readable one.

    What takes an unreadable row's place depends on the data alone, so that every process, worker and repetition of an
    index gets the same row: GRPO's groups stay groups and step counts stay aligned.

    Args:
        dataset (`datasets.Dataset`): in the row schema, see `check_row` for what is read.
        on_unreadable (`str`, *optional*, defaults to `"skip"`): `"skip"` or `"error"`.
        log_file (`str` or `Path`, *optional*): `.jsonl` to list them in: index, `sample_id`, reason.
        name (`str`, *optional*, defaults to `"rows"`): of the data set, in messages.
        check_text (`Callable`, *optional*): Raises for a row whose texts cannot be used, see `RowTextCheck`.

    Raises:
        RuntimeError: All rows, or a thousand in a row, are unreadable.
        ValueError: A row is, and `on_unreadable="error"`.
    """

    def __init__(
        self,
        dataset: Any,
        on_unreadable: Literal["skip", "error"] = "skip",
        log_file: str | Path | None = None,
        name: str = "rows",
        check_text: RowCheck | None = None,
    ):
        if on_unreadable not in ("skip", "error"):
            raise ValueError(f"on_unreadable is {on_unreadable!r}; it must be 'skip' or 'error'.")
        self.check_text = check_text
        self.dataset, self.on_unreadable, self.log = dataset, on_unreadable, UnreadableLog(log_file, name)
        # Whoever transforms its rows itself gets them as they are.
        plain = getattr(dataset, "format", {"type": None})["type"] is None
        self._encoded = keep_images_encoded(dataset) if plain else dataset
        self.known = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()  # by index, shared by all workers

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_unreadable(self) -> int:
        """Unreadable rows met so far by this process and its data loader workers."""
        return int((self.known == _UNREADABLE).sum())

    @property
    def column_names(self) -> list[str]:
        return self.dataset.column_names

    @property
    def features(self) -> Any:
        return self.dataset.features

    def set_epoch(self, epoch: int) -> None:
        """Passed on to a data set that has epochs."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self.dataset)
        if not -size <= index < size:
            raise IndexError(f"row {index} of {size}.")
        tried = min(size, MAX_IN_A_ROW)
        for offset in range(tried):
            row = self._read((index + offset) % size)
            if row is not None:
                return row
        raise RuntimeError(
            f"{self.log.name}: {tried} of {size} rows in a row are unreadable, from row {index % size}; the reasons "
            f"are in the warnings before{'' if self.log.file is None else f' and in {self.log.file}'}. Is the folder "
            "of images in place?"
        )

    def _read(self, index: int) -> dict[str, Any] | None:
        if self.known[index] == _UNREADABLE:
            return None
        try:
            try:
                return self._read_once(index)
            except OSError:  # a network disk may have a bad moment, a damaged file fails again
                return self._read_once(index)
        except MemoryError:
            raise
        except Exception as error:  # damaged files raise about anything, from TypeError to struct.error
            self._refuse(index, error)
            return None

    def _read_once(self, index: int) -> dict[str, Any]:
        row, new = self._encoded[index], self.known[index] != _READABLE
        if self._encoded is not self.dataset:
            if new:
                _check_files(row)
            row = self.features.decode_example(row)
        if new:
            check_row(row)
            if self.check_text is not None:
                self.check_text(row)
            self.known[index] = _READABLE
        return row

    def _refuse(self, index: int, error: Exception) -> None:
        sample_id, reason = self._sample_id(index), f"{type(error).__name__}: {error}"
        if self.on_unreadable == "error":
            self.log.add(index, sample_id, reason, "training stops")
            raise ValueError(
                f"{self.log.name}: row {index} ({printable(sample_id)}) is unreadable: {reason}. Repair or remove it, "
                'or skip such rows with unreadable_rows="skip".'
            ) from error
        self.known[index] = _UNREADABLE
        self.log.add(index, sample_id, reason, "skipped")

    def _sample_id(self, index: int) -> str | None:
        """Read without the image, which may be what fails."""
        if "sample_id" not in (getattr(self.dataset, "column_names", None) or []):
            return None
        return self.dataset.with_format(None).select_columns(["sample_id"])[index]["sample_id"]


def readable_stream(
    dataset: Any,
    on_unreadable: Literal["skip", "error"] = "skip",
    log_file: str | Path | None = None,
    name: str = "rows",
    check_text: RowCheck | None = None,
) -> Any:
    """The same for a `datasets.IterableDataset`, which stays one: unreadable rows drop out of the stream.

    Args: as [`ReadableRows`]; rows are numbered in the order in which they come.
    """
    if on_unreadable not in ("skip", "error"):
        raise ValueError(f"on_unreadable is {on_unreadable!r}; it must be 'skip' or 'error'.")
    encoded = keep_images_encoded(dataset)
    check = _StreamCheck(on_unreadable, UnreadableLog(log_file, name), check_text)
    readable = encoded.filter(check, with_indices=True)
    if encoded is dataset:
        return readable
    images = {key: feature for key, feature in dataset.features.items() if feature != encoded.features[key]}
    return readable.map(_Decode(images), features=dataset.features)


class _Decode:
    """Images of a row from their bytes; a cast to the first features would come too late for rows already typed."""

    def __init__(self, columns: dict[str, Any]):
        import datasets

        self.columns = datasets.Features(columns)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.columns.decode_example({key: row[key] for key in self.columns if row[key] is not None})


class _StreamCheck:
    """Filter of a stream whose images come as undecoded `{"bytes", "path"}`."""

    def __init__(self, on_unreadable: str, log: UnreadableLog, check_text: RowCheck | None):
        self.on_unreadable, self.log, self.check_text, self.in_a_row = on_unreadable, log, check_text, 0

    def __call__(self, row: dict[str, Any], index: int) -> bool:
        try:
            check_row(row)
            if self.check_text is not None:
                self.check_text(row)
        except MemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.in_a_row += 1
            fatal = self.on_unreadable == "error" or self.in_a_row >= MAX_IN_A_ROW
            action = "training stops" if fatal else "skipped"
            self.log.add(index, row.get("sample_id"), reason, action, stable=False)
            if fatal:
                raise ValueError(
                    f"{self.log.name}: row {index} ({printable(row.get('sample_id'))}) is unreadable: {reason}"
                    + (f"; so are the {self.in_a_row - 1} before it." if self.on_unreadable != "error" else ".")
                ) from error
            return False
        self.in_a_row = 0
        return True
