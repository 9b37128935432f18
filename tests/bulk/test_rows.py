"""Rows of answers and errors: concepts by hand, Parquet that says what it holds, digests."""

import io

import pyarrow.parquet as pq
import pytest
import torch

from segcompass_hf.bulk.rows import (
    answered_row,
    arrow_schema,
    counts_of,
    failed_row,
    parquet_bytes,
    rows_digest,
    strongest_concepts,
)
from segcompass_hf.data.schema import decode_mask
from segcompass_hf.modeling_concepts import SparseConcepts

QUESTION = {"sample_id": "a", "source": "a.png", "row": 0, "question": 0, "instruction": "the ring"}


def result():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 1], masks[1, :, 2] = True, True
    return {
        "masks": masks,
        "scores": torch.tensor([0.25, 0.1234567]),
        "slots": torch.tensor([0, 3]),
        "duplicates": [1],
        "reasoning": "a ring",
        "text": "<think>a ring</think>",
    }


def test_strongest_concepts_by_hand():
    # Two rows of three tokens. Feature 5 fires on tokens 0 and 2 of the first row, strongest below zero.
    concepts = SparseConcepts(
        features=torch.tensor([5, 7, 5, 9, 7]),
        values=torch.tensor([1.0, 2.0, -4.0, 4.0, 0.5]),
        token_index=torch.tensor([0, 1, 2, 2, 4]),
        batch_size=3,
        sequence_length=3,
    )
    first = [(5, -4.0, 2), (9, 4.0, 1), (7, 2.0, 1)]  # of equal ones the lower feature
    expected = [first, [(7, 0.5, 1)], []]
    for count in (3, 1):
        found = strongest_concepts(concepts, count)
        assert [[tuple(entry.values()) for entry in row] for row in found] == [row[:count] for row in expected]


def test_a_shard_says_what_it_holds():
    rows = [answered_row(QUESTION, result(), None), failed_row(QUESTION | {"row": 1}, "no \ud800 image", False)]
    content, counts = parquet_bytes(rows, with_concepts=False)
    assert (counts["rows"], counts["errors"]) == (2, 1)
    assert counts_of(io.BytesIO(content)) == counts
    table = pq.read_table(io.BytesIO(content))
    first, second = table.to_pylist()
    assert table.schema.names == arrow_schema(False).names
    assert [decode_mask(mask).tolist() for mask in first["masks"]] == result()["masks"].tolist()
    assert (first["scores"], first["slots"], first["error"]) == ([0.25, 0.123457], [0, 3], None)
    assert (first["height"], first["width"]) == (3, 4)
    assert second["masks"] is None and second["error"] == "no \\ud800 image"  # a half character has no UTF-8
    assert parquet_bytes(rows, with_concepts=False)[0] == content


@pytest.mark.parametrize(
    "change", [{"scores": [0.25, 0.123458]}, {"reasoning": "the ring"}, {"error": "x"}, {"row": 2}]
)
def test_the_digest_is_of_every_value(change):
    row = answered_row(QUESTION, result(), None)
    assert rows_digest([row]) == rows_digest([dict(reversed(row.items()))])
    assert rows_digest([row | change]) != rows_digest([row])
    assert rows_digest([row, row | {"row": 1}]) != rows_digest([row | {"row": 1}, row])


def test_files_of_others_are_told(tmp_path):
    with pytest.raises(ValueError, match="no file of predictions, or damaged"):
        counts_of(io.BytesIO(b"PAR1 nothing PAR1"))
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with open(tmp_path / "a.parquet", "rb") as file, pytest.raises(ValueError, match="no file of predictions"):
        counts_of(file)
