# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""YOLO's label files: corners as shares of the sides, where files lie, and a name for everything that is no mask."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from segcompass_hf.data import BuildReport, build_yolo
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, decode_masks, row_features
from segcompass_hf.evaluation.datasets_spec import DatasetSpecError, load_dataset_of

HEIGHT, WIDTH = 20, 40
# The left half, the right upper quarter, and the right lower one.
LEFT, UPPER, LOWER = "0 0 0.5 0 0.5 1 0 1", "0.5 0 1 0 1 0.5 0.5 0.5", "0.5 0.5 1 0.5 1 1 0.5 1"
YAML = "train: images/train\nval: images/val\nnames: {0: dog, 1: cat, 7: traffic light}\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(root: Path, image: str, lines: list[str] | None = None, labels: str | None = None) -> None:
    """A photograph and, where there are lines, its label file, by default in `labels/` as YOLO has it."""
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / image)
    if lines is not None:
        file = root / (labels or image.replace("images/", "labels/").replace(".png", ".txt"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")


def build(root: Path, text: str = YAML, **kwargs):
    (root / "data.yaml").write_text(text)
    report = BuildReport()
    return build_yolo(root / "data.yaml", report=report, **kwargs), report


def test_one_sample_per_photograph_and_class(tmp_path):
    root = tmp_path / "in"
    write(root, "images/train/a.png", [f"0 {LEFT}", f"1 {UPPER}", "", f"0 {LOWER}"])
    write(root, "images/train/b.png")  # without a label file there is nothing in it
    write(root, "images/val/c.png", [f"7 {LEFT}"])
    dataset, report = build(root, instruction="every {category}", num_absent=3)
    assert dataset.features == row_features() and report.problems == []
    rows = {(Path(row["image_id"]).name, row["instruction"].removeprefix("every ")): row for row in dataset}
    assert set(rows) == {(image, name) for image in ("a.png", "b.png") for name in ("dog", "cat", "traffic light")}
    dogs = rows["a.png", "dog"]
    left, lower = decode_masks(dogs["masks"], (HEIGHT, WIDTH))
    halves = np.zeros((HEIGHT, WIDTH), dtype=bool)
    halves[:, : WIDTH // 2] = True
    quarter = np.zeros((HEIGHT, WIDTH), dtype=bool)
    quarter[HEIGHT // 2 :, WIDTH // 2 :] = True
    assert np.array_equal(left, halves) and np.array_equal(lower, quarter)
    assert [decode_mask(rle).sum() for rle in dogs["distractor_masks"]] == [HEIGHT * WIDTH // 4]
    assert [rows["b.png", name]["kind"] for name in ("dog", "cat")] == ["none", "none"]
    assert dogs["sample_id"] == "yolo-train-images/train/a.png-0" and dogs["source"] == "yolo"
    check_row(dogs)
    assert build(root, split="val")[0]["instruction"][:] == ["traffic light"]


@pytest.mark.parametrize(
    "image, labels, text",
    [
        ("pictures/a.png", "pictures/a.txt", "train: pictures\nnames: [dog]"),
        ("images/a.png", "images/a.txt", "train: [images]\nnames: [dog]"),
        ("train/images/a.png", "train/labels/a.txt", "train: ../train/images\nnames: [dog]"),  # as Roboflow writes it
        ("set/images/a.png", "set/labels/a.txt", "path: set\ntrain: images\nnames: [dog]"),
        ("images/x/images/a.png", "images/x/labels/a.txt", "train: images/x\nnames: [dog]"),
        ("images/a.png", "labels/a.txt", "train: list.txt\nnames: [dog]"),
    ],
)
def test_files_are_found(tmp_path, image, labels, text):
    root = tmp_path / "in"
    write(root, image, [f"0 {LEFT}"], labels)
    (root / "list.txt").write_text("./images/a.png\n")
    (row,) = build(root, text)[0].cast_column("image", datasets.Image(decode=False))
    assert os.path.relpath(row["image"]["path"], root) == image


@pytest.mark.parametrize(
    "line, detail",
    [
        ("0 0.5 0.5 0.2 0.2", "four numbers are a box"),
        ("0 0 0 0.5", "3 numbers enclose nothing"),
        ("0 1 1 30 1 30 15", "corners go from 1 to 30; expected shares"),
        ("0 0 0 nan 0 1 1", "corners go from nan"),
        ("0 0 0 0.5 0 0.5 x", "could not convert string to float"),
        ("0 0 0 0.5 0 0.5 1 0", "7 numbers; x and y come in pairs"),
        ("3 0 0 0.5 0 0.5 1", "labels/train/a.txt line 2 has the category 3"),
        ("dog 0 0 0.5 0 0.5 1", "labels/train/a.txt line 2 has the category None"),
    ],
)
def test_lines_that_are_no_masks_are_named(tmp_path, line, detail):
    """The class of such a line is not asked for in its photograph, where not all of its objects are known."""
    write(tmp_path / "in", "images/train/a.png", [f"1 {UPPER}", line])
    dataset, report = build(tmp_path / "in")
    assert dataset["instruction"][:] == ["cat"]
    assert report.num_lost == 1 and any(detail in problem["detail"] for problem in report.problems)


def test_files_outside_are_left_out_unless_allowed(tmp_path):
    write(tmp_path / "in", "images/train/a.png", [f"0 {LEFT}"])
    write(tmp_path, "images/b.png", [f"0 {LEFT}"])
    text = "train: [images/train, ../images]\nnames: [dog]"
    dataset, report = build(tmp_path / "in", text)
    assert len(dataset) == 1 and report.counts == {"outside_folder": 1}
    assert len(build(tmp_path / "in", text, allow_outside=True)[0]) == 2


def test_label_files_that_are_no_text_lose_their_photograph(tmp_path):
    write(tmp_path / "in", "images/train/a.png", [f"0 {LEFT}"])
    write(tmp_path / "in", "images/train/b.png", [])
    (tmp_path / "in" / "labels" / "train" / "b.txt").write_bytes(b"0 \xff\xfe")
    dataset, report = build(tmp_path / "in", num_absent=3)
    assert {Path(name).name for name in dataset["image_id"]} == {"a.png"} and report.counts == {"bad_annotation": 1}


@pytest.mark.parametrize(
    "text, error",
    [
        ("names: [dog]\nval: images/train", "has no split 'train'; it has val"),
        ("train: images/train", "has no `names`"),
        ("names: [", "is no yaml file"),
        ("names: [dog]\ntrain: nowhere", "holds data.yaml, images/, labels/"),
        ("names: [dog]\ntrain: images/bare", "none of the 1 photographs of split 'train' has a label file"),
    ],
)
def test_what_the_yaml_lacks_is_said(tmp_path, text, error):
    write(tmp_path, "images/train/a.png", [f"0 {LEFT}"])
    write(tmp_path, "images/bare/a.png")
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        build(tmp_path, text)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"YOLO: there is no file .*data.yaml"):
        build_yolo(tmp_path / "data.yaml")


def test_specification(tmp_path):
    write(tmp_path / "mine", "images/val/a.png", [f"0 {LEFT}", "1 0.5 0.5 0.2 0.2"])
    (tmp_path / "mine" / "data.yaml").write_text(YAML)
    named = load_dataset_of(f"yolo:{tmp_path / 'mine' / 'data.yaml'}:val")
    assert (named.name, named.kind, named.split) == ("mine val", "yolo", "val")
    assert len(named.dataset) == 1 and named.report.num_lost == 1
    with pytest.raises(DatasetSpecError, match="expected yolo:DATA.yaml:SPLIT"):
        load_dataset_of(f"yolo:{tmp_path / 'mine' / 'data.yaml'}")
