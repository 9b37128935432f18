# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a Parquet file becomes in memory, known before it is read: a few kilobytes may stand for gigabytes."""

from __future__ import annotations

import os
from typing import Any

MAX_BYTES = 4 << 30  # of a row group in memory
MAX_ROW_BYTES = 1 << 30  # where rows are read one at a time
MAX_GROWTH = 100  # times the file's size, beyond `MAX_BYTES`; images are compressed, and repeated for some sentences
_WIDTH = 8  # bytes of a number, and at most of a place in a list


def check_parquet(file: Any, name: str, row_by_row: bool = False) -> None:
    """Refuse a file that would fill the memory, by its footer and where that leaves it open by its dictionaries.

    Damaged files pass: whoever reads them says what is wrong.

    Args:
        file: Path, or an open file.
        name (`str`): What the message calls it.
        row_by_row (`bool`, *optional*, defaults to `False`): Whether the reader holds a row at a time, not a row group
            (as `datasets` does). Rows of a group count as equally large then.

    Raises:
        ValueError: A row group, or a row, has too many bytes, or all together more than 100 times those of the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            strings = [
                parquet.schema.column(place).path
                for place in range(len(parquet.schema))
                if parquet.schema.column(place).physical_type == "BYTE_ARRAY"
            ]
        if hasattr(file, "seek"):
            file.seek(0)
        with pq.ParquetFile(file, read_dictionary=strings) as parquet:
            groups = _bytes_of_rows(parquet) if row_by_row else _bytes_of_groups(parquet)
    except (pa.ArrowException, OSError):
        return
    finally:
        if hasattr(file, "seek"):
            file.seek(0)
    size = os.path.getsize(file) if isinstance(file, (str, os.PathLike)) else len(file.getbuffer())
    unit, most = ("row", MAX_ROW_BYTES) if row_by_row else ("row group", MAX_BYTES)
    if max(groups, default=0) > most:
        raise ValueError(
            f"{name} has a {unit} of {max(groups)} bytes in memory; at most {most} are read. Is it what it should be? "
            "Write it with fewer rows in a row group, or smaller images and masks."
        )
    if not row_by_row and sum(groups) > max(MAX_BYTES, MAX_GROWTH * size):
        raise ValueError(
            f"{name} has {size} bytes but {sum(groups)} in memory, more than {MAX_GROWTH} times as many; such a file "
            "holds no images. Is it what it should be?"
        )


def _bytes_of_rows(parquet: Any) -> list[int]:
    """Of a row of each row group, on the average; texts of a dictionary are read as they are, not written out."""
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    return [sum(map(_stored_bytes, _columns(group))) // max(group.num_rows, 1) for group in groups]


def _bytes_of_groups(parquet: Any) -> list[int]:
    """Of each row group when it is read; dictionaries are looked at where that matters."""
    groups = [_columns(parquet.metadata.row_group(place)) for place in range(parquet.num_row_groups)]
    # As if all texts were the largest of their dictionary.
    most = [
        [_stored_bytes(one) * (one.num_values if one.has_dictionary_page else 1) for one in group] for group in groups
    ]
    if sum(map(sum, most)) <= MAX_BYTES or max(sum(map(_stored_bytes, group)) for group in groups) > MAX_BYTES:
        return [sum(map(_stored_bytes, group)) for group in groups]
    return [sum(_read_bytes(parquet, place, one) for one in group) for place, group in enumerate(groups)]


def _columns(group: Any) -> list[Any]:
    return [group.column(place) for place in range(group.num_columns)]


def _stored_bytes(column: Any) -> int:
    """Decompressed, with the places of its values."""
    return column.num_values * _WIDTH + column.total_uncompressed_size


def _read_bytes(parquet: Any, place: int, column: Any) -> int:
    stored = _stored_bytes(column)
    if column.physical_type != "BYTE_ARRAY" or not column.has_dictionary_page:
        return stored
    return max(stored, _repeated_bytes(parquet, place, column.path_in_schema))


def _repeated_bytes(parquet: Any, place: int, column: str) -> int:
    """Of the texts of a column when each is written out, from their dictionary."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = parquet.read_row_group(place, columns=[column], use_threads=False).column(0)
    total = 0
    for chunk in values.chunks:
        while not pa.types.is_dictionary(chunk.type):
            chunk = pc.struct_field(chunk, [0]) if pa.types.is_struct(chunk.type) else chunk.flatten()
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total
