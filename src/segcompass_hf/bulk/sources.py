# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A data set named in one word -> its source: Parquet files, tar files, pictures, or what evaluation knows by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.builders.found_files import PICTURES
from ..files import json_digest
from .columns import ParquetSource
from .pictures import LinesSource, PicturesSource
from .places import find_files
from .shards import Source, SourceRow, numbered, ranges
from .tars import TarSource

_KINDS = {".parquet": "Parquet files", ".tar": "tar files", **dict.fromkeys(PICTURES, "pictures")}
KNOWN = "a folder, pattern or URL of .parquet files, .tar files or pictures"


def open_source(
    dataset: str, rows_per_shard: int, instruction_column: str | None = None, allow_outside: bool = False
) -> Source:
    """Find a data set's shards; images are not read.

    Args:
        dataset (`str`): A file, a folder, a pattern (`shards/*.tar`) or a URL of whatever fsspec reads
            (`hf://datasets/OWNER/NAME`, `s3://...`) with Parquet files, webdataset tar files or pictures; or what
            [`~evaluation.load_dataset_of`] knows (`scenes:val`, `OWNER/NAME:test`).
        rows_per_shard (`int`): How many rows are answered as a whole. A tar file is a shard of its own.
        instruction_column (`str`, *optional*): Where the instructions are; `None` where the data set needs none.
        allow_outside (`bool`, *optional*, defaults to `False`): Also read files that lie outside of the data set's
            folder, where its rows or links lead there.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: It is nothing that is known here, has no rows, or lacks a column.
    """
    if not _is_place(dataset):
        return NamedSource(dataset, rows_per_shard, instruction_column, allow_outside)
    place = find_files(dataset, _KINDS)
    kinds = {_KINDS[PurePosixPath(name).suffix.lower()] for name in place.sizes}
    if len(kinds) != 1:
        held = " and ".join(sorted(kinds)) or "nothing to answer"
        hint = "name those that are meant by a pattern, such as 'FOLDER/*.parquet'" if kinds else f"expected {KNOWN}"
        raise ValueError(f"{dataset!r} holds {held}; {hint}.")
    if kinds == {"Parquet files"}:
        return ParquetSource(place, rows_per_shard, instruction_column, allow_outside)
    if kinds == {"tar files"}:
        return TarSource(place, PICTURES, instruction_column)
    if instruction_column is None:
        return PicturesSource(place, rows_per_shard, allow_outside)
    return LinesSource(place, rows_per_shard, instruction_column, allow_outside)


def _is_place(dataset: str) -> bool:
    """Whether files are meant, in place of a data set that has a name."""
    if "://" in dataset or any(character in dataset for character in "*?["):
        return True
    path = Path(dataset).expanduser()
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))  # by `save_to_disk`
    return (path.exists() and not saved) or path.is_absolute() or dataset.startswith((".", "~"))


class NamedSource:
    """What `evaluation.load_dataset_of` builds or loads, in the row schema; its masks are not looked at."""

    def __init__(self, dataset: str, rows_per_shard: int, instruction_column: str | None, allow_outside: bool):
        from ..data.readable_rows import keep_images_encoded
        from ..evaluation.datasets_spec import load_dataset_of

        named = load_dataset_of(dataset, allow_outside=allow_outside)
        self.name, self._column = named.name, instruction_column
        names = named.dataset.column_names
        missing = [name for name in ("image", instruction_column) if name is not None and name not in names]
        if missing:
            raise ValueError(f"{dataset!r} has no column {missing[0]!r}; it has {', '.join(names)}.")
        kept = [name for name in ("image", "sample_id", instruction_column) if name in names]
        self._rows = keep_images_encoded(named.dataset.with_format(None).select_columns(list(dict.fromkeys(kept))))
        self.shards = numbered([("", *place) for place in ranges(len(self._rows), rows_per_shard)])

    def read(self, shard: Any) -> Iterator[SourceRow]:
        for index in range(shard.start, shard.stop):
            columns = self._rows[index]
            image, sample_id = columns["image"], columns.get("sample_id")
            encoded = None if image is None else image["bytes"] if image["bytes"] is not None else image["path"]
            instruction = None if self._column is None else columns[self._column]
            sample_id = f"{self.name}:{index}" if sample_id is None else str(sample_id)
            yield SourceRow(self.name, index, sample_id, encoded, instruction)

    def description(self) -> dict[str, Any]:
        texts = [name for name in self._rows.column_names if name != "image"]
        columns = self._rows.select_columns(texts) if texts else {}
        return {
            "name": self.name,
            "rows": len(self._rows),
            "texts": json_digest({name: [str(value) for value in columns[name]] for name in texts}),
        }


__all__ = ["KNOWN", "PICTURES", "NamedSource", "open_source"]
