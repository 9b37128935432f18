# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""COCO-style annotations: categories as instructions, crowd regions, absent categories, broken files."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest
from PIL import Image
from places import SAMPLES
from refer_files import annotation, image, square

from segcompass_hf.data import BuildReport, build_coco
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, row_features

CROWD = {"size": [30, 40], "counts": [600, 10, 590]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def content() -> dict:
    """Two images, of which the first has two dogs, a cat and a crowd of cats, and the second only a crowd of dogs."""
    return {
        "images": [image(9), image(25)],
        "annotations": [
            annotation(901, 9, square(2, 3, 5), category_id=1),
            annotation(902, 9, square(20, 3, 6), category_id=1),
            annotation(903, 9, square(30, 15, 4), category_id=2),
            annotation(904, 9, CROWD, category_id=2, iscrowd=1),
            annotation(2500, 25, CROWD, category_id=1, iscrowd=1),
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 5, "name": "traffic light"}],
    }


def build(root: Path, content: dict, **kwargs):
    (root / "images").mkdir(exist_ok=True)
    for entry in content["images"]:
        if isinstance(entry, dict) and "file_name" in entry:
            path = root / "images" / entry["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(path)
    (root / "instances.json").write_text(json.dumps(content))
    report = BuildReport()
    return build_coco(root / "instances.json", root / "images", report=report, **kwargs), report


def test_one_sample_per_image_and_category(tmp_path):
    dataset, report = build(tmp_path, content(), instruction="every {category}", split="val")
    assert dataset.features == row_features() and report.counts == {}
    dogs, cat = dataset
    assert dataset["instruction"][:] == ["every dog", "every cat"]
    assert dataset["sample_id"][:] == ["coco-val-9-1", "coco-val-9-2"]
    assert [decode_mask(rle).sum() for rle in dogs["masks"]] == [25, 36] and dogs["instance_ids"] == [901, 902]
    assert [decode_mask(rle).sum() for rle in dogs["distractor_masks"]] == [16] and dogs["ignore"] is None
    assert [decode_mask(rle).sum() for rle in cat["masks"]] == [16] and len(cat["distractor_masks"]) == 2
    assert decode_mask(cat["ignore"]).sum() == 10  # the crowd of cats
    assert dict(report.left_out) == {"crowd regions only": 1}
    assert dataset["kind"][:] == ["multi", "single"] and set(dataset["source"]) == {"coco"}
    assert dogs["image"].size == (40, 30) and dogs["image_id"] == "9" and not dogs["is_reasoning"]
    check_row(cat)


def test_absent_categories(tmp_path):
    dataset, report = build(tmp_path, content(), num_absent=1)
    absent = [row for row in dataset if row["kind"] == "none"]
    assert absent[0]["instruction"] == "traffic light" and absent[0]["masks"] == []
    assert len(absent[0]["distractor_masks"]) == 3 and absent[0]["sample_id"] == "coco-train-9-5"
    assert absent[1]["image_id"] == "25" and absent[1]["instruction"] in ("cat", "traffic light")  # a dog is there
    more, _ = build(tmp_path, content(), num_absent=10)
    assert sorted(row["instruction"] for row in more if row["kind"] == "none") == [
        "cat", "traffic light", "traffic light"
    ]  # fmt: skip
    shuffled = content()
    shuffled["images"].reverse()
    again, _ = build(tmp_path, shuffled, num_absent=1)
    assert set(again["sample_id"]) == set(dataset["sample_id"])  # chosen for every image on its own
    twins = content()
    twins["categories"].append({"id": 6, "name": "cat"})
    dataset, _ = build(tmp_path, twins, num_absent=10)
    assert "coco-train-9-6" not in dataset["sample_id"]


def test_chosen_categories(tmp_path):
    dataset, _ = build(tmp_path, content(), categories=["cat"], num_absent=1)
    assert dataset["sample_id"][:] == ["coco-train-9-2", "coco-train-25-2"]
    with pytest.raises(ValueError, match="no category bird; there are dog, cat, traffic light"):
        build(tmp_path, content(), categories=["cat", "bird"])
    with pytest.raises(ValueError, match="expected a collection of names"):
        build(tmp_path, content(), categories="cat")


def test_images_in_folders(tmp_path):
    folders = content()
    folders["images"][0]["file_name"] = "day/0001.jpg"
    folders["images"][1] = image(25) | {"file_name": "night/0001.jpg"}
    dataset, _ = build(tmp_path, folders, num_absent=1)
    images = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    assert {os.path.relpath(entry["path"], tmp_path) for entry in images} == {
        "images/day/0001.jpg", "images/night/0001.jpg"
    }  # fmt: skip
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "images" / "day" / "0001.jpg").read_bytes())
    folders["images"][0]["file_name"] = "../secret.jpg"
    folders["images"].pop()
    with pytest.raises(ValueError, match="outside_folder x 2 .*secret.jpg' lies outside of .*images' and would"):
        build(tmp_path, folders)
    dataset, _ = build(tmp_path, folders, allow_outside=True)
    (entry, _) = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    assert entry["path"] == str(tmp_path / "secret.jpg")


def changed(key: str, place: int, **fields) -> dict:
    files = content()
    files[key][place] |= fields
    return files


@pytest.mark.parametrize(
    ("files", "kind", "lost", "message"),
    [
        (changed("annotations", 0, segmentation=[]), "empty_mask", 1, "annotation 901: there is no polygon"),
        (changed("annotations", 0, segmentation={"size": [3, 4], "counts": [12]}), "wrong_size", 1, "RLE is .3, 4."),
        (changed("annotations", 0, category_id=7), "bad_annotation", 1, "category 7, which is not in categories"),
        (changed("annotations", 0, category_id=[7]), "bad_annotation", 1, r"category \[7\], which is not in"),
        (changed("annotations", 0, id=2**64), "bad_annotation", 1, "is not an integer of 64 bits"),
        (changed("annotations", 0, image_id=77), "bad_annotation", 0, "there is no image 77"),
        (changed("annotations", 1, id=901), "duplicate_id", 0, "the id appears again at 1"),
        (changed("images", 0, height=None), "bad_annotation", 2, "height None and width 40"),
        (changed("images", 0, height=31), "wrong_size", 2, r"is \(30, 40\) but its annotations are for \(31, 40\)"),
        (changed("categories", 2, id=1), "duplicate_id", 0, "the id appears again at 2"),
        (changed("categories", 2, name=None), "bad_annotation", 0, "no integer id or no name"),
    ],
)  # fmt: skip
def test_broken_entries_are_counted_and_named(tmp_path, files, kind, lost, message):
    files["annotations"].append(annotation(2501, 25, square(1, 1, 3), category_id=2))
    dataset, report = build(tmp_path, files)
    assert dataset["sample_id"][-1] == "coco-train-25-2" and report.num_lost == lost
    assert report.problems[0]["kind"] == kind
    assert any(re.search(message, problem["detail"]) for problem in report.problems)


@pytest.mark.parametrize(
    ("files", "kwargs", "message"),
    [
        (content(), {"instruction": "the {name}"}, "must have {category}"),
        (content(), {"num_absent": -1}, "num_absent is -1"),
        (content() | {"categories": []}, {}, "no list categories with an id and a name"),
        (content() | {"annotations": None}, {}, "is no COCO annotation file"),
        (content() | {"annotations": []}, {}, "coco-train has no row that can be used: 0 rows"),
    ],
)
def test_wrong_arguments_and_files(tmp_path, files, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, files, **kwargs)


def test_missing_files(tmp_path):
    build(tmp_path, content())
    with pytest.raises(FileNotFoundError, match="no file .*none.json.* holds cache/, images/, instances.json"):
        build_coco(tmp_path / "none.json", tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="images_dir: there is no folder"):
        build_coco(tmp_path / "instances.json", tmp_path / "nowhere")
    text = (tmp_path / "instances.json").read_text()
    (tmp_path / "instances.json").write_text(text[:-9])
    with pytest.raises(ValueError, match="is no complete json .* cut short"):
        build_coco(tmp_path / "instances.json", tmp_path / "images")


@pytest.mark.skipif(not (SAMPLES / "refcoco").is_dir(), reason="no real samples; set SEGCOMPASS_SAMPLES_DIR")
def test_real_annotations():
    """Eight photographs; every annotated object is a target in exactly one sample."""
    path = SAMPLES / "refcoco" / "instances.json"
    entries = json.loads(path.read_text())
    report = BuildReport()
    dataset = build_coco(path, SAMPLES / "images", report=report)
    targets = [number for numbers in dataset["instance_ids"] for number in numbers]
    assert report.counts == {} and sorted(targets) == sorted(entry["id"] for entry in entries["annotations"])
    pairs = {(entry["image_id"], entry["category_id"]) for entry in entries["annotations"]}
    assert len(dataset) == len(pairs) and set(dataset["kind"]) == {"single", "multi"}
    for row in dataset:
        check_row(row)


def test_objects_are_not_lost_for_their_ids(tmp_path):
    """Home-made files count from 1 in every image, or leave ids out; nothing refers to them."""
    files = content()
    one, two = files["annotations"][:2]
    nameless = annotation(0, 25, square(2, 3, 5), category_id=1)
    del nameless["id"]
    one, two, cat = one | {"id": 1}, two | {"id": 1}, annotation(1, 25, square(9, 9, 5), category_id=2)
    files["annotations"] = [one, two, nameless, cat, dict(one)]  # the same once more is the same
    dataset, report = build(tmp_path, files, num_absent=3)
    rows = {(row["image_id"], row["instruction"]): row for row in dataset}
    assert {key: len(row["masks"]) for key, row in rows.items()} == {
        ("9", "dog"): 2,
        ("9", "cat"): 0,
        ("9", "traffic light"): 0,
        ("25", "dog"): 1,
        ("25", "cat"): 1,
        ("25", "traffic light"): 0,
    }
    numbers = [number for row in dataset for number in row["instance_ids"]]
    assert len(set(numbers)) == len(numbers) == 4
    assert report.counts == {"duplicate_id": 3, "bad_annotation": 1} and report.num_lost == 0


def cups(**fields) -> dict:
    """One image with a cup, a category that is not on it, and its entries' fields by list."""
    entry = image(1) | {"file_name": "a.jpg"}
    files = {
        "images": [entry],
        "annotations": [annotation(1, 1, square(2, 3, 5), category_id=1)],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
    }
    for key, change in fields.items():
        files[key][0] |= change
    return files


def answers(dataset) -> list[tuple[str, int]]:
    return [(row["instruction"], len(row["masks"])) for row in dataset]


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": {"image_id": "1"}},
        {"annotations": {"image_id": 1.0}},
        {"images": {"id": "1"}},
        {"images": {"id": "5f3a"}, "annotations": {"image_id": "5f3a"}},
        {"images": {"id": {"$oid": "5f3a"}}, "annotations": {"image_id": " 5f3a"}},
        {"annotations": {"category_id": "1"}},
        {"annotations": {"category_id": 1.0}},
        {"categories": {"id": "1"}},
        {"categories": {"id": "c0ffee"}, "annotations": {"category_id": "c0ffee"}},
        {"annotations": {"id": "1", "iscrowd": False}},
        {"annotations": {"iscrowd": "0"}},
        {"annotations": {"iscrowd": "false"}},
        {"annotations": {"iscrowd": 0.0}},
        {"annotations": {"iscrowd": None}},
        {"images": {"height": 30.0, "width": "40"}},
        {"images": {"height": None, "width": None}},
        {"images": {"file_name": None, "coco_url": "http://images.cocodataset.org/val2017/a.jpg"}},
        {"images": {"file_name": "https://some.where/data/a.jpg?version=2"}},
        {"images": {"file_name": "C:\\Users\\me\\images\\a.jpg"}},
        {"images": {"file_name": "/data/a.jpg"}},
        {"images": {"file_name": "./a.jpg"}},
        {"annotations": {"segmentation": [[2, 3], [7, 3], [7, 8], [2, 8]]}},
        {"annotations": {"segmentation": {"size": [30.0, 40.0], "counts": [63.0, 5.0, 1132.0]}}},
    ],
)
def test_one_cup_however_the_file_says_so(tmp_path, changes):
    files = cups(**changes)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(files))
    report = BuildReport()
    dataset = build_coco(tmp_path / "instances.json", tmp_path / "images", report=report, num_absent=5)
    assert answers(dataset) == [("cup", 1), ("dog", 0)] and report.counts == {}
    assert decode_mask(dataset[0]["masks"][0])[3, 2] and dataset["instance_ids"][0] == [1]


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"annotations": {"image_id": None}}, ["dog"]),  # a cup that may be on any image
        ({"annotations": {"image_id": "a.jpg"}}, ["dog"]),
        ({"annotations": {"image_id": float("inf")}}, ["dog"]),
        ({"annotations": {"image_id": 7}}, ["cup", "dog"]),  # on an image that is not of this file
        ({"annotations": {"image_id": None, "category_id": None}}, []),
        ({"annotations": {"category_id": None}}, []),  # anything may be on this image
        ({"annotations": {"category_id": 7}}, []),
        ({"annotations": {"category_id": float("nan")}}, []),
        ({"annotations": {"segmentation": []}}, ["dog"]),
        ({"annotations": {"iscrowd": "perhaps"}}, ["dog"]),
        ({"annotations": {"iscrowd": "true"}}, ["dog"]),
        ({"annotations": {"ignore": 1}}, ["dog"]),
        ({"categories": {"id": None}}, []),
        ({"categories": {"name": " "}}, []),
    ],
)
def test_what_is_dropped_is_not_absent(tmp_path, changes, absent):
    files = cups(**changes)
    files["images"].append(image(9))
    files["annotations"].append(annotation(2, 9, square(2, 3, 5), category_id=2))
    dataset, report = build(tmp_path, files, num_absent=5)
    assert [row["instruction"] for row in dataset if row["image_id"] == "1" and not row["masks"]] == absent
    assert not any(row["masks"] for row in dataset if row["image_id"] == "1")
    assert report.counts or dict(report.left_out) == {"crowd regions only": 1}


@pytest.mark.parametrize("twin", ["cup", "Cup ", "CUP", "cup\n"])
def test_categories_of_one_name_are_one(tmp_path, twin):
    files = cups()
    files["categories"].append({"id": 3, "name": twin})
    files["annotations"].append(annotation(2, 1, square(20, 3, 6), category_id=3))
    dataset, report = build(tmp_path, files, num_absent=5)
    assert answers(dataset) == [("cup", 2), ("dog", 0)] and report.counts == {}
    assert dataset[0]["distractor_masks"] == [] and dataset["sample_id"][0] == "coco-train-1-1"
    files["annotations"].pop(0)
    dataset, _ = build(tmp_path, files, num_absent=5, categories=["Cup"])
    assert answers(dataset) == [("cup", 1)]


def two_named(*names: str) -> dict:
    files = cups()
    files["images"] = [image(place + 1) | {"file_name": name} for place, name in enumerate(names)]
    files["annotations"] = [annotation(place + 1, place + 1, square(2, 3, 5)) for place in range(len(names))]
    return files


def found(root: Path, files: dict, *present: str) -> list[str | None]:
    """File of each image, in the folder `images`, of which only `present` are there."""
    for place, name in enumerate(present):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (60 * place, 0, 0)).save(path)
    (root / "instances.json").write_text(json.dumps(files))
    report = BuildReport()
    dataset = build_coco(root / "instances.json", root / "images", report=report)
    rows = dataset.cast_column("image", datasets.Image(decode=False))
    paths = {row["image_id"]: os.path.relpath(row["image"]["path"], root / "images") for row in rows}
    return [paths.get(str(entry["id"])) for entry in files["images"]]


@pytest.mark.parametrize(
    ("names", "present", "expected"),
    [
        (["000000000002.jpg", "000000000003.jpg"], ["000000000002.jpg"], ["000000000002.jpg", None]),
        (["a/x.jpg", "b/x.jpg"], ["a/x.jpg", "b/x.jpg"], ["a/x.jpg", "b/x.jpg"]),
        (["a/x.jpg", "b/x.jpg", "c.jpg"], ["x.jpg", "c.jpg"], [None, None, "c.jpg"]),
        (["a/x.jpg", "b/y.jpg"], ["x.jpg", "y.jpg"], ["x.jpg", "y.jpg"]),
        (["a\\x.jpg", "b\\x.jpg"], ["a/x.jpg", "b/x.jpg"], ["a/x.jpg", "b/x.jpg"]),
        (["a\\x%20y.jpg", "b/x y.jpg", "c.jpg"], ["x y.jpg", "c.jpg"], [None, None, "c.jpg"]),
        (["my%20dog.jpg", "my cat.jpg"], ["my dog.jpg", "my%20cat.jpg"], ["my dog.jpg", "my%20cat.jpg"]),
        (["my%20dog.jpg", "my dog.jpg"], ["my%20dog.jpg", "my dog.jpg"], ["my%20dog.jpg", "my dog.jpg"]),
        (["x.jpg", "images/x.jpg"], ["images/x.jpg"], [None, "images/x.jpg"]),
        (["x.jpg", "y.jpg"], ["train2017/x.jpg", "val2017/x.jpg", "y.jpg"], [None, "y.jpg"]),
        (["x.jpg", "y.jpg"], ["train2017/x.jpg", "y.jpg"], ["train2017/x.jpg", "y.jpg"]),
        (["COCO_val2014_000000000139.jpg", "000000000142.jpg"],
         ["000000000139.jpg", "COCO_train2014_000000000142.jpg"],
         ["000000000139.jpg", "COCO_train2014_000000000142.jpg"]),
        (["COCO_train2014_000000000139.jpg", "000000000139.jpg"], ["000000000139.jpg"], [None, "000000000139.jpg"]),
    ],
)  # fmt: skip
def test_no_image_takes_the_photograph_of_another(tmp_path, names, present, expected):
    assert found(tmp_path, two_named(*names), *present) == expected


def test_an_image_without_a_name_has_no_photograph(tmp_path):
    files = two_named("000000000002.jpg", "b.jpg")
    del files["images"][1]["file_name"]
    assert found(tmp_path, files, "000000000002.jpg") == ["000000000002.jpg", None]


def test_one_id_of_two_photographs_is_of_neither(tmp_path):
    files = two_named("a.jpg", "b.jpg", "c.jpg")
    files["images"][1]["id"] = "1"
    dataset, report = build(tmp_path, files | {"annotations": files["annotations"][::2]})
    assert dataset["image_id"][:] == ["3"] and report.counts == {"duplicate_id": 1} and report.num_lost == 1
    assert "image 1 is a.jpg and b.jpg" in report.problems[0]["detail"]


def test_photographs_behind_links_are_left_out_unless_allowed(tmp_path):
    files = two_named("a.jpg", "b.jpg")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "private.jpg")
    (tmp_path / "images" / "b.jpg").symlink_to(tmp_path / "private.jpg")
    assert found(tmp_path, files, "a.jpg") == ["a.jpg", None]
    dataset = build_coco(tmp_path / "instances.json", tmp_path / "images", allow_outside=True)
    assert len(dataset) == 2


def test_a_supercategory_is_not_absent_beside_its_own(tmp_path):
    """Roboflow lists the project as a category above all others; no object has it."""
    files = content() | {"categories": [
        {"id": 0, "name": "Pets", "supercategory": "none"}, {"id": 1, "name": "dog", "supercategory": "mammals"},
        {"id": 2, "name": "cat", "supercategory": "mammals"}, {"id": 3, "name": "mammals", "supercategory": "pets"},
        {"id": 5, "name": "tree", "supercategory": ["none"]},
    ]}  # fmt: skip
    dataset, _ = build(tmp_path, files, num_absent=5)
    absent = [(row["image_id"], row["instruction"]) for row in dataset if row["kind"] == "none"]
    assert absent == [("9", "tree"), ("25", "cat"), ("25", "tree")]


def test_lists_of_lvis_say_what_is_absent_and_what_is_incomplete(tmp_path):
    files = content()
    files["images"][0] |= {"not_exhaustive_category_ids": [2], "neg_category_ids": [5]}
    files["images"][1] |= {"not_exhaustive_category_ids": [], "neg_category_ids": []}
    dataset, report = build(tmp_path, files, num_absent=5)
    assert dataset["instruction"][:] == ["dog", "traffic light"]  # not the cats: some have no annotation
    assert report.left_out == {"not all objects annotated": 1, "crowd regions only": 1} and report.counts == {}


def test_one_photograph_of_two_ids_is_one_image(tmp_path):
    """As files of two annotators are merged: one drew the dog, the other the cat and the same dog again."""
    files = content() | {"images": [image(9), image(9) | {"id": 10}]}
    files["annotations"] = [
        annotation(1, 9, square(2, 3, 5), category_id=1), annotation(1, 10, square(30, 15, 4), category_id=2),
        annotation(2, 10, square(2, 3, 5), category_id=1), annotation(3, 10, square(20, 3, 6), category_id=1),
    ]  # fmt: skip
    dataset, report = build(tmp_path, files, num_absent=5)
    assert dataset["instruction"][:] == ["dog", "cat", "traffic light"] and set(dataset["image_id"]) == {"9"}
    areas = [[int(decode_mask(rle).sum()) for rle in masks] for masks in dataset["masks"]]
    assert areas == [[25, 36], [16], []] and report.counts == {"duplicate_id": 3} and report.num_lost == 0
    files["images"].append(image(25))
    files["annotations"].append(annotation(9, 25, category_id=1))
    for difference in ({"height": 60, "width": 80}, {"coco_url": "http://a/other/9.jpg"}):
        changed = files | {"images": [image(9), files["images"][1] | difference, image(25)]}
        dataset, report = build(tmp_path, changed)
        lost = [problem["detail"] for problem in report.problems if problem["lost"]]
        assert dataset["image_id"][:] == ["25"] and all("is image 9 and 10, of other height" in one for one in lost)


def test_names_of_images_as_tools_write_them(tmp_path):
    """COCO Annotator has the folders in `path` only, Label Studio addresses of its own."""
    files = two_named("x.jpg", "x.jpg", "/data/local-files/?d=c/x.jpg", "http://a:8080/data/local-files/?d=my%20y.jpg")
    files["images"][0]["path"], files["images"][1]["path"] = "/datasets/a/x.jpg", "/datasets/b/x.jpg"
    present = ["a/x.jpg", "b/x.jpg", "c/x.jpg", "my y.jpg"]
    assert found(tmp_path, files, *present) == present


@pytest.mark.parametrize("side", [None, 0, 0.0])
def test_sizes_that_are_not_known_are_those_of_the_photographs(tmp_path, side):
    files = content()
    (tmp_path / "images").mkdir()
    files["images"][0] |= {"height": side, "width": side}
    dataset, report = build(tmp_path, files)
    assert len(dataset) == 2 and report.counts == {}
