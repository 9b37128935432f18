# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Small Parquet files that would fill the memory are refused before they are read; here of megabytes, bounds alike."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segcompass_hf.data import from_hosted_reasonseg, parquet_sizes
from segcompass_hf.data.parquet_sizes import check_parquet
from segcompass_hf.evaluation.datasets_spec import load_dataset_of

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OPTIONS = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30}


def images(*contents):
    return pa.array([{"bytes": content, "path": None} for content in contents], type=IMAGE)


@pytest.fixture
def bounds(monkeypatch):
    monkeypatch.setattr(parquet_sizes, "MAX_BYTES", 20_000_000)
    monkeypatch.setattr(parquet_sizes, "MAX_ROW_BYTES", 5_000_000)


def test_one_image_in_every_row(tmp_path, bounds):
    pq.write_table(pa.table({"image": images(*[bytes(50_000)] * 1_000)}), tmp_path / "a.parquet", **OPTIONS)  # 50 MB
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match="a.parquet' has a row group of 50[0-9]{6} bytes in memory"):
        load_dataset_of(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="has a row group of"):
        load_dataset_of(str(tmp_path))
    check_parquet(tmp_path / "a.parquet", "a", row_by_row=True)  # rows of 50 kB


def test_many_row_groups(tmp_path, bounds):
    table = pa.table({"image": images(*[bytes(50_000)] * 1_000)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, **OPTIONS)  # ten of 5 MB
    with pytest.raises(ValueError, match="a has .* bytes but 50[0-9]{6} in memory, more than 100 times as many"):
        check_parquet(tmp_path / "a.parquet", "a")


@pytest.mark.parametrize(
    "column",
    [images(bytes(8_000_000)), pa.array([[[0] * 1000] * 1000], type=pa.list_(pa.list_(pa.int64())))],
    ids=["bytes", "nested lists"],
)
def test_one_row(tmp_path, bounds, column):
    pq.write_table(pa.table({"mask": column}), tmp_path / "a.parquet", **OPTIONS)
    with pytest.raises(ValueError, match="has a row of 8[0-9]{6} bytes in memory; at most 5000000"):
        check_parquet(tmp_path / "a.parquet", "a", row_by_row=True)


def test_hosted_mirrors_are_looked_at_first(tmp_path, bounds):
    columns = {
        "image": images(bytes(8_000_000)),
        "mask": images(b""),
        "text": ["it"],
        "image_id": ["1"],
        "ann_id": ["1"],
    }
    pq.write_table(pa.table(columns), tmp_path / "test.parquet", **OPTIONS)
    with pytest.raises(ValueError, match="has a row of 8"):
        from_hosted_reasonseg(tmp_path / "test.parquet")


def test_ordinary_files_pass(tmp_path):
    words = pa.array(["a photograph"] * 5_000)
    pq.write_table(
        pa.table({"instruction": words, "image": images(*map(str.encode, map(str, range(5_000))))}), tmp_path / "a"
    )
    check_parquet(tmp_path / "a", "a")
    (tmp_path / "damaged").write_bytes(b"PAR1 no table PAR1")
    check_parquet(tmp_path / "damaged", "damaged")  # whoever reads it says what is wrong
