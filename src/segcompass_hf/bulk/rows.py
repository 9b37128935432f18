# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of answers and of errors, as Parquet, and a digest that is the same for the same rows."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.schema import encode_mask

DIGITS = 6  # of scores and activations; beyond these, the number of threads of a CPU shows
METADATA = b"segcompass"  # of a Parquet file: its numbers of rows and errors, and the digest of its rows


def answered_row(question: dict[str, Any], result: dict[str, Any], concepts: list[dict] | None) -> dict[str, Any]:
    """The row of an answer.

    Args:
        question (`dict`): `sample_id`, `source`, `row`, `question` and `instruction`.
        result (`dict`): Of `post_process_segmentation`.
        concepts (`list[dict]`, *optional*): See [`strongest_concepts`].
    """
    height, width = result["masks"].shape[-2:]
    row = {
        **question,
        "height": height,
        "width": width,
        "masks": [encode_mask(mask) for mask in result["masks"].numpy()],
        "scores": [round(score, DIGITS) for score in result["scores"].tolist()],
        "slots": result["slots"].tolist(),
        "duplicates": result["duplicates"],
        "reasoning": result["reasoning"],
        "text": result["text"],
        "error": None,
    }
    return row if concepts is None else row | {"concepts": concepts}


def failed_row(question: dict[str, Any], problem: str, with_concepts: bool) -> dict[str, Any]:
    """The row of a question that cannot be answered, with why."""
    empty = {name: None for name in ("height", "width", "masks", "scores", "slots", "duplicates", "reasoning", "text")}
    row = {**question, **empty, "error": problem}
    return row | {"concepts": None} if with_concepts else row


def strongest_concepts(concepts: Any, count: int) -> list[list[dict[str, Any]]]:
    """The active concepts of each row of a batch that fire strongest on any of its tokens.

    Args:
        concepts ([`SparseConcepts`]): Of the batch.
        count (`int`): At most so many of a row.

    Returns:
        `list[list[dict]]`: `feature`, `activation` (the one of largest size) and `tokens` (that it is active on), the
        strongest first; of equal ones, the lower feature.
    """
    rows = (concepts.token_index // concepts.sequence_length).cpu().numpy()
    features, values = concepts.features.cpu().numpy(), concepts.values.float().cpu().numpy()
    order = np.lexsort((-np.abs(values), features, rows))
    rows, features, values = rows[order], features[order], values[order]
    is_first = np.ones(len(rows), dtype=bool)  # the strongest activation of a feature in a row
    is_first[1:] = (rows[1:] != rows[:-1]) | (features[1:] != features[:-1])
    starts = np.flatnonzero(is_first)
    tokens = np.diff(starts, append=len(rows))
    rows, features, values = rows[starts], features[starts], values[starts].astype(np.float64).round(DIGITS)
    lists: list[list[dict[str, Any]]] = [[] for _ in range(concepts.batch_size)]
    for place in np.lexsort((features, -np.abs(values), rows)):
        if len(lists[rows[place]]) < count:
            entry = {"feature": int(features[place]), "activation": float(values[place]), "tokens": int(tokens[place])}
            lists[rows[place]].append(entry)
    return lists


def arrow_schema(with_concepts: bool) -> Any:
    """Columns of the Parquet files."""
    import pyarrow as pa

    rle = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    concept = pa.struct([("feature", pa.int32()), ("activation", pa.float64()), ("tokens", pa.int32())])
    fields = [
        ("sample_id", pa.string()),
        ("source", pa.string()),  # file that the row comes from
        ("row", pa.int64()),  # its place there, from 0
        ("question", pa.int32()),  # which of the instructions about one image, from 0
        ("instruction", pa.string()),
        ("height", pa.int32()),  # of the image and its masks, in pixels
        ("width", pa.int32()),
        ("masks", pa.list_(rle)),
        ("scores", pa.list_(pa.float64())),  # in [0, 1], one per mask
        ("slots", pa.list_(pa.int32())),
        ("duplicates", pa.list_(pa.int32())),  # slots left out, each the same object as a better one
        ("reasoning", pa.string()),
        ("text", pa.string()),  # the whole answer
        ("error", pa.string()),  # null where there is an answer
    ]
    return pa.schema([*fields, ("concepts", pa.list_(concept))] if with_concepts else fields)


def parquet_bytes(rows: Sequence[dict[str, Any]], with_concepts: bool) -> tuple[bytes, dict[str, Any]]:
    """A shard's rows as a Parquet file, and what its footer says of them: `rows`, `errors` and `digest`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{name: _storable(value) for name, value in row.items()} for row in rows]
    counts = {
        "rows": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "digest": rows_digest(rows),
    }
    table = pa.Table.from_pylist(rows, schema=arrow_schema(with_concepts))
    table = table.replace_schema_metadata({METADATA: json.dumps(counts)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue(), counts


def _storable(value: Any) -> Any:
    """Half characters, which have no UTF-8, as their escapes."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of rows in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def counts_of(file: Any) -> dict[str, Any]:
    """What the footer of a shard's Parquet file says of its rows.

    Args:
        file: Open, in bytes.

    Raises:
        ValueError: It is damaged, or none of ours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            return json.loads((parquet.schema_arrow.metadata or {})[METADATA])
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"it is no file of predictions, or damaged ({error!r})") from error
