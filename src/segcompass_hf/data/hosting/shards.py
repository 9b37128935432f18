# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows in the row schema -> Parquet shards that hold their images, every row read in full on its way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...images_segcompass import to_rgb_image
from ..builders.build_report import BuildReport, RowProblem
from ..builders.rows import encode_image, make_row, usable_rows
from ..schema import compressed, decode_masks, row_features
from .statistics import SplitStatistics

ROWS_PER_GROUP = 100
BYTES_PER_GROUP = 64 << 20  # in memory; readers hold a row group at a time
REMEMBERED_MASKS = 10_000
SHOWN_ROWS = 8  # kept for the sample figure


def shard_name(split: str, index: int, total: int) -> str:
    """`data/train-00000-of-00003.parquet`"""
    return f"data/{split}-{index:05d}-of-{total:05d}.parquet"


class SplitWriter:
    """Writes one split.

    Images go in as the bytes of their files, untouched. A row that cannot be read in full (image, masks, instruction)
    is left out and named in the report.

    Args:
        split (`str`): Its name.
        folder (`Path`): Of the data set; shards go to `data/` in it.
        shard_bytes (`int`): Size of a file at which the next one starts.
        report (`BuildReport`): Gets rows that cannot be read, sample ids that come twice, and the number of rows.
    """

    def __init__(self, split: str, folder: Path, shard_bytes: int, report: BuildReport):
        self.split, self.folder, self.shard_bytes, self.report = split, folder, shard_bytes, report
        self.features = row_features()
        self.statistics = SplitStatistics()
        self.shown: dict[str | None, list[dict[str, Any]]] = {}  # kind -> its first rows
        self._paths: list[Path] = []
        self._ids: set[str] = set()
        self._decoded: set[tuple[Any, ...]] = set()  # masks that were found readable

    def write(self, rows: Iterable[dict[str, Any]]) -> SplitStatistics:
        """Write all rows.

        Raises:
            ValueError: None can be used.
        """
        writer = None
        try:
            for table in self._tables(self._checked(rows)):
                writer = writer or self._open_shard()
                writer.write_table(table)
                if self._paths[-1].stat().st_size >= self.shard_bytes:
                    writer.close()
                    writer = None
        finally:
            if writer is not None:
                writer.close()
        self.report.num_rows = self.statistics.num_rows
        if not self._paths:
            raise ValueError(f"split {self.split!r} has no row that can be used: {self.report.summary()}")
        self._name_shards()
        return self.statistics

    def sample_rows(self, limit: int = SHOWN_ROWS) -> list[dict[str, Any]]:
        """Rows to show: the first of every kind, then the second ones, in the order in which the kinds came."""
        turns = zip_longest(*self.shown.values())
        return [row for turn in turns for row in turn if row is not None][:limit]

    def _checked(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        named = (
            ((row.get("sample_id") if isinstance(row, dict) else None) or f"{self.split} row {index}", row)
            for index, row in enumerate(rows)
        )
        return usable_rows(named, self._check, self.report)

    def _check(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            row = make_row(**row)
        except TypeError as error:
            raise RowProblem("bad_annotation", str(error)) from error
        if not row["instruction"].strip():
            raise RowProblem("empty_text", f"the instruction is {row['instruction']!r}.")
        row["image"] = self._embed(row["image"])
        encoded = row["image"]["bytes"]
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        size = self.statistics.images.get(digest) or _size_of_readable(encoded)
        self._check_masks(row, size)
        if row["sample_id"] in self._ids:
            detail = f"several samples of {self.split} have this id"
            self.report.add("duplicate_id", row["sample_id"], detail, lost=False)
        self._ids.add(row["sample_id"])
        self.statistics.add(row, digest, size)
        self._keep_to_show(row)
        return row

    def _keep_to_show(self, row: dict[str, Any]) -> None:
        kind = row["kind"]
        new = kind not in self.shown and len(self.shown) < SHOWN_ROWS
        few = sum(map(len, self.shown.values())) < 2 * SHOWN_ROWS
        if new or (few and kind in self.shown):
            self.shown.setdefault(kind, []).append(row)

    def _check_masks(self, row: dict[str, Any], size: tuple[int, int]) -> None:
        """Decode every mask, and store it compressed; sentences about one image mostly share theirs."""
        for column in ("masks", "distractor_masks", "ignore"):
            if row[column] is None:
                continue
            rles = [row["ignore"]] if column == "ignore" else row[column]
            try:
                rles = [compressed(rle) for rle in rles]
                row[column] = rles[0] if column == "ignore" else rles
                for rle in rles:
                    key = (*size, *rle["size"], rle["counts"])
                    if key not in self._decoded:
                        decode_masks([rle], size)
                        self._decoded.add(key)
            except ValueError as error:
                raise RowProblem("bad_annotation", f"{column}: {error}") from error
        if len(self._decoded) > REMEMBERED_MASKS:
            self._decoded.clear()

    def _embed(self, image: Any) -> dict[str, Any]:
        """The content of an image's file, and its name without folders."""
        import pyarrow as pa

        feature = self.features["image"]
        try:
            stored = pa.array([encode_image(feature, image)], type=feature.pa_type)
            embedded = feature.embed_storage(stored)[0].as_py()
        except FileNotFoundError as error:
            raise RowProblem("missing_image", str(error)) from error
        except (OSError, TypeError, ValueError) as error:
            raise RowProblem("unreadable_image", str(error)) from error
        if not embedded["bytes"]:
            raise RowProblem("missing_image", f"the image has no content (path {embedded['path']!r}).")
        return embedded

    def _tables(self, rows: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """Row groups."""
        import pyarrow as pa

        group: list[dict[str, Any]] = []
        num_bytes = 0
        for row in rows:
            group.append(row)
            num_bytes += len(row["image"]["bytes"])
            if len(group) == ROWS_PER_GROUP or num_bytes >= BYTES_PER_GROUP:
                yield self._count(pa.Table.from_pylist(group, schema=self.features.arrow_schema))
                group, num_bytes = [], 0
        if group:
            yield self._count(pa.Table.from_pylist(group, schema=self.features.arrow_schema))

    def _count(self, table: Any) -> Any:
        self.statistics.bytes_in_memory += table.nbytes
        return table

    def _open_shard(self) -> Any:
        """A Parquet writer in which equal neighbours, such as the photograph of several sentences, are stored once.

        `Dataset.to_parquet` keeps images out of dictionaries: 40 photographs of five sentences each take 9.9 MB with
        it and 2.0 MB here.
        """
        import pyarrow.parquet as pq

        path = self.folder / f"data/{self.split}-{len(self._paths):05d}.part"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._paths.append(path)
        return pq.ParquetWriter(
            path,
            self.features.arrow_schema,
            compression="zstd",
            use_dictionary=True,
            dictionary_pagesize_limit=2 * BYTES_PER_GROUP,  # by default 1 MB: few photographs
        )

    def _name_shards(self) -> None:
        for index, path in enumerate(self._paths):
            named = path.rename(self.folder / shard_name(self.split, index, len(self._paths)))
            self.statistics.bytes_on_disk += named.stat().st_size
        self.statistics.num_shards = len(self._paths)


def _size_of_readable(encoded: bytes) -> tuple[int, int]:
    try:
        width, height = to_rgb_image(encoded).size
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise about anything, from TypeError to struct.error
        raise RowProblem("unreadable_image", f"{type(error).__name__}: {error}") from error
    return height, width
