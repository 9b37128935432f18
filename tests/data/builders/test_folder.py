# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A user's own folder: every way to write a mask, and messages that say what to do."""

import csv
import inspect
import json
import logging
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from places import SAMPLES

from segcompass_hf.data import BuildReport, build_folder, build_grefcoco
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, decode_masks, encode_mask, row_features

HEIGHT, WIDTH = 20, 30
FIRST, SECOND = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
FIRST[3:8, 2:7] = True
SECOND[10:16, 20:24] = True
FIRST_POLYGON = [2, 3, 7, 3, 7, 8, 2, 8]
SECOND_POLYGON = [20, 10, 24, 10, 24, 16, 20, 16]
LABELS = FIRST * np.uint8(3) + SECOND * np.uint8(7)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with an image and mask files, without annotations."""
    root = tmp_path / "pictures"
    (root / "masks").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "dog.jpg")
    for name, values in {
        "first": FIRST, "second": SECOND * np.uint8(255), "both": LABELS, "sixteen": LABELS.astype(np.uint16) * 300,
        "grey": np.stack([FIRST * np.uint8(255)] * 3, -1), "empty": FIRST * np.uint8(0), "small": LABELS[1:],
        "turned": LABELS.T, "colours": np.stack([FIRST, SECOND, SECOND], -1) * np.uint8(255),
        "shades": np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH),
        "alpha": np.stack([FIRST, FIRST, FIRST, FIRST], -1) * np.uint8(255),
        "smooth": np.maximum(FIRST * np.uint8(255), np.pad(FIRST, 1)[2:, 1:-1] * np.uint8(90) + np.pad(
            FIRST, 1)[:-2, 1:-1] * np.uint8(80)),
    }.items():  # fmt: skip
        Image.fromarray(np.ascontiguousarray(values)).save(root / "masks" / f"{name}.png")
    palette = Image.fromarray(LABELS, "P")
    palette.putpalette([200, 0, 0] + [n % 256 for n in range(3 * 255)])  # the background is not black
    palette.save(root / "masks" / "palette.png")
    Image.fromarray(LABELS).save(root / "masks" / "lossy.jpg")
    (root / "masks" / "broken.png").write_bytes((root / "masks" / "both.png").read_bytes()[:60])
    return root


def line(**fields) -> dict:
    return {"image": "dog.jpg", "instruction": "it", "masks": [[FIRST_POLYGON]]} | fields


def write(root: Path, *lines: dict | str, name: str = "annotations.jsonl") -> None:
    texts = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in lines]
    (root / name).write_text("\n".join(texts) + "\n", encoding="utf-8")


def build(root: Path, *lines: dict | str, **kwargs):
    if lines:
        write(root, *lines)
    report = BuildReport()
    return build_folder(root, report=report, **kwargs), report


def objects(row: dict, column: str = "masks") -> list[str]:
    """Names of the masks."""
    names = {FIRST.tobytes(): "first", SECOND.tobytes(): "second", (FIRST | SECOND).tobytes(): "both"}
    return [names[mask.tobytes()] for mask in decode_masks(row[column], (HEIGHT, WIDTH))]


def points(polygon: list) -> list:
    return [polygon[place : place + 2] for place in range(0, len(polygon), 2)]


RUNS = [HEIGHT * 2 + 3, *[5, 15] * 4, 5, HEIGHT * WIDTH - HEIGHT * 6 - 8]  # column by column
FORMS = [
    ([[FIRST_POLYGON]], ["first"]),
    ([[FIRST_POLYGON], [SECOND_POLYGON]], ["first", "second"]),
    ([[FIRST_POLYGON, SECOND_POLYGON]], ["both"]),
    ([FIRST_POLYGON, SECOND_POLYGON], ["first", "second"]),
    (FIRST_POLYGON, ["first"]),
    ([points(FIRST_POLYGON), points(SECOND_POLYGON)], ["first", "second"]),
    ([[points(FIRST_POLYGON), points(SECOND_POLYGON)]], ["both"]),
    ([encode_mask(FIRST), encode_mask(SECOND)], ["first", "second"]),
    (encode_mask(FIRST), ["first"]),
    ({"size": [HEIGHT, WIDTH], "counts": RUNS}, ["first"]),
    (["masks/first.png", "masks/second.png"], ["first", "second"]),
    (["second.png"], ["second"]),
    ("masks/first.png; masks/second.png", ["first", "second"]),
    ("both.png", ["first", "second"]),
    (["both.png"], ["first", "second"]),
    ("sixteen.png", ["first", "second"]),
    ("palette.png", ["first", "second"]),
    ("grey.png", ["first"]),
    ([[FIRST_POLYGON], "second.png"], ["first", "second"]),
    ([], []),
    (None, []),
    ("", []),
]


@pytest.mark.parametrize(("masks", "expected"), FORMS)
@pytest.mark.parametrize("file", ["annotations.jsonl", "annotations.csv"])
def test_masks_in_every_form(root, file, masks, expected):
    if file.endswith(".csv"):
        with open(root / file, "w", newline="") as lines:
            cell = masks if isinstance(masks, str) else "" if masks is None else json.dumps(masks)
            csv.writer(lines).writerows([["image", "instruction", "masks"], ["dog.jpg", "it, there", cell]])
    else:
        write(root, line(masks=masks), line())
    dataset, report = build(root)
    assert report.counts == {} and dataset.features == row_features()
    row = dataset[0]
    assert objects(row) == expected and row["kind"] == ("none", "single", "multi")[len(expected)]
    assert row["image"].size == (WIDTH, HEIGHT)
    check_row(row)


def test_lines_of_the_docstring(root):
    """Every example works as written, for files of the names and the size that it has."""
    Image.new("RGB", (640, 480)).save(root / "dog.jpg")
    for name, values in (("dog_0", FIRST), ("dog_1", SECOND), ("dogs", LABELS)):
        Image.fromarray(np.pad(values, [(0, 480 - HEIGHT), (0, 640 - WIDTH)])).save(root / "masks" / f"{name}.png")
    blocks = re.findall("```(json|text)\n(.*?)```", inspect.cleandoc(build_folder.__doc__), re.DOTALL)
    examples = {kind: lines.replace('"counts": "..."', f'"counts": [{480 * 640 - 9}, 9]') for kind, lines in blocks}
    write(root, *examples["json"].splitlines())
    dataset, report = build(root)
    assert report.counts == {} and [len(masks) for masks in dataset["masks"]] == [1, 1, 2, 1, 2, 2, 0]
    (root / "lines.csv").write_text(examples["text"])
    dataset, report = build(root, annotations="lines.csv")
    assert report.counts == {} and [len(masks) for masks in dataset["masks"]] == [1, 2, 0]
    assert dataset[0]["instruction"] == "the dog, asleep"


def test_other_names_of_the_masks(root):
    lines = [{"image": "dog.jpg", "text": "it", name: [FIRST_POLYGON]} for name in ("mask", "polygons", "rle")]
    dataset, report = build(root, *lines)
    assert report.counts == {} and [objects(row) for row in dataset] == [["first"]] * 3
    _, report = build(root, line(), line(polygons=[FIRST_POLYGON]))
    assert "both masks and polygons" in report.problems[0]["detail"]


def test_values_of_a_png_are_instance_ids(root):
    dataset, _ = build(root, line(masks="both.png"), line(masks="sixteen.png"), line())
    assert dataset["instance_ids"][:] == [[3, 7], [900, 2100], [0]]


def test_further_fields(root):
    dataset, report = build(
        root,
        line(
            file_name="dog.jpg", text="  the dog ", distractors="second.png", ignore=["first.png", "second.png"],
            reasoning="it is brown", sample_id=17, image_id="d", kind="attribute", is_reasoning=True, image=None,
            instruction="",
        ),
        line(distractor_masks=[]),
        line(is_reasoning="no"),
    )  # fmt: skip
    first, second, _ = dataset
    assert objects(first, "distractor_masks") == ["second"]
    assert (decode_mask(first["ignore"]) == FIRST | SECOND).all()
    names = ("instruction", "reasoning", "sample_id", "image_id", "kind", "is_reasoning", "source", "split")
    assert [first[name] for name in names] == [
        "the dog", "it is brown", "17", "d", "attribute", True, "pictures", "train"
    ]  # fmt: skip
    assert second["distractor_masks"] == [] and second["ignore"] is None and second["reasoning"] is None
    assert dataset["sample_id"][:] == ["17", "dog.jpg-1", "dog.jpg-2"] and report.counts == {}
    assert dataset["distractor_masks"][2] is None and dataset["is_reasoning"][:] == [True, False, False]


def test_images_in_subfolders(root):
    for place in ("a", "b", "images"):
        (root / place).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / place / f"{'x' if place != 'images' else 'y'}.png")
    dataset, _ = build(root, line(image="a/x.png"), line(image="b/x.png"), line(image="y.png"))
    assert dataset["sample_id"][:] == ["a_x.png-0", "b_x.png-0", "y.png-0"]
    assert dataset["image_id"][:] == ["a/x.png", "b/x.png", "images/y.png"], "one per file, however a line spells it"


def test_small_objects_of_a_numbered_map_are_no_smooth_edges(root):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[2:8, 2:8], values[12, 3:5], values[15, 9] = 1, 2, 3
    Image.fromarray(values).save(root / "specks.png")
    dataset, report = build(root, line(masks="specks.png"))
    assert report.num_lost == 0 and dataset["instance_ids"][:] == [[1, 2, 3]]


def test_csv_with_other_separators_and_a_long_cell(root):
    long = json.dumps([[FIRST_POLYGON] + [SECOND_POLYGON] * 5000])
    assert len(long) > 131072  # the csv module's own limit
    limit = csv.field_size_limit()
    for separator in ";\t":
        with open(root / "annotations.csv", "w", encoding="utf-8-sig", newline="") as lines:
            writer = csv.writer(lines, delimiter=separator)
            writer.writerows([["file_name", "text", "masks", "is_reasoning"], ["dog.jpg", "ça", long, "TRUE"]])
        row = build(root)[0][0]
        assert objects(row) == ["both"] and row["instruction"] == "ça" and row["is_reasoning"]
    assert csv.field_size_limit() == limit


def test_splits(root, caplog):
    lines = [line(split="train"), line(split="test", instruction="two"), line(split="train"), line()]
    train, report = build(root, *lines)
    assert len(train) == 2 and dict(report.left_out) == {"other splits": 1}
    assert report.counts == {"bad_annotation": 1} and "no split, though" in report.problems[0]["detail"]
    test, _ = build(root, split="test")
    assert test["instruction"][:] == ["two"] and test["split"][:] == ["test"]
    with pytest.raises(ValueError, match=r"no line of split 'val'; it has train \(2\), test \(1\)"):
        build(root, split="val")
    write(root, line(instruction="of the file of its split"), name="val.jsonl")
    assert build(root, split="val")[0]["instruction"][:] == ["of the file of its split"]
    logger = logging.getLogger("segcompass_hf.data.builders.folder")
    logger.addHandler(caplog.handler)
    try:
        dataset, _ = build(root, line(), split="test")
    finally:
        logger.removeHandler(caplog.handler)
    assert dataset["split"][:] == ["test"] and "add a column split" in caplog.text


def test_which_file_is_read(root):
    with pytest.raises(FileNotFoundError, match=r"no annotations.jsonl .* Write one line per sample.* holds dog.jpg"):
        build_folder(root)
    (root / "train").mkdir()
    write(root / "train", line(instruction="inside"), name="metadata.jsonl")
    assert build(root)[0]["instruction"][:] == ["inside"]
    write(root, line(instruction="only"), name="mine.jsonl")
    assert build(root)[0]["instruction"][:] == ["only"]
    write(root, line(instruction="named"), name="yours.jsonl")
    with pytest.raises(ValueError, match="holds mine.jsonl, yours.jsonl; name one with annotations="):
        build_folder(root)
    assert build(root, annotations="yours.jsonl")[0]["instruction"][:] == ["named"]
    assert build(root, annotations=root / "yours.jsonl")[0]["instruction"][:] == ["named"]
    write(root, line(), name="val.jsonl")
    with pytest.raises(FileNotFoundError, match="no train.jsonl or train.csv in .*, but val.jsonl: choose a split"):
        build_folder(root)
    write(root, line(instruction="usual"), name="annotations.jsonl")
    assert build(root)[0]["instruction"][:] == ["usual"]
    with pytest.raises(FileNotFoundError, match="no file 'none.jsonl'; .* holds annotations.jsonl, dog.jpg"):
        build(root, annotations="none.jsonl")
    (root / "coco.json").write_text("{}")
    with pytest.raises(ValueError, match="neither .jsonl .* For COCO annotations use build_coco"):
        build(root, annotations="coco.json")
    with pytest.raises(ValueError, match="is a file; give its folder"):
        build_folder(root / "annotations.jsonl")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        build_folder(root / "nowhere")


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ('{"image": "dog.jpg", "instr', "bad_json", "no complete JSON object in UTF-8 .*: {\"image\": \"dog.jpg\""),
        ("[1, 2]", "bad_json", "a JSON list; expected an object per line"),
        (line(image=None), "bad_annotation", "image is None; expected the path"),
        (line(image="cat.jpg"), "missing_image", "there is no file 'cat.jpg' in .*pictures"),
        (line(image="https://some.where/dog.jpg"), "missing_image", "is an address; download it"),
        (line(image="annotations.jsonl"), "unreadable_image", "cannot be read as an image"),
        (line(file_name="dog.jpg"), "bad_annotation", "both image and file_name"),
        (line(instruction=" "), "empty_text", "instruction is None; expected a text"),
        (line(instruction=["a", "b"]), "empty_text", r"instruction is \['a', 'b'\]"),
        (json.dumps(line(instruction="a \ud800")), "bad_annotation", "no valid Unicode text"),
        (line(is_reasoning="perhaps"), "bad_annotation", "is_reasoning is 'perhaps'; expected true or false"),
        (line(masks=5), "bad_annotation", r"masks is 5; expected polygons \[\[\[x0"),
        (line(masks=[[]]), "empty_mask", r"masks\[0\]: there is no polygon of three or more points"),
        (line(masks=[[FIRST_POLYGON], [[1, 2]]]), "empty_mask", r"masks\[1\]: there is no polygon of three"),
        (line(masks=[None]), "bad_annotation", r"masks\[0\]: the segmentation is None"),
        (line(masks=points(FIRST_POLYGON)), "bad_annotation", "corners of one polygon; .*one more pair of brackets"),
        (line(masks=[[10, 3, 5, 5]]), "bad_annotation", r"masks\[0\]: four numbers \[10, 3, 5, 5\] are a box"),
        (line(masks=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]), "bad_annotation", "multiply x by the width 30 and y by the"),
        (line(masks=[[1, 2, 3, 4, 5]]), "bad_annotation", "x and y come in pairs"),
        (line(masks=[[1, 2, "3", 4, 5, 6]]), "bad_annotation", "no list of finite numbers"),
        (line(masks=[[200, 3, 300, 3, 300, 90]]), "bad_annotation", "is it of another image"),
        (line(masks=[encode_mask(FIRST.T)]), "wrong_size", r"masks\[0\]: the RLE is \[30, 20\].* transposed"),
        (line(masks=[encode_mask(FIRST & False)]), "empty_mask", r"masks\[0\]: the mask has no pixel"),
        (line(masks=[{"polygon": FIRST_POLYGON}]), "bad_annotation", 'an RLE has "size"'),
        (line(masks="[[1, 2"), "bad_json", r"masks is no complete JSON .*: \[\[1, 2"),
        (line(masks=["first.png", "no.png"]), "missing_mask", r"masks\[1\]: there is no file 'no.png' in .*masks"),
        (line(masks="broken.png"), "unreadable_mask", "broken.png' cannot be read as an image"),
        (line(masks="small.png"), "wrong_size", r"small.png is \(19, 30\) .* \(20, 30\).*without smoothing"),
        (line(masks="turned.png"), "wrong_size", r"turned.png is \(30, 20\) but its image is \(20, 30\)"),
        (line(masks="empty.png"), "empty_mask", r'empty.png is all 0; where nothing is meant, write "masks": \[\]'),
        (line(masks=["first.png", "empty.png"]), "empty_mask", r"masks\[1\]: empty.png is all 0"),
        (line(masks=["first.png", "both.png"]), "bad_annotation", r"masks\[1\]: both.png has 2 values above 0"),
        (line(masks="lossy.jpg"), "bad_annotation", "is a JPEG, .*; save masks as PNG"),
        (line(masks="colours.png"), "bad_annotation", "has colours; save one channel"),
        (line(masks="alpha.png"), "bad_annotation", "partly transparent"),
        (line(masks="shades.png"), "bad_annotation", "has 599 different values; .* Is it a picture"),
        (line(masks="smooth.png"), "bad_annotation", "values 80, 90, 255, and 2 of these 3 are only lines.*smooth"),
        (line(distractors=[[1, 2]]), "empty_mask", r"distractors\[0\]: there is no polygon"),
        (line(ignore=7), "bad_annotation", "ignore is 7; expected"),
    ],
)  # fmt: skip
def test_broken_lines_are_counted_and_named(root, entry, kind, message):
    dataset, report = build(root, line(instruction="fine"), entry)
    assert dataset["instruction"][:] == ["fine"] and report.num_lost == 1
    (problem,) = report.problems
    assert problem["kind"] == kind and problem["where"] == "annotations.jsonl line 2"
    assert re.search(message, problem["detail"])


def test_jsonl_that_is_not_utf_8(root):
    (root / "annotations.jsonl").write_bytes(
        "\ufeff".encode() + json.dumps(line(instruction="é"), ensure_ascii=False).encode()
        + b"\n\n" + json.dumps(line(instruction="é"), ensure_ascii=False).encode("cp1252")
    )  # fmt: skip
    dataset, report = build(root)
    assert dataset["instruction"][:] == ["é"] and report.counts == {"bad_json": 1}
    assert report.problems[0]["where"] == "annotations.jsonl line 3"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"image,instruction,masks\ndog.jpg,fine,\ndog.jpg,a, b,first.png\n", "bad_annotation", "more cells than the"),
        (b"image,instruction,masks\ndog.jpg,fine,\ndog.jpg,it\n", "bad_annotation", "fewer cells than the header"),
        (b"image,instruction,masks\ndog.jpg,\xe9,\n", None, "is not in UTF-8 .* CSV UTF-8"),
        (b'image,instruction,masks\ndog.jpg,"it"s,\n', None, "cannot be read as CSV"),
        (b"", None, "is empty; its first line names the columns"),
        (b"image,instruction,masks\n", None, "folder-train has no row that can be used"),
    ],
)
def test_broken_csv(root, content, kind, message):
    (root / "annotations.csv").write_bytes(content)
    if kind is None:
        with pytest.raises(ValueError, match=message):
            build(root)
    else:
        dataset, report = build(root)
        assert dataset["instruction"][:] == ["fine"] and report.counts == {kind: 1}
        assert re.search(message, report.problems[0]["detail"])
        assert report.problems[0]["where"] == "annotations.csv line 3"


def test_misspelt_columns_are_named(root):
    dataset, report = build(root, line(), line(maks="both.png", instructoin="it", camera=4), line(camera=5))
    assert len(dataset) == 3 and report.counts == {"unknown_column": 3} and report.num_lost == 0
    details = [problem["detail"] for problem in report.problems]
    assert "lines have image, file_name" in details[0]
    assert details[1:] == [
        "'instructoin' is not used; did you mean 'instruction'?", "'maks' is not used; did you mean 'masks'?"
    ]  # fmt: skip
    with pytest.raises(ValueError, match='no line of .* has "masks": polygons .* If indeed nothing is meant'):
        build(root, {"image": "dog.jpg", "instruction": "it", "segmentation": [[FIRST_POLYGON]]})


def test_duplicate_ids(root):
    twice = line(sample_id="a")
    dataset, report = build(root, twice, twice, line(sample_id="a", instruction="another"))
    assert dataset["sample_id"][:] == ["a", "a-2"] and dataset["instruction"][:] == ["it", "another"]
    assert report.counts == {"duplicate_id": 2} and report.num_lost == 1


def test_nothing_usable_says_why(root):
    with pytest.raises(ValueError, match="folder-train has no row that can be used: 0 rows, 1 lost.*missing_image"):
        build(root, line(image="cat.jpg"))
    write(root, "")
    with pytest.raises(ValueError, match="no row that can be used: 0 rows, no problems"):
        build_folder(root)


def test_masks_of_a_turned_photograph_are_of_the_image_as_shown(root):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "turned.jpg", exif=tags)  # shown as 20 wide and 30 high
    polygon = [3, 2, 8, 2, 8, 7, 3, 7]
    dataset, report = build(
        root, line(image="turned.jpg", masks="turned.png"), line(image="turned.jpg", masks=[polygon]),
        line(image="turned.jpg", masks="both.png"), line(image="turned.jpg", masks=[encode_mask(FIRST)]),
    )  # fmt: skip
    assert [decode_masks(row["masks"], (WIDTH, HEIGHT)).sum((1, 2)).tolist() for row in dataset] == [[25, 24], [25]]
    assert report.counts == {"wrong_size": 2}
    for problem in report.problems:
        assert "has an EXIF rotation: masks belong to the image as a viewer shows it" in problem["detail"]
    check_row(dataset[0])


@pytest.mark.skipif(not (SAMPLES / "grefcoco").is_dir(), reason="no real samples; set SEGCOMPASS_SAMPLES_DIR")
def test_real_samples_as_a_folder_of_ones_own(tmp_path):
    """gRefCOCO written as polygons, RLE and PNG gives the masks that its own builder gives."""
    polygons = json.loads((SAMPLES / "grefcoco" / "instances.json").read_text())["annotations"]
    polygons = {entry["id"]: entry["segmentation"] for entry in polygons}
    theirs = build_grefcoco(SAMPLES, SAMPLES / "images", split="val")
    paths = theirs.cast_column("image", datasets.Image(decode=False))
    lines = []
    for index, (row, path) in enumerate(zip(theirs, paths, strict=True)):
        size = row["image"].size[::-1]
        values = np.zeros(size, np.uint8)
        for number, mask in enumerate(decode_masks(row["masks"], size), 1):
            values[mask & (values == 0)] = number
        Image.fromarray(values).save(tmp_path / f"{index}.png")
        forms = [
            [polygons[number] for number in row["instance_ids"]], row["masks"], f"{index}.png" if row["masks"] else []
        ]  # fmt: skip
        image = os.path.relpath(path["image"]["path"], tmp_path)
        lines += [line(image=image, instruction=row["instruction"], masks=form) for form in forms]
    dataset, report = build(tmp_path, *lines, allow_outside=True)
    assert report.counts == {} and len(dataset) == 30
    for index, row in enumerate(theirs):
        by_polygon, by_rle, by_png = (dataset[3 * index + place] for place in range(3))
        assert by_polygon["masks"] == by_rle["masks"] == row["masks"]
        size = row["image"].size[::-1]
        assert len(by_png["masks"]) == len(row["masks"]) and by_png["image"].size == row["image"].size
        assert (decode_masks(by_png["masks"], size).any(0) == decode_masks(row["masks"], size).any(0)).all()


def test_void_beside_objects_is_ignored(root):
    values = LABELS.copy()
    values[0, :], values[19, :5] = 255, 255
    Image.fromarray(values).save(root / "masks" / "void.png")
    one = np.where(values == 7, 0, values)
    Image.fromarray(one).save(root / "masks" / "one.png")
    Image.fromarray(np.where(values == 0, 255, values)).save(root / "masks" / "white.png")
    dataset, report = build(
        root, line(masks="void.png"), line(masks=["one.png", "second.png"], ignore="second.png"),
        line(distractors="void.png"), line(ignore="void.png"), line(masks="white.png"),
    )  # fmt: skip
    assert [objects(row) for row in dataset] == [["first", "second"], ["first", "second"], ["first"], ["first"]]
    assert dataset["instance_ids"][0] == [3, 7] and objects(dataset[2], "distractor_masks") == ["first", "second"]
    void, everything = values == 255, values > 0
    for row, expected in zip(dataset, (void, void | SECOND, void, everything), strict=True):
        assert (decode_mask(row["ignore"]) == expected).all()
    assert report.counts == {"bad_annotation": 1} and "save the background as 0" in report.problems[0]["detail"]


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_path": "first.png"},
        {"Masks": [[FIRST_POLYGON]]},
        {"maks": [[FIRST_POLYGON]], "masks": []},
        {"segmentation": [FIRST_POLYGON], "masks": None},
        {"bbox": [2, 3, 5, 5]},
        {"outline": [points(FIRST_POLYGON)]},
        {"gt": {"size": [HEIGHT, WIDTH], "counts": "0"}},
        {"gt": [{"size": [HEIGHT, WIDTH], "counts": "0"}]},
        {"objects": {"bbox": [[2, 3, 5, 5]], "categories": [0]}},  # of the Hub's folders for detection
        {"regions": [{"shape_attributes": {"name": "polygon", "all_points_x": [2, 7, 7]}}]},  # VIA
        {"result": [{"value": {"points": [[1, 2], [3, 4], [5, 6]]}}]},  # Label Studio
        {"annotation": "first.png"},
        {"gt": "first.png"},
        {"label": "masks/first.png", "masks": None},
    ],
)
def test_masks_in_a_misnamed_column_are_not_nothing(root, fields):
    entry = {"image": "dog.jpg", "instruction": "it"} | fields
    dataset, report = build(root, line(instruction="fine"), entry)
    assert dataset["instruction"][:] == ["fine"] and report.num_lost == 1
    assert report.problems[0]["kind"] == "unknown_column" and "call it masks" in report.problems[0]["detail"]
    cells = [json.dumps(value) if isinstance(value, (list, dict)) else value or "" for value in entry.values()]
    with open(root / "lines.csv", "w", newline="") as lines:
        header = list(entry) if "masks" in entry else [*entry, "masks"]
        csv.writer(lines).writerows([header, [*cells, *[""] * (len(header) - len(cells))]])
    with pytest.raises(ValueError, match="unknown_column x 1"):
        build(root, annotations="lines.csv")


@pytest.mark.parametrize(
    "fields",
    [
        {"tags": ["a", "b"]}, {"size": [480, 640]}, {"num_masks": 0}, {"has_mask": False}, {"mask_author": "Ann"},
        {"objects": {"names": ["cat"], "weights": [1, 2]}}, {"annotation": "by Ann"}, {"annotations": []},
        {"depth": "masks/first.png"}, {"preview": "dog.jpg"},
        {"mask_path": ""}, {"polygon_list": []}, {"source": "http://some.where/a.png"}, {"camera": 4},
    ],
)  # fmt: skip
def test_other_columns_beside_nothing_are_no_masks(root, fields):
    dataset, report = build(root, line(), line(masks=[]) | fields)
    assert dataset["kind"][:] == ["single", "none"] and report.num_lost == 0


def test_names_as_other_systems_write_them(root):
    for path in ("images/my dog.jpg", "sub/caf\u00e9.jpg"):
        (root / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / path)
    names = ["images\\my dog.jpg", "images/my%20dog.jpg", "my%20dog.jpg", " sub/cafe\u0301.jpg"]
    dataset, report = build(root, *(line(image=name, masks="masks\\first.png") for name in names))
    assert report.counts == {} and set(dataset["image_id"]) == {"images/my dog.jpg", "sub/caf\u00e9.jpg"}


def test_images_and_masks_of_one_name(root):
    """`images/x.png` and `masks/x.png`: neither takes the place of the other, nor a photograph that of its mask."""
    (root / "images").mkdir()
    Image.new("L", (WIDTH, HEIGHT), 9).save(root / "images" / "x.png")
    Image.fromarray(FIRST * np.uint8(255)).save(root / "masks" / "x.png")
    Image.new("L", (WIDTH, HEIGHT), 9).save(root / "y.png")
    Image.fromarray(SECOND * np.uint8(255)).save(root / "masks" / "y.png")
    dataset, report = build(
        root, line(image="x.png", masks="x.png"), line(image="y.png", masks="y.png"), line(image="second.png"),
        line(image="x.png", masks="dog.png"),
    )  # fmt: skip
    assert [objects(row) for row in dataset] == [["first"], ["second"]]
    assert dataset["image_id"][:] == ["images/x.png", "y.png"]
    assert report.counts == {"missing_image": 1, "missing_mask": 1}


def test_files_outside_are_left_out_unless_allowed(root):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root.parent / "id_card.png")
    (root / "link.png").symlink_to(root.parent / "id_card.png")
    Image.fromarray(FIRST * np.uint8(255)).save(root.parent / "mask.png")
    lines = [line(image=name) for name in ("../id_card.png", str(root.parent / "id_card.png"), "link.png")]
    lines.append(line(masks="../mask.png"))
    dataset, report = build(root, line(instruction="fine"), *lines)
    assert dataset["instruction"][:] == ["fine"] and report.counts == {"outside_folder": 4}
    dataset, report = build(root, allow_outside=True)
    assert len(dataset) == 4 + 1 and report.counts == {}
    (root / "annotations.jsonl").rename(root.parent / "private.jsonl")
    (root / "annotations.jsonl").symlink_to(root.parent / "private.jsonl")
    with pytest.raises(ValueError, match="private.jsonl|annotations.jsonl' lies outside"):
        build_folder(root)
    assert len(build_folder(root, root.parent / "private.jsonl")) == 1  # named by the user; its folder is not inside


def test_a_kind_that_contradicts_the_masks_is_refused(root):
    entries = [line(kind="none"), line(kind="single", masks=[]), line(kind="multi", masks=None), line(kind="part")]
    dataset, report = build(root, *entries, line(masks=[], kind="none"))
    assert dataset["kind"][:] == ["part", "none"] and report.counts == {"bad_annotation": 3} and report.num_lost == 3
