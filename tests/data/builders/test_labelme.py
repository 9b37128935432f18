# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""LabelMe's files: labels as instructions, every form of shape, photographs wherever they lie, broken files named."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from segcompass_hf.data import BuildReport, build_labelme
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, decode_masks, row_features
from segcompass_hf.evaluation.datasets_spec import load_dataset_of

HEIGHT, WIDTH = 20, 30


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def square(label: str, x: int, y: int, side: int, **fields) -> dict:
    """A polygon of `(side + 1) ** 2` pixels whose first is (x, y): outlines count."""
    return {"label": label, "points": [[x, y], [x + side, y], [x + side, y + side], [x, y + side]], **fields}


def write(root: Path, name: str, shapes: list, image: str | None = None, **content) -> None:
    """A json, and the photograph beside it unless it is said to lie elsewhere."""
    file = root / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    photograph = root / image if image else file.with_suffix(".jpg")
    photograph.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(photograph)
    stated = {"imagePath": file.with_suffix(".jpg").name, "imageHeight": HEIGHT, "imageWidth": WIDTH}
    file.write_text(json.dumps({"shapes": shapes, "imageData": None} | stated | content))


def build(root: Path, **kwargs):
    report = BuildReport()
    return build_labelme(root, report=report, **kwargs), report


def areas(rles: list) -> list[int]:
    return [int(decode_mask(rle).sum()) for rle in rles]


def test_one_sample_per_photograph_and_label(tmp_path):
    write(tmp_path / "in", "a", [square("dog", 1, 1, 2), square("cat", 10, 1, 4), square("Dog ", 20, 1, 3)])
    write(tmp_path / "in", "day/b", [square("cat", 1, 1, 1)])
    dataset, report = build(tmp_path / "in", instruction="every {category}", split="val", num_absent=5)
    assert dataset.features == row_features() and report.problems == []
    rows = {(row["image_id"], row["instruction"]): row for row in dataset}
    assert set(rows) == {
        ("a.jpg", "every Dog"),
        ("a.jpg", "every cat"),
        ("day/b.jpg", "every Dog"),
        ("day/b.jpg", "every cat"),
    }
    dogs = rows["a.jpg", "every Dog"]
    assert areas(dogs["masks"]) == [9, 16] and areas(dogs["distractor_masks"]) == [25] and dogs["kind"] == "multi"
    absent = rows["day/b.jpg", "every Dog"]
    assert absent["masks"] == [] and areas(absent["distractor_masks"]) == [4] and absent["kind"] == "none"
    assert dogs["sample_id"] == "labelme-val-a.jpg-Dog" and set(dataset["source"]) == {"labelme"}
    check_row(dogs)


def test_groups_and_forms_of_shapes(tmp_path):
    box = {"label": "box", "shape_type": "rectangle", "points": [[3, 4], [6, 8]]}
    ball = {"label": "ball", "shape_type": "circle", "points": [[20, 10], [20, 13]]}
    parts = [
        square("dog", 1, 1, 2, group_id=1),
        square("dog", 10, 10, 2, group_id=1),
        square("dog", 25, 1, 1, group_id=2),
    ]
    write(tmp_path / "in", "a", [*parts, box, ball, square("cat", 1, 15, 1, group_id=1)])
    rows = {row["instruction"]: row for row in build(tmp_path / "in")[0]}
    assert areas(rows["dog"]["masks"]) == [9 + 9, 4] and areas(rows["cat"]["masks"]) == [4]
    drawn = np.zeros((HEIGHT, WIDTH), dtype=bool)
    drawn[4:9, 3:7] = True
    assert np.array_equal(decode_masks(rows["box"]["masks"], (HEIGHT, WIDTH))[0], drawn)
    (circle,) = decode_masks(rows["ball"]["masks"], (HEIGHT, WIDTH))
    assert circle[10, 17:24].all() and not circle[10, [16, 24]].any() and not circle[7, 17]


def test_what_cannot_be_used_is_named(tmp_path):
    line = {"label": "rope", "shape_type": "line", "points": [[1, 1], [5, 5]]}
    outside = square("bird", 100, 100, 5)
    write(tmp_path / "in", "a", [square("dog", 1, 1, 2), line, {"points": [[1, 1], [2, 2], [3, 1]]}, outside])
    (tmp_path / "in" / "broken.json").write_text("{")
    (tmp_path / "in" / "settings.json").write_text('{"version": 1}')
    dataset, report = build(tmp_path / "in", num_absent=1)
    (dog,) = dataset  # nothing is called absent where a shape has no label
    assert dog["instruction"] == "dog" and areas(dog["distractor_masks"]) == [4]  # the triangle without a label
    lost = {problem["where"]: problem for problem in report.problems if problem["lost"]}
    assert lost["broken.json"]["kind"] == "bad_json" and "shapes" in lost["settings.json"]["detail"]
    assert "a.json shape 1: shape 1 is a 'line' of 2 points" in lost["labelme-train-a.jpg-rope"]["detail"]
    assert "a.json shape 2 has the category None" in lost["labelme-train-a.jpg-None"]["detail"]
    assert "is it of another image" in lost["labelme-train-a.jpg-bird"]["detail"] and len(lost) == 5


@pytest.mark.parametrize(
    "image, stated",
    [
        ("photos/a.jpg", "../photos/a.jpg"),
        ("photos/a.jpg", "..\\photos\\a.jpg"),
        ("json/a.jpg", "C:\\Users\\me\\a.jpg"),
        ("json/a.jpg", "/home/somebody/a.jpg"),
        ("images/a.jpg", "a.jpg"),
    ],
)
def test_photographs_are_found(tmp_path, image, stated):
    write(tmp_path / "in", "json/a", [square("dog", 1, 1, 2)], image=image, imagePath=stated)
    (row,) = build(tmp_path / "in")[0].cast_column("image", datasets.Image(decode=False))
    assert os.path.relpath(row["image"]["path"], tmp_path / "in") == image


def test_photographs_outside_are_left_out_unless_allowed(tmp_path):
    write(tmp_path / "in", "b", [square("dog", 1, 1, 2)])
    write(tmp_path / "in", "a", [square("dog", 1, 1, 2)], image="../secret.jpg", imagePath="../secret.jpg")
    dataset, report = build(tmp_path / "in")
    assert dataset["image_id"][:] == ["b.jpg"] and report.counts == {"outside_folder": 1}
    assert len(build(tmp_path / "in", allow_outside=True)[0]) == 2


def test_photographs_of_another_size_are_named(tmp_path):
    write(tmp_path / "in", "a", [square("dog", 1, 1, 2)], imageHeight=HEIGHT + 1)
    write(tmp_path / "in", "b", [square("dog", 1, 1, 2)])
    dataset, report = build(tmp_path / "in")
    assert dataset["image_id"][:] == ["b.jpg"] and report.counts == {"wrong_size": 1}


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="LabelMe: there is no folder"):
        build_labelme(tmp_path / "none")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"LabelMe: no json in .* has a labelled shape; .* holds a.json\..* bad_annotation x 1"
    ):
        build_labelme(tmp_path)
    with pytest.raises(ValueError, match="it must have {category}"):
        build_labelme(tmp_path, instruction="dog")


def test_specification(tmp_path):
    write(
        tmp_path / "drawn", "a", [square("dog", 1, 1, 2), {"label": "rope", "shape_type": "point", "points": [[1, 1]]}]
    )
    named = load_dataset_of(f"labelme:{tmp_path / 'drawn'}")
    assert (named.name, named.kind, len(named.dataset), named.report.num_lost) == ("drawn", "labelme", 1, 1)
