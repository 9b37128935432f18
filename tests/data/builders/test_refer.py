# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""RefCOCO and its family from the published files: samples, splits, and a name for everything broken."""

import json
import logging
import os
import pickle
import re

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw
from places import SAMPLES
from refer_files import annotation, image, python2_pickle, ref, square, write
from scipy.ndimage import binary_dilation, binary_erosion

from segcompass_hf.data import BuildReport, build_grefcoco, build_refcoco, eval_image_ids
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, decode_masks, encode_mask, row_features

with_samples = pytest.mark.skipif(
    not (SAMPLES / "refcoco").is_dir(),
    reason="no real samples; set SEGCOMPASS_SAMPLES_DIR to the folder that holds refcoco/ and grefcoco/",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def plain(dataset) -> list[dict]:
    """Rows with the path of the image in its place."""
    rows = dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    return [row | {"image": row["image"]["path"]} for row in rows]


def two_images() -> dict:
    """Two photographs with three and one object, three refs with four sentences."""
    return {
        "images": [image(9), image(25)],
        "annotations": [
            annotation(901, 9, square(2, 3, 5)),
            annotation(902, 9, square(20, 3, 6)),
            annotation(903, 9, {"size": [30, 40], "counts": [600, 10, 590]}, iscrowd=1),
            annotation(2500, 25, square(0, 0, 4)),
        ],
        "refs": [
            ref(0, 9, 901, ["the left box", "box one"]),
            ref(1, 9, 902, ["the right box"]),
            ref(2, 25, 2500, ["the corner"], split="val"),
        ],
    }


def build(files: dict, tmp_path, builder=build_refcoco, **kwargs):
    """Dataset and report of written files."""
    name = "grefcoco" if builder is build_grefcoco else kwargs.get("name", "refcoco")
    root, photographs = write(tmp_path, name=name, split_by=kwargs.get("split_by", "unc"), **files)
    report = BuildReport()
    return builder(root, photographs, report=report, **kwargs), report


def test_every_sentence_is_a_sample_in_the_row_schema(tmp_path):
    dataset, report = build(two_images(), tmp_path)
    assert dataset.features == row_features()
    rows = plain(dataset)
    assert [row["instruction"] for row in rows] == ["the left box", "box one", "the right box"]
    assert [row["sample_id"] for row in rows] == [f"refcoco-unc-train-{end}" for end in ("0-0", "0-1", "1-10")]
    first = rows[0]
    assert decode_mask(first["masks"][0]).sum() == 25 and decode_mask(first["distractor_masks"][0]).sum() == 36
    assert len(first["distractor_masks"]) == 1  # the crowd region is no object
    assert {key: first[key] for key in ("image_id", "instance_ids", "source", "split", "kind", "is_reasoning")} == {
        "image_id": "9", "instance_ids": [901], "source": "refcoco", "split": "train", "kind": "single",
        "is_reasoning": False,
    }  # fmt: skip
    assert first["reasoning"] is None and first["ignore"] is None
    assert first["image"] == str(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg")
    assert dataset[0]["image"].size == (40, 30)
    assert (report.num_rows, report.num_lost, report.counts) == (3, 0, {})
    check_row(dataset[2])


def test_building_again_gives_the_same_file_and_a_change_another(tmp_path):
    first, _ = build(two_images(), tmp_path)
    again, _ = build(two_images(), tmp_path)
    assert first.cache_files == again.cache_files and first._fingerprint == again._fingerprint
    changed = two_images()
    changed["refs"][0]["sentences"][0]["sent"] = "the other box"
    other, _ = build(changed, tmp_path)
    assert other[0]["instruction"] == "the other box" and other.cache_files != first.cache_files
    assert {path.suffix for path in (tmp_path / "cache" / "segcompass_hf").iterdir()} == {".arrow"}


@pytest.mark.parametrize(
    ("name", "split_by", "split"),
    [
        ("refcoco", "google", "test"),
        ("refcoco+", "unc", "testA"),
        ("refcocog", "umd", "test"),
        ("refcocog", "google", "val"),
    ],
)
def test_splits_of_the_family(tmp_path, name, split_by, split):
    files = two_images()
    files["refs"][1]["split"] = split
    dataset, _ = build(files, tmp_path, name=name, split_by=split_by, split=split)
    assert "the right box" in dataset["instruction"] and "the left box" not in dataset["instruction"]
    assert set(dataset["source"]) == {name} and set(dataset["split"]) == {split}
    inside = build_refcoco(tmp_path / name, tmp_path / "train2014", name, split_by, split)  # the folder itself
    assert plain(inside) == plain(dataset)


def test_grefcoco_has_none_one_or_several_objects(tmp_path):
    files = two_images()
    files["refs"] = [
        ref(0, 9, [901, 902], ["both boxes"], no_target=False),
        ref(1, 9, [-1], ["the cat"], no_target=True),
        ref(2, 25, [2500], ["the corner"], no_target=False),
        ref(3, 25, [], ["nothing"], no_target=True),
        ref(4, 25, [-1], ["without the flag"]),
        ref(5, 9, [902, 902], ["one object, named twice"], no_target=False),
    ]
    dataset, report = build(files, tmp_path, build_grefcoco)
    rows = plain(dataset)
    assert [row["kind"] for row in rows] == ["multi", "none", "single", "none", "none", "single"]
    assert [row["instance_ids"] for row in rows] == [[901, 902], [], [2500], [], [], [902]]
    assert [len(row["distractor_masks"]) for row in rows] == [0, 2, 0, 1, 1, 1]
    assert [decode_mask(rle).sum() for rle in rows[0]["masks"]] == [25, 36]
    assert set(dataset["source"]) == {"grefcoco"} and report.num_lost == 0
    assert report.counts == {"duplicate_id": 1}  # the object named twice


@pytest.mark.parametrize("place", ["{}", "train2014/{}", "val2017/{}"])
@pytest.mark.parametrize("name", ["COCO_train2014_000000000009.jpg", "000000000009.jpg"])
def test_photographs_are_found_under_their_usual_names(tmp_path, place, name):
    files = two_images()
    write(tmp_path, **files)
    photograph = tmp_path / "photographs" / place.format(name)
    photograph.parent.mkdir(parents=True)
    (tmp_path / "train2014" / "COCO_train2014_000000000009.jpg").rename(photograph)
    assert set(row["image"] for row in plain(build_refcoco(tmp_path, tmp_path / "photographs"))) == {str(photograph)}


def test_file_names_cannot_leave_the_folder_of_photographs(tmp_path):
    files = two_images()
    write(tmp_path, **files)
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "train2014" / "COCO_train2014_000000000025.jpg").read_bytes())
    files["images"][1]["file_name"] = "../secret.jpg"
    dataset, report = build(files, tmp_path, split="val")
    assert plain(dataset)[0]["image"].endswith("train2014/COCO_train2014_000000000025.jpg")


def test_a_photograph_turned_by_exif_must_be_turned_in_the_annotations(tmp_path):
    files = two_images()
    write(tmp_path, **files)
    turned = Image.Exif()
    turned[0x0112] = 6
    path = tmp_path / "train2014" / "COCO_train2014_000000000025.jpg"
    Image.new("RGB", (40, 30)).save(path, exif=turned)  # shown as 30 wide and 40 high
    with pytest.raises(ValueError, match=r"wrong_size x 1 .* is \(40, 30\) but its annotations are for \(30, 40\)"):
        build(files, tmp_path, split="val")


def test_excluded_images_are_left_out_and_counted(tmp_path):
    files = two_images()
    files["refs"].append(ref(3, 25, 2500, ["a corner"]))
    for excluded in ([9], ["9"], ["COCO_train2014_000000000009.jpg"], {"9", 77}):
        dataset, report = build(files, tmp_path, exclude_images=excluded)
        assert dataset["image_id"][:] == ["25"]
        assert (report.num_rows, report.num_lost, dict(report.left_out)) == (1, 0, {"excluded images": 3})
    with pytest.raises(ValueError, match="expected a collection"):
        build(files, tmp_path, exclude_images="9")
    with pytest.raises(ValueError, match="no image id"):
        build(files, tmp_path, exclude_images=["dog.jpg"])


def test_images_of_every_other_split_are_known(tmp_path):
    write(tmp_path, **two_images())
    files = {"images": [image(n) for n in (1, 2, 3)], "annotations": [annotation(n, n) for n in (1, 2, 3)]}
    refs = [ref(n, n, n, ["it"], split) for n, split in ((1, "train"), (2, "val"), (3, "test"))]
    write(tmp_path, refs=refs, name="refcocog", split_by="umd", **files)
    refs = [ref(n, n, n, ["it"], split) for n, split in ((1, "val"), (2, "train"), (3, "train"))]
    write(tmp_path, refs=refs, name="refcocog", split_by="google", **files)
    assert eval_image_ids(tmp_path) == {"25", "1", "2", "3"}
    assert eval_image_ids(tmp_path, "refcoco") == {"25"}
    assert eval_image_ids(tmp_path, ["refcocog"]) == eval_image_ids(tmp_path / "refcocog") == {"1", "2", "3"}
    with pytest.raises(FileNotFoundError, match=r"grefcoco: there is no grefcoco/.* holds refcoco/, refcocog/"):
        eval_image_ids(tmp_path, ["grefcoco"])
    with pytest.raises(FileNotFoundError, match="none of refcoco, refcoco\\+, refcocog, grefcoco"):
        eval_image_ids(tmp_path / "train2014")


def test_python_2_pickles_load(tmp_path):
    write(tmp_path, **two_images())
    sentence = {
        b"sent": b"the left box",
        b"raw": b"The left box!",
        b"sent_id": 0,
        b"tokens": [b"the", b"left", b"box"],
    }
    old = {
        b"ref_id": 0,
        b"ann_id": 901,
        b"image_id": 9,
        b"split": b"train",
        b"sentences": [sentence],
        b"sent_ids": [0],
    }
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(python2_pickle([old]))
    dataset = build_refcoco(tmp_path, tmp_path / "train2014")
    assert dataset["instruction"][:] == ["the left box"] and dataset["instance_ids"][:] == [[901]]


class Malicious:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path):
    files = two_images()
    files["refs"].append(Malicious(tmp_path / "ran"))
    report = BuildReport()
    root, photographs = write(tmp_path, **files)
    for use in (lambda: build_refcoco(root, photographs, report=report), lambda: eval_image_ids(root)):
        with pytest.raises(ValueError, match=r"refs\(unc\).p' is refused: it asks for 'posix.system'"):
            use()
    assert report.counts == {"bad_pickle": 1}
    assert not (tmp_path / "ran").exists()
    pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("name", ["instances.json", "grefs(unc).json"])
def test_truncated_json_is_named(tmp_path, name):
    files = two_images() | {"refs": [ref(0, 9, [901], ["it"])]}
    root, photographs = write(tmp_path, name="grefcoco", **files)
    path = root / "grefcoco" / name
    path.write_text(path.read_text()[:-20])
    report = BuildReport()
    with pytest.raises(ValueError, match="is no complete json .* cut short"):
        build_grefcoco(root, photographs, report=report)
    assert report.counts == {"bad_json": 1} and report.problems[0]["where"] == name


def broken(**changes) -> dict:
    """Two images, where the first ref's object, image or text is replaced by something broken."""
    files = two_images()
    files["annotations"][0] |= changes.get("annotation", {})
    files["images"][0] |= changes.get("image", {})
    files["refs"][0] |= changes.get("ref", {})
    if "text" in changes:
        files["refs"][0]["sentences"][1] = changes["text"]
    return files


LARGER = encode_mask(np.ones((31, 40)))


@pytest.mark.parametrize(
    ("files", "kind", "lost", "message"),
    [
        (broken(annotation={"segmentation": []}), "empty_mask", 2, "annotation 901: there is no polygon"),
        (broken(annotation={"segmentation": [[1, 2, 3]]}), "bad_annotation", 2, "x and y come in pairs"),
        (broken(annotation={"segmentation": square(60, 3, 5)}), "empty_mask", 2, "no pixel inside the image"),
        (broken(annotation={"segmentation": LARGER}), "wrong_size", 2, r"is \[31, 40\] but its image is \[30, 40\]"),
        (broken(annotation={"segmentation": None}), "bad_annotation", 2, "the segmentation is None"),
        (broken(annotation={"image_id": 25}), "missing_annotation", 2, "image 9 has no annotation 901"),
        (broken(ref={"ann_id": 5}), "missing_annotation", 2, "image 9 has no annotation 5 in instances.json"),
        (broken(ref={"ann_id": "9o1"}), "bad_annotation", 2, "expected annotation ids"),
        (broken(ref={"ann_id": 2**64}), "bad_annotation", 2, "expected annotation ids"),
        (broken(ref={"ann_id": -1}), "bad_annotation", 2, "contradict"),
        (broken(ref={"image_id": 77}), "bad_annotation", 2, "image 77 is not in instances.json"),
        (broken(text={"sent_id": 1, "sent": "  "}), "empty_text", 1, "the sentence is '  '"),
        (broken(text={"sent_id": 1}), "empty_text", 1, "the sentence is None"),
        (broken(text="a text"), "bad_annotation", 1, "the sentence is 'a text'; expected a dict"),
        (broken(text={"sent_id": 0, "sent": "the left box"}), "duplicate_id", 1, "same sample with the id"),
    ],
)  # fmt: skip
def test_broken_samples_are_counted_and_named(tmp_path, files, kind, lost, message):
    dataset, report = build(files, tmp_path)
    assert len(dataset) == 3 - lost and report.num_rows + report.num_lost == 3
    problems = [problem for problem in report.problems if problem["lost"]]
    assert [problem["kind"] for problem in problems] == [kind] * lost
    for problem in problems:
        assert problem["where"].startswith("refcoco-unc-train-0-") and re.search(message, problem["detail"])
    assert kind in report.counts and kind in report.summary()


def test_missing_damaged_and_other_photographs_are_counted(tmp_path):
    files = two_images()
    files["images"] += [image(30), image(31)]
    files["annotations"] += [annotation(3000, 30), annotation(3100, 31)]
    files["refs"] += [ref(4, 25, 2500, ["a"]), ref(5, 30, 3000, ["b"]), ref(6, 31, 3100, ["c"])]
    _, photographs = write(tmp_path, **files)
    (photographs / "COCO_train2014_000000000009.jpg").unlink()
    (photographs / "COCO_train2014_000000000025.jpg").write_bytes(b"no image")
    Image.new("RGB", (30, 30)).save(photographs / "COCO_train2014_000000000030.jpg")
    report = BuildReport()
    dataset = build_refcoco(tmp_path, photographs, report=report)
    assert dataset["instruction"][:] == ["c"]
    assert report.counts == {"missing_image": 3, "unreadable_image": 1, "wrong_size": 1}
    assert report.num_lost == 5
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["counts"] == report.counts


def test_broken_other_objects_are_named_once_and_cost_no_sample(tmp_path):
    files = two_images()
    files["annotations"][1]["segmentation"] = []
    files["refs"].pop(1)
    dataset, report = build(files, tmp_path)
    assert dataset["distractor_masks"][:] == [[], []]
    assert report.num_lost == 0 and report.counts == {"empty_mask": 1}
    assert report.problems[0]["where"] == "instances.json annotation 902"


def test_duplicate_ids_are_counted_and_samples_stay_apart(tmp_path):
    files = two_images()
    files["annotations"].append(annotation(901, 9, square(0, 0, 30)))
    files["images"].append(image(9, height=99))
    files["refs"].append(ref(0, 9, 902, ["another ref of the same id"]))
    dataset, report = build(files, tmp_path)
    assert report.counts == {"duplicate_id": 3} and report.num_lost == 0
    assert {problem["where"] for problem in report.problems} == {
        "instances.json annotation 901", "instances.json image 9", "refcoco-unc-train-0-0"
    }  # fmt: skip
    assert decode_mask(dataset[0]["masks"][0]).sum() == 25  # the first of both
    ids = dataset["sample_id"][:]
    assert len(set(ids)) == 4 and ids[-1] == "refcoco-unc-train-0-0-2"


def test_unusable_entries_are_counted(tmp_path):
    files = two_images()
    files["refs"] += ["a ref", {"ref_id": 8, "image_id": 9}, ref(7, 9, 901, [])]
    files["annotations"] += ["an annotation", {"id": 5}]
    files["images"][0]["file_name"] = 9  # found by its id
    dataset, report = build(files, tmp_path)
    assert len(dataset) == 3
    assert report.counts == {"bad_annotation": 4, "empty_text": 1}
    details = {problem["where"]: problem["detail"] for problem in report.problems}
    assert details["refs(unc).p ref at 4"] == "lacks ann_id, split, sentences"
    assert details["refcoco-unc-train-7"] == "the ref has no sentence."


def test_contradictory_no_target_is_counted(tmp_path):
    files = two_images()
    files["refs"] = [
        ref(0, 9, [901], ["flagged, with an object"], no_target=True),
        ref(1, 9, [-1, 901], ["both"], no_target=False),
        ref(2, 9, [], ["neither"], no_target=False),
        ref(3, 9, [901], ["fine"], no_target=False),
        ref(4, 9, [901, 5], ["one of two is missing"], no_target=False),
    ]
    dataset, report = build(files, tmp_path, build_grefcoco)
    assert dataset["instruction"][:] == ["fine"]
    assert report.counts == {"bad_annotation": 3, "missing_annotation": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": "testA"}, ValueError, r"\(unc\).p' has no refs of split 'testA'; it has train \(2\), val \(1\)"),
        ({"split": "test"}, ValueError, "refcoco .unc. has the splits train, val, testA, testB, not 'test'"),
        ({"split_by": "umd"}, ValueError, "refcoco is split by unc or google, not by 'umd'"),
        ({"split_by": "google"}, FileNotFoundError, r"no file .*\(google\).p'; .* holds instances.json, refs"),
        ({"name": "refcocog"}, FileNotFoundError, r"no refcocog/ and no refs\(umd\).p .* holds refcoco/, train2014/"),
        ({"name": "refclef"}, ValueError, "no benchmark 'refclef'; choose one of refcoco, refcoco"),
        ({"name": "grefcoco"}, ValueError, "use build_grefcoco"),
        ({"root": "refcoco", "name": "refcoco+"}, FileNotFoundError, "is the folder of refcoco, not of refcoco\\+"),
        ({"root": "nowhere"}, FileNotFoundError, "there is no folder .*nowhere"),
        ({"images_dir": "nowhere"}, FileNotFoundError, "images_dir: there is no folder .*nowhere"),
        ({"images_dir": "refcoco"}, ValueError, "no row that can be used: 0 rows, 3 lost.* missing_image x 3"),
    ],
)  # fmt: skip
def test_a_wrong_root_or_split_says_what_was_found(tmp_path, change, error, message):
    root, photographs = write(tmp_path, **two_images())
    change = {key: tmp_path / value if key in ("root", "images_dir") else value for key, value in change.items()}
    with pytest.raises(error, match=message):
        build_refcoco(**({"root": root, "images_dir": photographs} | change))
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_problems_are_logged(tmp_path, caplog):
    logger = logging.getLogger("segcompass_hf.data.builders.build_report")
    logger.addHandler(caplog.handler)
    try:
        build(broken(annotation={"segmentation": []}), tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "refcoco-unc-train: 1 rows, 2 lost. Problems: empty_mask x 3 (first: refcoco-unc-train-0-0:" in caplog.text


def sample(builder, split: str):
    report = BuildReport()
    dataset = builder(SAMPLES, SAMPLES / "images", split=split, report=report)
    assert report.counts == {} and report.num_rows == len(dataset)
    return plain(dataset)


@with_samples
def test_real_refcoco():
    train, val = sample(build_refcoco, "train"), sample(build_refcoco, "val")
    assert (len(train), len(val)) == (6, 5)
    assert [row["instruction"] for row in train[:2]] == [
        "the dark vegetable in the orange box",
        "the burnt-looking food next to the meat",
    ]
    assert train[0]["instance_ids"] == train[1]["instance_ids"] == [901]  # two sentences of one ref
    assert all(len(row["masks"]) == 1 for row in train + val)
    assert len(train[0]["distractor_masks"]) == 7  # eight objects on the photograph
    assert eval_image_ids(SAMPLES) == {"36", "42", "49", "61"}


@with_samples
def test_real_grefcoco():
    train, val = sample(build_grefcoco, "train"), sample(build_grefcoco, "val")
    assert [len(row["masks"]) for row in train] == [1, 4, 1, 1, 2, 0, 1, 1, 0]
    assert [len(row["masks"]) for row in val] == [1, 1, 2, 1, 1, 1, 2, 6, 2, 0]
    none = [row["instruction"] for row in train + val if row["kind"] == "none"]
    assert none == ["the zookeeper in the blue uniform", "the animal that is not a zebra", "the boat on the river"]
    kinds = [row["kind"] for row in train + val]
    assert (kinds.count("single"), kinds.count("multi"), kinds.count("none")) == (10, 6, 3)
    everyone = next(row for row in val if len(row["masks"]) == 6)
    assert everyone["instruction"] == "everyone in the picture" and len(everyone["distractor_masks"]) == 3
    assert everyone["instance_ids"] == [4902, 4903, 4904, 4906, 4907, 4908]


def border(mask: np.ndarray) -> np.ndarray:
    """Pixels within one pixel of the outline; hair-thin parts of a mask are all outline."""
    return binary_dilation(mask & ~binary_erosion(mask), np.ones((3, 3)))


@with_samples
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_masks_are_the_same_in_both_formats_and_as_drawn_by_another_library(split):
    entries = json.loads((SAMPLES / "grefcoco" / "instances.json").read_text())["annotations"]
    polygons = {entry["id"]: entry["segmentation"] for entry in entries}
    single = {row["instruction"]: row for row in sample(build_refcoco, split)}
    compared = 0
    for row in sample(build_grefcoco, split):
        with Image.open(row["image"]) as photograph:
            width, height = photograph.size
        union = decode_masks(row["masks"], (height, width)).any(0)
        canvas = Image.new("L", (width, height))
        for number in row["instance_ids"]:
            for polygon in polygons[number]:
                ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        drawn = np.asarray(canvas, bool)
        assert not ((union ^ drawn) & ~border(union) & ~border(drawn)).any()
        if row["instruction"] in single:
            other = decode_masks(single[row["instruction"]]["masks"], (height, width)).any(0)
            assert (union == other).all()
            compared += 1
    assert compared == 5


@pytest.mark.parametrize("write_id", [str, float])
def test_ids_of_refs_as_text_or_floats(tmp_path, write_id):
    files = two_images()
    for entry in files["refs"]:
        entry |= {"image_id": write_id(entry["image_id"]), "ann_id": write_id(entry["ann_id"])}
    dataset, report = build(files, tmp_path)
    expected, _ = build(two_images(), tmp_path / "as_numbers")
    assert report.counts == {} and len(dataset) == 3
    for name in ("instance_ids", "image_id", "sample_id", "masks"):
        assert dataset[name][:] == expected[name][:]
