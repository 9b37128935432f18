# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Hosted data sets: shards that load and stream, cards whose counts are right, and a look before publish."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from huggingface_hub import DatasetCard
from PIL import Image
from places import ROOT, SAMPLES

from segcompass_hf.data import scenes
from segcompass_hf.data.builders.build_report import BuildReport
from segcompass_hf.data.builders.rows import dataset_from_rows, make_row
from segcompass_hf.data.hosting import figure, publish, write
from segcompass_hf.data.hosting import shards as parquet_shards
from segcompass_hf.data.hosting.publish import push_dataset
from segcompass_hf.data.hosting.write import write_dataset
from segcompass_hf.data.schema import encode_mask, row_features
from segcompass_hf.images_segcompass import to_rgb_image


def png(seed: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    """An image of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rle(left: int = 0, size: tuple[int, int] = (8, 12)) -> dict:
    mask = np.zeros(size, dtype=bool)
    mask[2:5, left : left + 3] = True
    return encode_mask(mask)


def row(number: int, objects: int = 1, **fields) -> dict:
    defaults = {
        "image": png(number),
        "instruction": f"thing {number}",
        "masks": [rle(2 * index) for index in range(objects)],
        "sample_id": f"s{number}",
        "source": "mine",
    }
    return make_row(**(defaults | fields))


def load(folder, tmp_path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_shards, "ROWS_PER_GROUP", 2)
        splits = {"train": [row(n) for n in range(4)], "val": [row(4, 0)]}
        return write_dataset(splits, tmp_path_factory.mktemp("written") / "mine", shard_size=1).folder


@pytest.fixture
def written(written_once, tmp_path):
    """A data set of two splits and three shards, to spoil."""
    return Path(shutil.copytree(written_once, tmp_path / "mine"))


@pytest.fixture(autouse=True)
def quick_figure(monkeypatch):
    """Most tests are not about the figure, which takes longer than the rest."""
    monkeypatch.setattr(write, "save_contact_sheet", lambda rows, path: bool(path.write_bytes(png())))


@pytest.fixture
def real_figure(quick_figure, monkeypatch):
    monkeypatch.setattr(write, "save_contact_sheet", figure.save_contact_sheet)


def test_scenes_come_back_as_they_were_built_also_as_a_stream(tmp_path, real_figure):
    built = {"val": scenes.build("val", 6), "test_pairs": scenes.build("test_pairs", 4)}
    folder = write_dataset(datasets.DatasetDict(built), tmp_path / "scenes").folder
    loaded, streamed = load(folder, tmp_path), load(folder, tmp_path, streaming=True)
    assert set(loaded) == set(streamed) == {"val", "test_pairs"}
    for split, expected in built.items():
        assert loaded[split].features == streamed[split].features == row_features()
        for rows in (loaded[split], list(streamed[split])):
            assert len(rows) == len(expected)
            for got, wanted in zip(rows, expected, strict=True):
                assert np.array_equal(got.pop("image"), wanted.pop("image"))
                assert got == wanted
    data = DatasetCard.load(folder / "README.md").data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == "en"
    with Image.open(folder / "samples.png") as figure:
        assert figure.width > 900 and np.asarray(figure.convert("L")).std() > 20


def test_shards_keep_the_order_and_hold_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "ROWS_PER_GROUP", 2)
    folder = write_dataset([row(number) for number in range(5)], tmp_path / "out", shard_size=1).folder
    shards = sorted((folder / "data").iterdir())
    assert [path.name for path in shards] == [f"train-0000{index}-of-00003.parquet" for index in range(3)]
    assert [pq.read_metadata(path).num_rows for path in shards] == [2, 2, 1]
    assert load(folder, tmp_path, split="train")["sample_id"][:] == ["s0", "s1", "s2", "s3", "s4"]


def test_an_image_of_several_sentences_is_stored_once(tmp_path):
    photograph = png(0, (200, 150))
    assert len(photograph) > 80_000  # noise does not compress
    rows = [row(number, 0, image=photograph) for number in range(20)]
    written = write_dataset(rows, tmp_path / "out")
    assert written.statistics["train"].bytes_on_disk < 1.2 * len(photograph)
    assert load(written.folder, tmp_path, split="train")[19]["image"].size == (200, 150)


def test_the_card_counts(tmp_path):
    rows = [
        row(0, 0, kind="none"),
        row(1, 1, kind="single", is_reasoning=True, reasoning="because"),
        row(2, 2, kind="multi", distractor_masks=[rle()]),
        row(3, 7, kind="multi", image=png(2), ignore=rle(), source="scenes"),
    ]
    report = BuildReport()
    report.add("empty_mask", "s9", "the mask has no pixel.")
    report.left_out["excluded images"] += 3
    written = write_dataset({"train": rows}, tmp_path / "My_set", report, origins=["folder mine"])
    card = (written.folder / "README.md").read_text("utf-8")
    lines = card.splitlines()
    assert "# My\\_set" in lines and "![Samples with the outlines of the objects meant](samples.png)" in lines
    assert "4 samples on 3 images for reasoning segmentation" in card
    megabytes = f"{written.statistics['train'].bytes_on_disk / 1e6:.1f}"
    assert f"| train | 4 | 3 | 8 x 12 | 1 (25.0%) | 1 | 1 | 1 | 1 | {megabytes} |" in lines
    assert "| train | 1 | 1 | 1 | 0 | 0 | 1 |" in lines  # 0, 1, 2, 3, 4, 5 or more objects
    assert {"| multi | 2 |", "| single | 1 |", "| none | 1 |", "| mine | 3 |", "| scenes | 1 |"} <= set(lines)
    assert "- train: 4 kept, 3 left out on purpose (excluded images), 1 lost; problems: empty_mask 1." in lines
    assert "- mine: no licence is known to the builder; whoever publishes this has to state one." in lines
    assert sum(f"| `{column}` |" in card for column in row_features()) == len(row_features()) == 13
    assert "from folder mine." in card

    data = DatasetCard.load(written.folder / "README.md").data.to_dict()
    assert data["license"] == "unknown" and data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["image-segmentation"] and "reasoning-segmentation" in data["tags"]
    files = [{"split": "train", "path": "data/train-*"}]
    assert data["configs"] == [{"config_name": "default", "data_files": files}]
    assert data["dataset_info"]["splits"][0]["num_examples"] == 4
    assert data["dataset_info"]["download_size"] == sum(p.stat().st_size for p in (written.folder / "data").iterdir())

    listed = json.loads((written.folder / "build_report.json").read_text("utf-8"))["train"]
    assert (listed["num_rows"], listed["num_lost"], listed["left_out"]) == (4, 1, {"excluded images": 3})


def test_images_in_two_splits_are_named(tmp_path):
    splits = {"train": [row(0), row(1)], "val": [row(2, image=png(1))], "test": [row(3)]}
    card = (write_dataset(splits, tmp_path / "out").folder / "README.md").read_text("utf-8")
    assert "**Images that two splits share:** train and val 1." in card
    apart = {"train": [row(0)], "val": [row(1)]}
    assert "No two splits share an image." in (write_dataset(apart, tmp_path / "b").folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("sources", "license", "stated"),
    [
        (["scenes"], None, {"license": "apache-2.0"}),
        (["scenes", "refcoco"], None, {"license": "other"}),
        (["scenes", "mine"], None, {"license": "unknown"}),
        (["mine"], "cc-by-4.0", {"license": "cc-by-4.0"}),
        (["mine"], "Ask me.\n", {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}),
    ],
)
def test_licences(tmp_path, sources, license, stated):
    rows = [row(number, source=source) for number, source in enumerate(sources)]
    folder = write_dataset(rows, tmp_path / "out", license=license).folder
    card = DatasetCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == stated
    assert all(f"- {source}: " in card.text for source in sources)
    assert (folder / "LICENSE").exists() == ("license_link" in stated)
    if "refcoco" in sources:
        assert "CC BY 4.0" in card.text and "states no licence" in card.text
    if license == "Ask me.\n":
        assert (folder / "LICENSE").read_text() == "Ask me.\n"


def test_rows_that_cannot_be_read_are_counted_and_named(tmp_path, caplog):
    (tmp_path / "cut.png").write_bytes(png(1)[:150])  # its header is whole, its pixels are not
    rows = [
        row(0),
        row(1, image=str(tmp_path / "cut.png")),
        row(2, image=str(tmp_path / "no where" / "x.png")),
        row(3, masks=[rle(size=(12, 8))]),
        row(4, instruction=" "),
        row(5, sample_id="s0"),
        {"image": png(6), "instruction": "no source"},
    ]
    report = BuildReport()
    written = write_dataset(rows, tmp_path / "out", report)
    kinds = [(problem["where"], problem["kind"], problem["lost"]) for problem in report.problems]
    assert kinds == [
        ("s1", "unreadable_image", True),
        ("s2", "missing_image", True),
        ("s3", "bad_annotation", True),
        ("s4", "empty_text", True),
        ("s0", "duplicate_id", False),
        ("train row 6", "bad_annotation", True),
    ]
    assert report.num_rows == 2 == written.statistics["train"].num_rows
    assert "mask 0 is (12, 8) but its image is (8, 12)" in report.problems[2]["detail"]
    published = (written.folder / "build_report.json").read_text("utf-8")
    assert "'x.png'" in published and str(tmp_path) not in published and str(tmp_path) in str(report.problems)


def test_nothing_usable_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="split 'train' has no row that can be used.*empty_text"):
        write_dataset([row(0, instruction=" ")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "ROWS_PER_GROUP", 1)

    def rows():
        yield from (row(0), row(1))
        assert list(tmp_path.glob("out.unfinished/data/*"))  # shards are there, aside
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(rows(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_nothing_in_place_and_the_next_starts_afresh(tmp_path):
    script = (
        "import os, sys; from segcompass_hf.data import scenes\n"
        "from segcompass_hf.data.hosting import shards as parquet_shards, write\n"
        "parquet_shards.ROWS_PER_GROUP = 1\n"
        "def rows():\n    yield from scenes.iterate('val', 3)\n    os.kill(os.getpid(), 9)\n"
        "write.write_dataset(rows(), sys.argv[1])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and list(tmp_path.glob("out.unfinished/data/*"))
    folder = write_dataset([row(7)], tmp_path / "out").folder
    assert load(folder, tmp_path, split="train")["sample_id"][:] == ["s7"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / ".out.lock"), pytest.raises(FileExistsError, match="another build"):
        write_dataset([row(0)], tmp_path / "out")
    write_dataset([row(0)], tmp_path / "out")  # an empty folder may be there
    with pytest.raises(FileExistsError, match="is there already"):
        write_dataset([row(1)], tmp_path / "out")
    assert load(tmp_path / "out", tmp_path, split="train")["sample_id"][:] == ["s0"]


def test_wrong_arguments_are_named(tmp_path):
    out = tmp_path / "out"
    wrong = datasets.Dataset.from_list([{"image": b"", "text": "a"}])
    with pytest.raises(ValueError, match=r"not in the row schema: columns \['image', 'instruction'.*\['text'\]"):
        write_dataset(wrong, out)
    with pytest.raises(ValueError, match="'a/b' is no name of a split"):
        write_dataset({"a/b": [row(0)]}, out)
    with pytest.raises(ValueError, match="no split"):
        write_dataset({}, out)
    with pytest.raises(ValueError, match="one report for the splits"):
        write_dataset({"a": [row(0)], "b": [row(1)]}, out, BuildReport())
    with pytest.raises(ValueError, match="reports for .'c'."):
        write_dataset({"a": [row(0)]}, out, {"c": BuildReport()})
    with pytest.raises(ValueError, match="shard_size is 0"):
        write_dataset([row(0)], out, shard_size=0)
    with pytest.raises(ValueError, match="called 'out .1.'; datasets would take the brackets for a pattern"):
        write_dataset([row(0)], tmp_path / "out [1]")
    assert not out.exists() and not (tmp_path / "out [1]").exists()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_in_memory_are_stored_upright(tmp_path, orientation):
    """`datasets` writes them anew, without their EXIF rotation."""
    picture = Image.new("RGB", (8, 8))
    picture.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", exif=exif)
    in_memory = Image.open(io.BytesIO(encoded.getvalue()))
    shown = np.asarray(to_rgb_image(encoded.getvalue()))
    assert in_memory.filename == ""
    folder = write_dataset([row(0, image=in_memory, masks=[])], tmp_path / "out").folder
    np.testing.assert_array_equal(np.asarray(load(folder, tmp_path, split="train")[0]["image"]), shown)
    built = dataset_from_rows([row(0, image=in_memory, masks=[])], "memory", cache_dir=tmp_path / "arrow")
    np.testing.assert_array_equal(np.asarray(built[0]["image"]), shown)


def test_paths_and_streams_are_written_with_their_content(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [row(number, image=str(tmp_path / f"{number}.png")) for number in range(3)]
    built = dataset_from_rows(rows, cache_dir=tmp_path / "arrow")
    folder = write_dataset(built, tmp_path / "out").folder
    again = write_dataset({"train": load(folder, tmp_path, split="train", streaming=True)}, tmp_path / "again").folder
    for path in (folder, again):
        table = pq.read_table(path / "data" / "train-00000-of-00001.parquet")
        images = table.column("image").to_pylist()
        assert images == [{"bytes": png(number), "path": f"{number}.png"} for number in range(3)]


def test_without_matplotlib_there_is_no_figure(tmp_path, real_figure, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_dataset([row(0)], tmp_path / "out").folder
    assert not (folder / "samples.png").exists()
    assert "samples.png" not in (folder / "README.md").read_text("utf-8")
    assert "samples.png" not in publish.check_written_dataset(folder).files


class FakeApi:
    """What the Hub would be asked."""

    calls: list = []
    is_private = False

    def __init__(self, token=None):
        self.endpoint = "https://hub.example"
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def repo_info(self, repo_id, **options):
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    return FakeApi


def test_push_uploads_the_data_set_and_nothing_else(written, hub):
    (written / "secret.txt").write_text("mine")
    publication = push_dataset(written, "me/mine", token="hf_x")
    shards = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    expected = ["README.md", "build_report.json", "samples.png", *shards, "data/val-00000-of-00001.parquet"]
    assert list(publication.files) == expected and publication.left_behind == ["secret.txt"]
    assert publication.files["README.md"] == (written / "README.md").stat().st_size
    assert publication.rows == {"train": 4, "val": 1}
    assert publication.url == "https://hub.example/datasets/me/mine"
    token, create, upload = hub.calls
    assert token == ("token", "hf_x")
    assert create == ("create_repo", "me/mine", {"repo_type": "dataset", "private": False, "exist_ok": True})
    assert upload[1]["allow_patterns"] == expected and upload[1]["folder_path"] == str(written)
    assert upload[1]["repo_type"] == "dataset" and "data/*.parquet" in upload[1]["delete_patterns"]


def test_a_dry_run_asks_nobody_and_shows_the_tree(written, hub):
    text = push_dataset(written, "me/mine", dry_run=True).to_text()
    assert hub.calls == []
    assert "data/train-00001-of-00002.parquet" in text and "in all" in text and "rows: train 4, val 1" in text


def test_uncompressed_run_lengths_are_stored_as_others(tmp_path):
    plain = {"size": [8, 12], "counts": [3, 8, 85]}  # down the columns of 8: 3 of background, 8 of the mask
    rows = [row(0, masks=[plain], ignore=plain), row(1, masks=[plain | {"counts": [3, 8, 84]}])]
    report = BuildReport()
    folder = write_dataset(rows, tmp_path / "out", report).folder
    assert [problem["kind"] for problem in report.problems] == ["bad_annotation"]
    (stored,) = load(folder, tmp_path, split="train")
    mask = np.zeros(96, dtype=bool)
    mask[3:11] = True
    assert stored["masks"] == [stored["ignore"]] == [encode_mask(mask.reshape(12, 8).T)]


def test_push_of_rows_and_by_name_alone(hub, tmp_path):
    publication = push_dataset({"val": [row(0)]}, "mine")
    assert publication.rows == {"val": 1} and publication.url.endswith("/datasets/me/mine")


def test_private_never_becomes_public(written, hub, monkeypatch):
    with pytest.raises(ValueError, match="exists and is public"):
        push_dataset(written, "me/mine", private=True)
    assert [call[0] for call in hub.calls] == ["token", "create_repo"]
    monkeypatch.setattr(FakeApi, "is_private", True)
    push_dataset(written, "me/mine", private=True)
    assert hub.calls[-1][0] == "upload_folder" and hub.calls[-2][2]["private"]


def _replace_first_image(path: Path, content: bytes) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["image"]["bytes"] = content
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "data/train-00000-of-00002.parquet").unlink(), r"shards \[0\] of the 2 of split 'train'"),
        (lambda f: (f / "data/train-00001-of-00002.parquet").write_bytes(b"PAR1"), "train-00001.*no complete Parquet"),
        (lambda f: (f / "data/val-00000-of-00001.parquet").rename(f / "data/x.parquet"), "x.parquet is no shard"),
        (lambda f: (f / "data/val-00000-of-00001.parquet").rename(f / "data/train-00000-of-00003.parquet"), "several"),
        (lambda f: (f / "README.md").unlink(), "no README.md"),
        (lambda f: (f / "README.md").write_text("# Mine\n"), "README.md does not state the splits"),
        (lambda f: _replace_first_image(f / "data/train-00001-of-00002.parquet", b"no"), r"\(s2\) cannot be read"),
        (lambda f: _replace_first_image(f / "data/train-00001-of-00002.parquet", png(0, (5, 5))), "mask 0 is"),
        (lambda f: pq.write_table(pq.read_table(f / "data/val-00000-of-00001.parquet").drop(["kind"]),
                                  f / "data/val-00000-of-00001.parquet"), "not in the row schema"),
        (lambda f: pq.write_table(pq.read_table(f / "data/train-00000-of-00002.parquet")[:1],
                                  f / "data/train-00000-of-00002.parquet"), "promises .*4.* hold .*3"),
        (lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("data/val-*", "data/train-*")),
         "load_dataset"),
    ],
)  # fmt: skip
def test_a_damaged_data_set_is_not_published(written, hub, damage, message):
    damage(written)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_dataset(written, "me/mine")
    assert hub.calls == []


def test_wrong_names_are_refused(written, hub, tmp_path):
    with pytest.raises(ValueError, match="a//b"):
        push_dataset(written, "a//b")
    with pytest.raises(FileNotFoundError, match="no folder"):
        push_dataset(tmp_path / "nowhere", "me/mine")
    with pytest.raises(FileNotFoundError, match="holds no data/"):
        push_dataset(tmp_path, "me/mine")
    assert hub.calls == []


@pytest.mark.skipif(
    not (SAMPLES / "refcoco").is_dir(), reason="no samples; set SEGCOMPASS_SAMPLES_DIR to the folder with refcoco/"
)
def test_real_photographs_are_their_files(tmp_path):
    from segcompass_hf.data import build_grefcoco

    report = BuildReport()
    built = build_grefcoco(SAMPLES, SAMPLES / "images", split="train", report=report)
    written = write_dataset({"train": built}, tmp_path / "real", report)
    rows = pq.read_table(next((written.folder / "data").iterdir())).to_pylist()
    assert len(rows) == report.num_rows and written.statistics["train"].objects[0] > 0
    for got in rows:
        assert got["image"]["bytes"] == (SAMPLES / "images" / got["image"]["path"]).read_bytes()
    distinct = {got["image"]["path"]: len(got["image"]["bytes"]) for got in rows}
    assert len(distinct) < len(rows) and written.statistics["train"].bytes_on_disk < 1.2 * sum(distinct.values())
    assert push_dataset is publish.push_dataset
    assert publish.check_written_dataset(written.folder).rows == {"train": len(rows)}


def test_links_out_of_the_folder_are_not_published(written, tmp_path):
    (tmp_path / "private").write_text("mine")
    (written / "LICENSE").symlink_to("../private")
    with pytest.raises(ValueError, match="^'LICENSE' is a link out of"):
        push_dataset(written, "me/mine", dry_run=True)
    (written / "LICENSE").unlink()
    shard = sorted((written / "data").iterdir())[0]
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"^'data/{shard.name}' is a link out of"):
        push_dataset(written, "me/mine", dry_run=True)


def test_keys_and_folders_are_not_published(written, tmp_path):
    (written / "build_report.json").write_text('{"train": {"problems": [{"where": "/home/me/x.png"}]}}')
    with pytest.raises(ValueError, match="build_report.json, line 1, .*'/home/me'"):
        push_dataset(written, "me/mine", dry_run=True)
    token = "hf_" + "aB3" * 11
    folder = write_dataset([row(0), row(1, instruction=f"use {token}")], tmp_path / "other").folder
    with pytest.raises(ValueError, match="column instruction, row group 0, line 2, .*a Hugging Face token"):
        push_dataset(folder, "me/mine", dry_run=True)
    folder = write_dataset([row(0, sample_id="/home/me/x.png")], tmp_path / "third").folder
    with pytest.raises(ValueError, match="column sample_id, row group 0, line 1, .*'/home/me'"):
        push_dataset(folder, "me/mine", dry_run=True)
    folder = write_dataset([row(0, instruction="what is in /home/me?")], tmp_path / "fourth").folder
    assert push_dataset(folder, "me/mine", dry_run=True).rows == {"train": 1}
