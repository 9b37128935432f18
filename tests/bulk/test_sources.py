"""Data sets of images wherever they lie: every row once, in order, and what cannot be read as a row that says so."""

import io
import json
import pickle

import bulk
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from segcompass_hf.bulk.shards import num_rows, read_with_problems
from segcompass_hf.bulk.sources import open_source


def content(index=0):
    file = io.BytesIO()
    tiny.tiny_image(index, (20, 16)).save(file, "PNG")
    return file.getvalue()


def read(source):
    """Rows of all shards, read by a copy as other processes have it."""
    copy = pickle.loads(pickle.dumps(source))
    return [row for shard in copy.shards for row in read_with_problems(copy, shard)]


def places(source):
    return [(shard.file, shard.start, shard.stop) for shard in source.shards]


def write_parquet(path, columns, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **kwargs)


@pytest.fixture
def parquet(tmp_path):
    """Seven rows in row groups of three, and two rows in a second file."""
    images = [{"bytes": content(index), "path": None} for index in range(9)]
    words = [f"thing {index}" for index in range(9)]
    folder = tmp_path / "shards"
    for name, rows in {"a.parquet": slice(0, 7), "more/b.parquet": slice(7, 9)}.items():
        write_parquet(folder / name, {"image": images[rows], "instruction": words[rows]}, row_group_size=3)
    return folder


def test_parquet_shards_are_ranges_of_rows(parquet):
    source = open_source(str(parquet), 2, "instruction")
    assert places(source) == [("a.parquet", 0, 2), ("a.parquet", 2, 4), ("a.parquet", 4, 6), ("a.parquet", 6, 7)] + [
        ("more/b.parquet", 0, 2)
    ]
    assert num_rows(source.shards) == 9
    rows = read(source)
    assert [row.instruction for row in rows] == [f"thing {index}" for index in range(9)]
    assert [row.image for row in rows] == [content(index) for index in range(9)]
    assert [(row.source, row.row) for row in rows][5:8] == [("a.parquet", 5), ("a.parquet", 6), ("more/b.parquet", 0)]
    assert rows[6].sample_id == "a.parquet:6"
    (alone,) = list(source.read(source.shards[3]))  # of the third row group
    assert alone.instruction == "thing 6"
    assert places(open_source(f"{parquet}/*.parquet", 100, "instruction")) == [("a.parquet", 0, 7)]
    assert places(open_source(f"{parquet}/more/b.parquet", 100, None)) == [("b.parquet", 0, 2)]


def test_parquet_behind_a_url(parquet):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.parquet", (parquet / "a.parquet").read_bytes())
    local, far = (open_source(f"{root}/a.parquet", 4, "instruction") for root in (parquet, "memory://bucket"))
    assert places(local) == places(far)
    assert [row.image for row in far.read(far.shards[1])] == [row.image for row in local.read(local.shards[1])]


def test_what_is_asked_and_what_is_shown_may_have_other_names(tmp_path):
    rows = {"id": [1, 2], "jpg": [content(0), content(1)], "question": [["one", "two"], ["three"]]}
    write_parquet(tmp_path / "a.parquet", rows)
    assert [row.instruction for row in read(open_source(str(tmp_path), 5, "question"))] == [["one", "two"], ["three"]]
    with pytest.raises(ValueError, match=r"a.parquet has no column 'instruction'; it has id, jpg, question"):
        open_source(str(tmp_path), 5, "instruction")
    write_parquet(tmp_path / "b.parquet", rows | {"png": rows["jpg"]})
    with pytest.raises(ValueError, match="b.parquet has several columns of images"):
        open_source(str(tmp_path), 5, "question")


def test_paths_in_rows_lead_nowhere_else(tmp_path):
    folder = bulk.save_pictures(tmp_path / "data", 1)
    (tmp_path / "secret.png").write_bytes(content())
    paths = ["000.png", "../secret.png", "http://127.0.0.1/x.png", None]
    images = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    write_parquet(folder / "a.parquet", {"image": images})
    rows = read(open_source(f"{folder}/a.parquet", 9, None))
    assert [row.problem is None for row in rows] == [True, False, False, True]
    assert rows[0].image == str(folder / "000.png") and rows[3].image is None
    assert "lies outside of" in rows[1].problem and "is the address" in rows[2].problem
    assert read(open_source(f"{folder}/a.parquet", 9, None, allow_outside=True))[1].problem is None
    import fsspec

    fsspec.filesystem("memory").pipe_file("/far/a.parquet", (folder / "a.parquet").read_bytes())
    assert "on another machine" in read(open_source("memory://far/a.parquet", 9, None))[0].problem


def test_a_damaged_parquet_file_is_a_row(parquet):
    whole = (parquet / "a.parquet").read_bytes()
    (parquet / "a.parquet").write_bytes(whole[:-20])
    rows = read(open_source(str(parquet), 5, "instruction"))
    assert [(row.source, row.row, row.problem is None) for row in rows] == [
        ("a.parquet", 0, False),
        ("more/b.parquet", 0, True),
        ("more/b.parquet", 1, True),
    ]
    assert "a.parquet cannot be read from row 0 to its end" in rows[0].problem


def test_pages_that_are_damaged_end_their_shard_with_a_row(parquet):
    path = parquet / "a.parquet"
    metadata = pq.ParquetFile(path).metadata
    column = metadata.row_group(1).column(0)  # rows 3 to 5
    spoiled = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    spoiled[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(spoiled)
    rows = read(open_source(f"{parquet}/a.parquet", 7, "instruction"))
    assert [row.problem is None for row in rows][-1] is False and rows[-1].row == len(rows) - 1
    assert "to row 6" in rows[-1].problem


def test_tar_samples(tmp_path):
    samples = [("x/000.png", content(0)), ("x/000.json", json.dumps({"instruction": "the ring", "n": 1}).encode())]
    samples += [("x/001.json", b'{"instruction": "no picture"}'), ("x/002.cls", b"3"), ("x/002.PNG", content(2))]
    samples += [("x/003.png", content(3)), ("x/003.instruction", "ein Würfel\n".encode())]
    bulk.save_tar(tmp_path / "a.tar", samples)
    source = open_source(str(tmp_path), 2, "instruction")
    assert places(source) == [("a.tar", 0, None)] and num_rows(source.shards) is None
    rows = read(source)
    assert [(row.sample_id, row.row) for row in rows] == [(f"x/00{index}", index) for index in range(4)]
    assert [row.instruction for row in rows] == ["the ring", "no picture", None, "ein Würfel"]
    assert [row.image for row in rows] == [content(0), None, content(2), content(3)]
    assert "has no picture; it has json" in rows[1].problem
    assert "neither a .instruction nor a .json" in rows[2].problem
    assert rows[0].problem is None and rows[3].problem is None
    assert [row.problem is None for row in read(open_source(str(tmp_path), 2, None))] == [True, False, True, True]


@pytest.mark.parametrize("kept", [1536, 2000, 3072], ids=["between samples", "within a picture", "at a header"])
def test_a_tar_that_ends_early_says_so(tmp_path, kept):
    path = bulk.save_tar(tmp_path / "a.tar", [(f"{index}.png", content(index)) for index in range(3)])
    whole = path.read_bytes()
    assert len(content(0)) < 1024
    path.write_bytes(whole[:kept])
    rows = read(open_source(str(path), 9, None))
    assert len(rows) < 4 and rows[-1].problem is not None and "a.tar cannot be read from row" in rows[-1].problem
    assert all(row.problem is None for row in rows[:-1])


def test_pictures(tmp_path):
    folder = bulk.save_pictures(tmp_path / "data", 5)
    bulk.save_pictures(folder / "deeper", 1)
    bulk.save_pictures(folder / ".hidden", 1)
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "outside.png").write_bytes(content())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(folder), 4, None)
    assert places(source) == [("", 0, 4), ("", 4, 8)]
    rows = read(source)
    names = ["000.png", "001.png", "002.png", "003.png", "004.png", "broken.png", "deeper/000.png", "link.png"]
    assert [row.sample_id for row in rows] == names
    assert {row.sample_id for row in rows if row.problem} == {"broken.png", "link.png"}
    outside = read(open_source(str(folder), 4, None, allow_outside=True))
    assert all(row.problem is None for row in outside)


def test_pictures_with_lines(tmp_path):
    folder = bulk.save_pictures(tmp_path, 2)
    lines = [
        {"file_name": "001.png", "ask": "the ring", "sample_id": "first"},
        {"image": "9.png", "ask": "x"},
        {"ask": "y"},
    ]
    text = "\n".join([*map(json.dumps, lines), "{broken", json.dumps({"image": "000.png"})])
    (folder / "metadata.jsonl").write_text(text)
    rows = read(open_source(str(folder), 3, "ask"))
    assert [row.sample_id for row in rows] == ["first", *(f"metadata.jsonl:{number}" for number in range(2, 6))]
    assert [row.instruction for row in rows] == ["the ring", "x", "y", None, None]
    assert rows[0].image == str(folder / "001.png") and rows[0].problem is None and rows[4].problem is None
    told = [row.problem for row in rows[1:4]]
    assert "there is no file '9.png'" in told[0] and "image is None" in told[1] and "no complete JSON" in told[2]


def test_data_sets_that_have_a_name():
    source = open_source("scenes:val", 200, "instruction")
    assert places(source) == [("", 0, 200), ("", 200, 400), ("", 400, 500)]
    from segcompass_hf.data import scenes

    (expected,) = list(scenes.iterate("val", 1, seed=0))
    row = next(iter(source.read(source.shards[0])))
    assert (row.instruction, row.sample_id) == (expected["instruction"], expected["sample_id"])
    assert isinstance(row.image, bytes)
    assert source.description() == open_source("scenes:val", 7, "instruction").description()
    with pytest.raises(ValueError, match="no column 'words'; it has image"):
        open_source("scenes:val", 200, "words")


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_source(str(tmp_path / "nowhere"), 5, None)
    with pytest.raises(ValueError, match="holds nothing to answer; expected a folder, pattern or URL"):
        open_source(str(tmp_path), 5, None)
    with pytest.raises(ValueError, match="cannot be opened: Protocol not known: gopher"):
        open_source("gopher://x/y", 5, None)
    with pytest.raises(ValueError, match="there is no data set 'nothing'. Known are"):
        open_source("nothing", 5, None)
    bulk.save_pictures(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no instructions: .*Or ask the same of every picture"):
        open_source(str(tmp_path), 5, "instruction")
    write_parquet(tmp_path / "a.parquet", {"image": [content()]})
    with pytest.raises(ValueError, match="holds Parquet files and pictures; name those that are meant"):
        open_source(str(tmp_path), 5, None)


def test_a_change_of_the_files_changes_the_description(tmp_path):
    folder = bulk.save_pictures(tmp_path, 3)
    before = open_source(str(folder), 5, None).description()
    assert open_source(str(folder), 2, None).description() == before
    (folder / "001.png").write_bytes(b"another")
    assert open_source(str(folder), 5, None).description() != before
