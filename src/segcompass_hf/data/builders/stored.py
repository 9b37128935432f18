# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets that are in the row schema already: rows whose image is a path lead nowhere but into their own folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from .build_report import BuildReport, RowProblem
from .found_files import TrustedFolder

_ROWS_PER_BATCH = 1000


def rows_inside(dataset: Any, folders: Sequence[str | os.PathLike], report: BuildReport) -> Any:
    """Leave out rows that would read a file elsewhere, or an address: whoever wrote them chose which.

    Images that are stored as bytes are not touched; only paths are looked at, so that no image is read.

    Args:
        dataset (`datasets.Dataset`): With images in columns of type `datasets.Image`, or as structs with `bytes` and
            `path`, or as text in `image` and `images`; also as lists of these.
        folders (`Sequence`): Where its files may lie.
        report (`BuildReport`): Gets the rows that are left out, as `outside_folder`.

    Returns:
        `datasets.Dataset`: The same where no row is left out.

    Raises:
        ValueError: No row is left.
    """
    columns = [name for name, feature in dataset.features.items() if _may_be_path(name, feature)]
    trusted = [TrustedFolder(folder) for folder in folders]
    plain = dataset.select_columns([*columns, *({"sample_id"} & set(dataset.column_names))]).with_format("arrow")
    kept, start = [], 0
    for table in plain.iter(_ROWS_PER_BATCH) if columns else ():
        refused: dict[int, RowProblem] = {}
        for name in columns:
            for row, path in _paths(table.column(name)):
                try:
                    check_image_path(path, trusted)
                except RowProblem as problem:
                    refused[row] = problem
        for row, problem in sorted(refused.items()):
            sample_id = table.column("sample_id")[row].as_py() if "sample_id" in table.column_names else None
            report.add(problem.kind, sample_id or f"row {start + row}", str(problem))
        kept += [start + row for row in range(len(table)) if row not in refused]
        start += len(table)
    if len(kept) == start:
        return dataset
    if not kept:
        raise ValueError(f"no row can be used: {report.summary()}")
    report.log("data set")
    return dataset.select(kept)


def _may_be_path(name: str, feature: Any) -> bool:
    import datasets

    feature = getattr(feature, "feature", feature)  # of a list
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return isinstance(feature, datasets.Image) or (is_text and name in ("image", "images"))


def _paths(column: Any) -> list[tuple[int, str]]:
    """Row and path of every image that has no bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.combine_chunks()
    rows = pa.array(range(len(values)))
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        rows, values = pc.list_parent_indices(values), pc.list_flatten(values)
    if pa.types.is_struct(values.type):
        bare = pc.is_null(pc.struct_field(values, "bytes"))
        values, rows = pc.struct_field(values, "path").filter(bare), rows.filter(bare)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return []
    pairs = zip(rows.to_pylist(), values.to_pylist(), strict=True)
    return [(row, path) for row, path in pairs if path is not None]


def check_image_path(path: str, trusted: Sequence[TrustedFolder]) -> None:
    """Refuse the path of an image that leads out of the folders of its data set, or an address.

    Args:
        path (`str`): As a row names it.
        trusted (`Sequence[TrustedFolder]`): The folders, at least one.

    Raises:
        RowProblem: `"outside_folder"`.
    """
    if re.match(r"\w[\w+.-]*:", path):
        detail = f"the image is the address {path!r:.80}; download it, or store its bytes in the row."
        raise RowProblem("outside_folder", detail)
    if not any(folder.holds(path) for folder in trusted):
        trusted[0].check(path)
