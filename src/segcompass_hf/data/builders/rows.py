# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows in the row schema -> a `datasets.Dataset` on disk, written as they come; images stay files until used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ...files import file_digest, part_beside, whole_file
from ...image_files_segcompass import is_turned, open_image
from ..datasets_cache import named_cache
from ..schema import row_features
from .build_report import BuildReport, RowProblem

ROWS_PER_BATCH = 1000

_DEFAULTS = {
    "image": None,
    "instruction": None,
    "masks": (),
    "distractor_masks": None,
    "ignore": None,
    "instance_ids": None,
    "sample_id": None,
    "image_id": None,
    "source": None,
    "split": None,
    "kind": None,
    "is_reasoning": False,
    "reasoning": None,
}


def make_row(**fields: Any) -> dict[str, Any]:
    """One row with every column of the schema.

    Args:
        **fields: Columns of `schema.row_features()`. `image` (path, bytes, PIL image or `{"bytes", "path"}`),
            `instruction`, `sample_id` and `source` are needed. Others default to unknown (`None`), `masks` to no
            target, `is_reasoning` to `False`, `instance_ids` to the masks' places.

    Raises:
        TypeError: A column is unknown or a needed one is missing.
        RowProblem: `"bad_annotation"`: a text cannot be stored as UTF-8, or an id not as an integer of 64 bits.
    """
    unknown = sorted(set(fields) - set(_DEFAULTS))
    missing = [name for name in ("image", "instruction", "sample_id", "source") if fields.get(name) is None]
    if unknown or missing:
        raise TypeError(f"a row lacks {missing} and has unknown columns {unknown}; it has {sorted(_DEFAULTS)}.")
    row = _DEFAULTS | fields
    row["masks"] = list(row["masks"])
    if row["instance_ids"] is None:
        row["instance_ids"] = list(range(len(row["masks"])))
    if len(row["instance_ids"]) != len(row["masks"]):
        raise TypeError(f"{row['sample_id']}: {len(row['instance_ids'])} instance ids, {len(row['masks'])} masks.")
    _check_storable(row)
    return row


def _check_storable(row: dict[str, Any]) -> None:
    """One such value would stop the writing of all rows."""
    for name, value in row.items():
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            raise RowProblem("bad_annotation", f"{name} is {value!r:.80}, which is no valid Unicode text.") from error
    large = [number for number in row["instance_ids"] if not -(2**63) <= number < 2**63]
    if large:
        raise RowProblem("bad_annotation", f"the instance id {large[0]} is not an integer of 64 bits.")


def image_size(image: str | os.PathLike | bytes) -> tuple[int, int]:
    """(height, width) of an image as it is shown, that is with its EXIF rotation; only turned ones are decoded for it.

    Args:
        image: Path, or the content of a file.

    Raises:
        RowProblem: `"missing_image"` or `"unreadable_image"`.
    """
    encoded = isinstance(image, bytes)
    name = f"the image of {len(image)} bytes" if encoded else repr(os.fspath(image))
    if not encoded and not os.path.isfile(image):
        raise RowProblem("missing_image", f"there is no file {name}.")
    try:
        with open_image(image) as opened:
            # Some of Pillow's readers state the size before, others after turning: what they turn it to counts.
            shown = ImageOps.exif_transpose(opened) if is_turned(opened) else opened
            return shown.height, shown.width
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise about anything
        raise RowProblem("unreadable_image", f"{name} cannot be read as an image ({error}).") from error


def encode_image(feature: Any, image: Any) -> dict[str, Any]:
    """An image as `datasets` stores it; one in memory upright, because its EXIF rotation would get lost on the way.

    Args:
        feature (`datasets.Image`): The column.
        image: Whatever the column takes.
    """
    if isinstance(image, Image.Image) and not getattr(image, "filename", ""):
        image = ImageOps.exif_transpose(image)
    return feature.encode_example(image)


def usable_rows(
    entries: Iterable[tuple[str, Any]], to_row: Callable[[Any], dict[str, Any] | None], report: Any
) -> Iterator[dict[str, Any]]:
    """The loop under every builder: entries of a source become rows, or are named in the report.

    Args:
        entries (`Iterable[tuple[str, Any]]`): What the report calls an entry, and the entry; or a `RowProblem` in its
            place.
        to_row (`Callable`): Makes its row with `make_row`; `None` where the entry is left out on purpose. Raises
            `RowProblem` where it cannot be used.
        report (`BuildReport` or alike): Gets the problems; only its `add` is called.
    """
    for where, entry in entries:
        try:
            if isinstance(entry, RowProblem):
                raise entry
            row = to_row(entry)
        except RowProblem as problem:
            report.add(problem.kind, where, str(problem))
            continue
        if row is not None:
            yield row


def kind_by_number(num_objects: int) -> str:
    """`none`, `single` or `multi`: the kind of an instruction that means so many objects."""
    return ("none", "single", "multi")[min(num_objects, 2)]


class SampleIds:
    """Keeps the sample ids of a data set apart.

    Args:
        report (`BuildReport`): Gets the ids that came twice.
    """

    def __init__(self, report: BuildReport):
        self.report = report
        self._seen: dict[str, bytes] = {}

    def unique(self, wanted: str, content: Any) -> str:
        """The id, numbered where another sample has it.

        Args:
            wanted (`str`): The sample's id.
            content: What tells samples apart, as anything with a `repr`.

        Raises:
            RowProblem: `"duplicate_id"`: the same content came with the same id before.
        """
        digest = hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
        sample_id, number = wanted, 1
        while sample_id in self._seen:
            if self._seen[sample_id] == digest:
                raise RowProblem("duplicate_id", f"the same sample with the id {sample_id!r} came before.")
            number += 1
            sample_id = f"{wanted}-{number}"
        if number > 1:
            detail = f"another sample has this id; this one is called {sample_id}"
            self.report.add("duplicate_id", wanted, detail, lost=False)
        self._seen[sample_id] = digest
        return sample_id


@named_cache()
def dataset_from_rows(
    rows: Iterable[dict[str, Any]],
    name: str = "rows",
    report: BuildReport | None = None,
    cache_dir: str | os.PathLike | None = None,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> Any:
    """Write rows to an Arrow file and open it, memory-mapped: neither needs memory for the whole.

    The rows are made every time, so that the report is complete; the file is named after its content, so that equal
    builds share one file (and the results of `Dataset.map` on it), and a changed source never meets an old one.

    Args:
        rows (`Iterable[dict]`): What `make_row` returns.
        name (`str`): Start of the file's name, and what messages call the data set.
        report (`BuildReport`, *optional*): Gets the number of rows, and is logged.
        cache_dir (path, *optional*): Where the file lies; by default in the cache of `datasets`.
        rows_per_batch (`int`, *optional*, defaults to 1000): Rows in memory at a time; few where images are bytes.

    Returns:
        `datasets.Dataset`

    Raises:
        ValueError: There is no row, with the problems that led to it.
    """
    import datasets
    import pyarrow as pa

    report = BuildReport() if report is None else report
    features = row_features()
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "segcompass_hf")
    folder.mkdir(parents=True, exist_ok=True)
    rows, count = iter(rows), 0
    unfinished = part_beside(folder / name)
    try:
        with open(unfinished, "xb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
            while batch := list(islice(rows, rows_per_batch)):
                encoded = [row | {"image": encode_image(features["image"], row["image"])} for row in batch]
                writer.write_batch(pa.RecordBatch.from_pylist(encoded, schema=features.arrow_schema))
                count += len(batch)
        report.num_rows += count
        if not count:
            raise ValueError(f"{name} has no row that can be used: {report.summary()}")
        report.log(name)
        path = folder / f"{name}-{file_digest(unfinished)[:24]}.arrow"
        if not path.exists():  # else keep the time of the file, which is part of the data set's fingerprint
            with whole_file(path) as part:
                os.replace(unfinished, part)
    finally:
        unfinished.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))
