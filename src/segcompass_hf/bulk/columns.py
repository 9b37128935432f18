# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Parquet files with a column of images: ranges of rows as shards, read a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..data.builders.build_report import RowProblem
from ..data.builders.found_files import TrustedFolder
from ..data.builders.stored import check_image_path
from ..data.parquet_sizes import check_parquet
from .places import Place
from .shards import DAMAGE, Shard, SourceRow, numbered, ranges

ROWS_AT_A_TIME = 16
FOOTERS_AT_A_TIME = 16  # read together, for over a network each is a round trip


class ParquetSource:
    """Rows of Parquet files.

    Images are structs with `bytes` and `path`, as `datasets` stores them, bytes, or texts that are paths; the column
    is `image`, or the only one that holds such.

    Args:
        place ([`Place`]): The files.
        rows_per_shard (`int`): Rows of a shard; files are not mixed.
        instruction_column (`str`, *optional*): Where the instructions are.
        allow_outside (`bool`): Also follow paths of images that lead out of the folder.

    Raises:
        ValueError: A file lacks a column, or would fill the memory.
    """

    def __init__(self, place: Place, rows_per_shard: int, instruction_column: str | None, allow_outside: bool):
        self.place, self.name = place, place.name
        self._instructions, self._allow_outside = instruction_column, allow_outside
        with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            footers = dict(zip(place.sizes, pool.map(self._footer, place.sizes), strict=True))
        self._columns = {name: self._columns_of(name, footer[1]) for name, footer in footers.items() if footer}
        places = []
        for name, footer in footers.items():
            rows = [(0, None)] if footer is None else ranges(footer[0], rows_per_shard)  # a damaged one says so
            places += [(name, *range_) for range_ in rows]
        self.shards = numbered(places)

    def _footer(self, name: str) -> tuple[int, Any] | None:
        """Rows and schema of a file; `None` where it is damaged."""
        import pyarrow.parquet as pq

        if self.place.is_local:
            check_parquet(self.place.path(name), repr(name), row_by_row=True)
        try:
            with self.place.open(name) as file, pq.ParquetFile(file) as parquet:
                return parquet.metadata.num_rows, parquet.schema_arrow
        except DAMAGE:
            return None

    def _columns_of(self, name: str, schema: Any) -> dict[str, str]:
        """What is read of a file: `image`, and `instruction` and `sample_id` where there are such, by their names."""
        if self._instructions is not None and self._instructions not in schema.names:
            raise ValueError(
                f"{name} has no column {self._instructions!r}; it has {', '.join(schema.names)}. Name another with "
                "--instruction-column, or ask the same of every image with --instruction."
            )
        holding = [field.name for field in schema if _holds_images(field.type)]
        image = "image" if "image" in schema.names else holding[0] if len(holding) == 1 else None
        if image is None:
            raise ValueError(
                f"{name} has {'no column' if not holding else 'several columns'} of images; expected one called "
                f"'image', or a single one of bytes. It has {', '.join(schema.names)}."
            )
        columns = {"image": image, "sample_id": "sample_id", "instruction": self._instructions}
        return {what: column for what, column in columns.items() if column in schema.names}

    def read(self, shard: Shard) -> Iterator[SourceRow]:
        import pyarrow.parquet as pq

        columns = self._columns.get(shard.file, {})
        with self.place.open(shard.file) as file, pq.ParquetFile(file) as parquet:
            groups, row = _groups_of(parquet.metadata, shard)
            wanted = list(dict.fromkeys(columns.values()))
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups=groups, columns=wanted, use_threads=False):
                first, stop = max(shard.start - row, 0), min(shard.stop - row, len(batch))
                for index, values in enumerate(batch.slice(first, max(stop - first, 0)).to_pylist(), row + first):
                    yield self._row(shard.file, index, {what: values[name] for what, name in columns.items()})
                row += len(batch)

    def _row(self, file: str, index: int, values: dict[str, Any]) -> SourceRow:
        sample_id = values.get("sample_id")
        sample_id = f"{file}:{index}" if sample_id is None else str(sample_id)
        row = SourceRow(file, index, sample_id, instruction=values.get("instruction"))
        try:
            row.image = self._image(file, values["image"])
        except RowProblem as problem:
            row.problem = str(problem)
        return row

    def _image(self, file: str, image: Any) -> bytes | str | None:
        """The content of an image's file, or a path that may be read."""
        if isinstance(image, dict):
            image = image["bytes"] if image.get("bytes") is not None else image.get("path")
        if not isinstance(image, str):
            return image
        if not self.place.is_local:
            raise RowProblem("missing_image", f"the row holds no image but a path, {image!r:.80}, on another machine.")
        path = os.path.join(os.path.dirname(self.place.path(file)), image)
        check_image_path(image if "://" in image else path, [TrustedFolder(self.place.root, self._allow_outside)])
        return path

    def description(self) -> dict[str, Any]:
        return self.place.description() | {"instruction_column": self._instructions}


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(place).name for place in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _groups_of(metadata: Any, shard: Shard) -> tuple[list[int], int]:
    """The row groups that hold a shard, and the first row of the first."""
    found, first, start = [], 0, 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if start < shard.stop and stop > shard.start:
            first = first if found else start
            found.append(group)
        start = stop
    return found, first
