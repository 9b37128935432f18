# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Stored rows with paths in place of images: only files of their own folder are read, and no address."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from segcompass_hf.cli import main
from segcompass_hf.data import write_dataset
from segcompass_hf.data.builders.rows import make_row
from segcompass_hf.data.hosting.publish import push_dataset
from segcompass_hf.data.schema import row_features
from segcompass_hf.evaluation.datasets_spec import load_dataset_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def address():
    """Of a server on this machine that notes what is asked of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.server.asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/a.png"
    server.shutdown()
    server.server_close()
    assert server.asked == []


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root, images: list, typed: bool = True, sample_ids: bool = True) -> str:
    """A Parquet file of such images."""
    rows = [make_row(image=b"", instruction="it", sample_id=f"s{n}", source="a") for n in range(len(images))]
    rows = [row | {"image": image} for row, image in zip(rows, images, strict=True)]
    root.mkdir(exist_ok=True)
    path = root / "rows.parquet"
    if typed:
        table = pa.Table.from_pylist(rows, schema=row_features().arrow_schema)
    else:
        table = pa.Table.from_pylist(rows)
    if not sample_ids:
        table = table.drop_columns(["sample_id"])
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("form", ["Image", "struct", "text"])
def test_rows_that_lead_elsewhere_are_left_out(tmp_path, address, form):
    root, private = tmp_path / "root", tmp_path / "id_card.png"
    root.mkdir()
    private.write_bytes(png())
    (root / "near.png").write_bytes(png())
    (root / "link.png").symlink_to(private)
    near, *others = [str(root / "near.png"), str(private), str(root / "link.png"), f"{root}/../id_card.png", address]
    images = [near, *others] if form == "text" else [{"bytes": None, "path": path} for path in (near, *others)]
    if form != "text":
        images.append({"bytes": png(), "path": str(private)})  # the bytes count
    path = write(root, images, typed=form == "Image")
    named = load_dataset_of(path)
    kept = [0] if form == "text" else [0, 5]
    assert named.dataset["sample_id"][:] == [f"s{n}" for n in kept]
    assert named.report.counts == {"outside_folder": 4}
    assert [problem["where"] for problem in named.report.problems] == ["s1", "s2", "s3", "s4"]
    assert "is the address 'http://127.0.0.1" in named.report.problems[-1]["detail"]
    assert len(load_dataset_of(path, allow_outside=True).dataset) == len(images)


def test_lists_of_images_and_rows_without_ids(tmp_path):
    (tmp_path / "id_card.png").write_bytes(png())
    (tmp_path / "root").mkdir()
    features = datasets.Features({"images": datasets.List(datasets.Image()), "text": datasets.Value("string")})
    stored, private = {"bytes": png(), "path": None}, {"bytes": None, "path": str(tmp_path / "id_card.png")}
    rows = {"images": [[stored], None, [stored, private]], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(rows, schema=features.arrow_schema), tmp_path / "root" / "rows.parquet")
    named = load_dataset_of(str(tmp_path / "root" / "rows.parquet"))
    assert named.dataset["text"][:] == ["a", "b"] and named.report.problems[0]["where"] == "row 2"


def test_no_row_left_and_rows_in_memory(tmp_path):
    (tmp_path / "id_card.png").write_bytes(png())
    path = write(tmp_path / "root", [{"bytes": None, "path": str(tmp_path / "id_card.png")}], sample_ids=False)
    with pytest.raises(ValueError, match="no row can be used: .*outside_folder x 1 .first: row 0"):
        load_dataset_of(path)
    path = write(tmp_path / "root", [{"bytes": png(), "path": "a.png"}] * 3)
    named = load_dataset_of(path)
    assert len(named.dataset) == 3 and named.report is None


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "id_card.png").write_bytes(png())
    images = [{"bytes": png(), "path": None}, {"bytes": None, "path": str(tmp_path / "id_card.png")}]
    path, folder = write(tmp_path / "root", images), tmp_path / "out"
    assert main(["data", "build", path, "--output", str(folder)]) == 0
    assert "1 lost" in capsys.readouterr().out and len(pq.read_table(folder / "data")) == 1
    both = tmp_path / "both"
    assert main(["data", "build", path, "--output", str(both), "--allow-outside"]) == 0
    assert len(pq.read_table(both / "data")) == 2
    assert main(["data", "build", path, "--output", str(tmp_path / "all"), "--split", "All"]) == 2
    assert "means all splits" in capsys.readouterr().err and not (tmp_path / "all").exists()


@pytest.mark.parametrize("split", ["all", "ALL", "All"])
def test_no_split_is_called_all(tmp_path, split):
    rows = [make_row(image=png(), instruction="it", sample_id="s", source="a")]
    with pytest.raises(ValueError, match="a split cannot be called .*name another"):
        write_dataset({split: rows}, tmp_path / "out")
    write_dataset({"overall": rows}, tmp_path / "out")
    assert list(datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))) == ["overall"]


def test_links_in_a_data_set_are_not_published(tmp_path):
    rows = [make_row(image=png(), instruction="it", sample_id="s", source="a")]
    folder = write_dataset({"train": rows}, tmp_path / "out").folder
    (tmp_path / "notes.txt").write_text("private")
    (folder / "LICENSE").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="LICENSE' is a link out of the folder"):
        push_dataset(folder, "owner/name", dry_run=True)
