# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""ReasonSeg from its own files and from hosted mirrors: shapes, texts, encodings, and a name for everything broken."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from places import SAMPLES
from scipy.ndimage import binary_dilation, binary_erosion

from segcompass_hf.data import BuildReport, build_grefcoco, build_reasonseg, from_hosted_reasonseg
from segcompass_hf.data.builders.shapes import draw_polygon
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, decode_masks, encode_mask, row_features

with_samples = pytest.mark.skipif(
    not (SAMPLES / "reasonseg").is_dir(),
    reason="no real samples; set SEGCOMPASS_SAMPLES_DIR to the folder that holds reasonseg/ and hosted_reasonseg/",
)
HEIGHT, WIDTH = 20, 30


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shape(label: str, x: int, y: int, side: int) -> dict:
    """A square of `(side + 1) ** 2` pixels whose first is (x, y): outlines count."""
    return {"label": label, "points": [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]}


def write(root: Path, name: str = "a", split: str = "train", encoding: str = "utf-8", **content) -> Path:
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.jpg")
    content = {"text": ["the box"], "is_sentence": False, "shapes": [shape("target", 2, 3, 4)]} | content
    (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    return folder


def build(root: Path, **kwargs):
    report = BuildReport()
    return build_reasonseg(root, report=report, **kwargs), report


def masks_of(row: dict) -> np.ndarray:
    return decode_masks(row["masks"], (HEIGHT, WIDTH))


def test_rows_in_the_row_schema(tmp_path):
    write(tmp_path, "b", text=["the box", " Which is safe? "], is_sentence=True)
    write(tmp_path, "a", is_sentence=False)
    write(tmp_path, "c", text="one text without a list", is_sentence=None)
    dataset, report = build(tmp_path)
    assert dataset.features == row_features() and report.counts == {} and report.num_rows == 4
    ids = [f"reasonseg-train-{end}" for end in ("a-0", "b-0", "b-1", "c-0")]
    assert dataset["sample_id"][:] == ids
    assert dataset["instruction"][:] == ["the box", "the box", "Which is safe?", "one text without a list"]
    assert dataset["kind"][:] == ["phrase", "sentence", "sentence", None]
    row = dataset[2]
    assert row["image"].size == (WIDTH, HEIGHT) and row["image_id"] == "b" and row["is_reasoning"] is True
    assert (row["source"], row["split"], row["instance_ids"]) == ("reasonseg", "train", [0])
    assert row["ignore"] is None and row["distractor_masks"] is None and row["reasoning"] is None
    assert masks_of(row).sum() == 25
    check_row(row)


def test_first_text_only_as_in_lisas_evaluation(tmp_path):
    write(tmp_path, text=["one", "two", "three"])
    dataset, report = build(tmp_path, texts="first")
    assert dataset["instruction"][:] == ["one"] and dict(report.left_out) == {"further texts": 2}
    with pytest.raises(ValueError, match="must be 'all' or 'first'"):
        build_reasonseg(tmp_path, texts="some")


def test_the_smaller_of_two_overlapping_shapes_decides(tmp_path):
    small_target = [shape("target", 5, 5, 2), shape("ignore", 3, 3, 8)]
    small_ignore = [shape("target", 3, 3, 8), shape("ignore", 5, 5, 2), shape("flag", 0, 0, 19)]
    write(tmp_path, "a", shapes=small_target)
    write(tmp_path, "b", shapes=small_ignore)
    dataset, report = build(tmp_path)
    assert report.counts == {}  # a flag is nothing
    for row, (target, ignored) in zip(dataset, [(9, 81 - 9), (81 - 9, 9)], strict=True):
        ignore = decode_mask(row["ignore"])
        assert (masks_of(row).sum(), ignore.sum()) == (target, ignored)
        assert not (masks_of(row)[0] & ignore).any()


def test_every_target_shape_is_a_mask_in_the_order_of_the_file(tmp_path):
    write(tmp_path, shapes=[shape("target", 10, 5, 1), shape("target", 0, 0, 6), shape("TARGET", 5, 5, 3)])
    row = build(tmp_path)[0][0]
    assert masks_of(row).sum((1, 2)).tolist() == [4, 49, 16]
    assert masks_of(row).any(0).sum() == 4 + 49 + 16 - 4  # the last two share four pixels


def test_shapes_of_labelme(tmp_path):
    """A rectangle is drawn like its four corners; shapes of one group are one object; sizes are compared."""
    rectangle = {"label": "target", "shape_type": "rectangle", "points": [[2, 3], [6, 7]]}
    grouped = [shape("target", 2, 3, 4) | {"group_id": 0}, shape("target", 10, 5, 2), shape("target", 20, 5, 3)]
    grouped[2]["group_id"] = 0
    write(tmp_path, "a", shapes=[rectangle, {**rectangle, "label": "ignore", "points": [[20, 12], [11, 10]]}])
    write(tmp_path, "b", shapes=grouped, imageHeight=HEIGHT, imageWidth=float(WIDTH))
    write(tmp_path, "c", imageHeight=2 * HEIGHT, imageWidth=2 * WIDTH)
    write(tmp_path, "d", imageHeight="x")
    write(tmp_path, "e", shapes=[shape("target", 2, 3, 4), rectangle | {"shape_type": "line"}])
    normalised = [[x / WIDTH, y / HEIGHT] for x, y in shape("target", 2, 3, 4)["points"]]
    write(tmp_path, "f", shapes=[{"label": "target", "points": normalised}])
    write(tmp_path, "g", shapes=[{"label": "target", "points": [[300, 200], [700, 200], [700, 600]]}])  # of 1000
    write(tmp_path, "h", shapes=[shape("target", 20, 3, 25)])  # of the image twice as large
    write(tmp_path, "i", shapes=[shape("target", 2, 3, 4), rectangle | {"shape_type": "point", "label": "flag"}])
    dataset, report = build(tmp_path)
    assert dataset["image_id"][:] == ["a", "b", "i"]
    assert masks_of(dataset[0]).sum() == 25 and decode_mask(dataset[0]["ignore"]).sum() == 3 * 10
    assert masks_of(dataset[1]).sum((1, 2)).tolist() == [25 + 16, 9]
    lost = {problem["where"][-3]: (problem["kind"], problem["detail"]) for problem in report.problems}
    assert {name: kind for name, (kind, _) in lost.items()} == {
        "c": "wrong_size", "d": "wrong_size", **dict.fromkeys("efgh", "bad_annotation")
    }  # fmt: skip
    assert "(40, 60) but the photograph is (20, 30)" in lost["c"][1] and "'line' of 2 points" in lost["e"][1]
    assert "between 0 and 1" in lost["f"][1] and all("in another size" in lost[name][1] for name in "gh")


def test_two_photographs_of_one_name(tmp_path):
    folder = write(tmp_path, "a")
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(folder / "a.png")
    write(tmp_path, "b", imagePath="..\\pictures\\b.png")
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(folder / "b.png")
    dataset, report = build(tmp_path)
    assert dataset["image_id"][:] == ["b"] and dataset[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert report.counts == {"ambiguous_file": 1}


def test_links_out_of_the_folder_are_left_out_unless_allowed(tmp_path):
    folder = write(tmp_path / "root", "a")
    private = write(tmp_path, "private")
    for link, target in (("b.jpg", "private.jpg"), ("c.json", "private.json")):
        write(tmp_path / "root", link[0])
        (folder / link).unlink()
        (folder / link).symlink_to(private / target)
    dataset, report = build(tmp_path / "root")
    assert dataset["image_id"][:] == ["a"] and report.counts == {"outside_folder": 2}
    dataset, _ = build(tmp_path / "root", allow_outside=True)
    assert dataset["image_id"][:] == ["a", "b", "c"]


def test_covered_and_empty_shapes_are_named_and_passed_over(tmp_path):
    shapes = [shape("target", 2, 3, 4), shape("target", 10, 5, 3), shape("ignore", 10, 5, 3)]
    shapes[2]["points"][2] = [13.9, 8.9]  # cut to whole pixels it covers the second target, of the same size
    shapes += [{"label": "target", "points": []}, {"label": "target", "points": [[1, 1], [5, 5]]}]
    shapes += [shape("target", 31, 5, 3), shape("object", 20, 5, 1)]
    write(tmp_path, shapes=shapes)
    dataset, report = build(tmp_path)
    assert report.num_lost == 0
    assert [(problem["kind"], problem["where"][-7:]) for problem in report.problems] == [
        ("empty_mask", "shape 3"), ("empty_mask", "shape 4"), ("empty_mask", "shape 5"), ("bad_annotation", "shape 6"),
    ]  # fmt: skip
    assert "taken as target" in report.problems[-1]["detail"]
    # Of equal sizes the one that comes first in the file is drawn last, as numpy's reversed argsort has it.
    assert masks_of(dataset[0]).sum((1, 2)).tolist() == [25, 16, 4] and dataset[0]["ignore"] is None


def test_targets_under_ignore_shapes_are_named(tmp_path):
    covering = [shape("target", 2, 3, 4), shape("target", 10, 5, 3), shape("ignore", 10, 5, 2)]
    covering[1]["points"] = [[10, 5], [12, 7], [10, 7], [12, 5]]  # a bow tie inside the ignored square
    covering[1]["points"] += covering[2]["points"]  # and then all of it
    write(tmp_path, shapes=[covering[0], covering[2], covering[1]])
    dataset, report = build(tmp_path)
    assert masks_of(dataset[0]).sum((1, 2)).tolist() == [25] and decode_mask(dataset[0]["ignore"]).sum() == 9
    assert report.counts == {"empty_mask": 1} and "1 of 2 target shapes are covered" in report.problems[0]["detail"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_encodings(tmp_path, encoding):
    write(tmp_path, text=["café – “fresh”"], encoding=encoding)
    assert build(tmp_path)[0]["instruction"][:] == ["café – “fresh”"]


def broken_json(content: bytes):
    return lambda folder: (folder / "b.json").write_bytes(content)


@pytest.mark.parametrize(
    ("content", "change", "kind", "lost", "message"),
    [
        ({}, broken_json(b'{"text": ["it"], "shap'), "bad_json", 1, "b.json is no complete json"),
        ({}, broken_json(b"\x81\xff\xfe"), "bad_json", 1, "no complete json in UTF-8 or cp1252"),
        ({}, broken_json(b"[1, 2]"), "bad_annotation", 1, 'no object with a list "shapes"'),
        ({}, lambda folder: (folder / "b.json").unlink(), "missing_annotation", 1, "no b.json beside"),
        ({}, lambda folder: (folder / "b.jpg").unlink(), "missing_image", 2, "no photograph b.jpg beside b.json"),
        ({}, lambda folder: (folder / "b.jpg").write_bytes(b"no"), "unreadable_image", 2, "cannot be read"),
        ({"shapes": []}, None, "empty_mask", 2, "no target shape with a pixel"),
        ({"shapes": [shape("flag", 1, 1, 5)]}, None, "empty_mask", 2, "no target shape"),
        ({"shapes": [shape("ignore", 1, 1, 5)]}, None, "empty_mask", 2, "no target shape"),
        ({"shapes": [{"points": []}]}, None, "bad_annotation", 2, "shape 0 has no label"),
        ({"shapes": ["it"]}, None, "bad_annotation", 2, "shape 0 has no label"),
        ({"shapes": [{"label": "target"}]}, None, "bad_annotation", 2, "shape 0 has points None"),
        ({"shapes": [{"label": "target", "points": [1, 2, 3]}]}, None, "bad_annotation", 2, "expected ..x, y"),
        ({"shapes": [shape("target", 500, 5, 5)]}, None, "bad_annotation", 2, "x from 500 to 505 .* of another image"),
        ({"shapes": [{"label": "ignore", "points": [["a", 1]]}]}, None, "bad_annotation", 2, "finite numbers"),
        ({"text": ["it", " "]}, None, "empty_text", 1, "the text is ' '"),
        ({}, broken_json(b'{"text": ["it \\ud800"], "shapes": [{"label": "target", "points": [[1,1],[5,1],[5,5]]}]}'),
         "bad_annotation", 1, "no valid Unicode text"),
        ({"text": []}, None, "empty_text", 1, "empty list"),
        ({"text": 5}, None, "bad_annotation", 1, '"text" is 5'),
    ],
)  # fmt: skip
def test_broken_files_are_counted_and_named(tmp_path, content, change, kind, lost, message):
    write(tmp_path, "a")
    folder = write(tmp_path, "b", **({"text": ["one", "two"]} | content))
    if change is not None:
        change(folder)
    dataset, report = build(tmp_path)
    assert len(dataset) == (2 if kind == "empty_text" and lost == 1 and content["text"] else 1)
    problems = [problem for problem in report.problems if problem["lost"]]
    assert [problem["kind"] for problem in problems] == [kind] * lost
    for problem in problems:
        assert problem["where"].startswith("reasonseg-train-b") and re.search(message, problem["detail"])


def test_an_unknown_kind_of_text_costs_no_sample(tmp_path):
    write(tmp_path, is_sentence="maybe")
    dataset, report = build(tmp_path)
    assert dataset["kind"][:] == [None] and report.counts == {"bad_annotation": 1} and report.num_lost == 0


def test_folders(tmp_path):
    write(tmp_path / "reason_seg" / "ReasonSeg", split="val")
    roots = [tmp_path, tmp_path / "reason_seg" / "ReasonSeg", tmp_path / "reason_seg" / "ReasonSeg" / "val"]
    ids = {tuple(build(root, split="val")[0]["sample_id"]) for root in roots}
    assert ids == {("reasonseg-val-a-0",)}
    with pytest.raises(FileNotFoundError, match="is the folder of split val, not of train"):
        build(roots[2])
    with pytest.raises(FileNotFoundError, match=r"no train/ and no photograph .* holds val/"):
        build(roots[1])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has the splits train, val, test, not 'testA'"):
        build(tmp_path, split="testA")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="reasonseg-train has no row that can be used: 0 rows"):
        build(tmp_path / "empty")


def test_polygons_cover_their_outline():
    # Row by row: corners (1,1), (5,1), (5,4): x from the hypotenuse, halves rounded towards its left end, to 5.
    expected = np.zeros((6, 8), bool)
    for row, start in ((1, 1), (2, 2), (3, 4), (4, 5)):
        expected[row, start:6] = True
    assert (draw_polygon(np.array([[1, 1], [5, 1], [5, 4]]), 6, 8) == expected).all()
    assert draw_polygon(np.array([[2, 2]]), 6, 8).sum() == 1
    # A bow tie, even-odd: its rows have 2, 4, 5, 4 and 2 pixels.
    bow = draw_polygon(np.array([[0, 0], [4, 4], [4, 0], [0, 4]]), 6, 8)
    assert bow[:5, :5].sum() == 17 and not bow[0, 1:4].any() and not bow[4, 1:4].any()
    # What lies outside is cut off.
    assert draw_polygon(np.array([[-5, -5], [3, -5], [3, 2], [-5, 2]]), 6, 8).sum() == 4 * 3


def border(mask: np.ndarray) -> np.ndarray:
    """Pixels within one pixel of the outline."""
    return binary_dilation(mask & ~binary_erosion(mask), np.ones((3, 3)))


def plain_text(row: dict) -> str:
    """As REFER's texts are, in lower case and without punctuation."""
    return re.sub("[^a-z ]", "", row["instruction"].lower())


def union(row: dict) -> np.ndarray:
    return decode_masks(row["masks"], row["image"].size[::-1]).any(0)


@with_samples
def test_real_reasonseg():
    report = BuildReport()
    train = list(build_reasonseg(SAMPLES / "reasonseg", report=report))
    val = list(build_reasonseg(SAMPLES / "reasonseg" / "val", split="val", report=report))
    assert report.counts == {} and report.num_rows == 17 and report.num_lost == 0
    assert [len(row["masks"]) for row in train] == [1, 1, 4, 1, 1, 2, 1, 1]
    assert [len(row["masks"]) for row in val] == [1, 2, 1, 1, 1, 1, 2, 6, 2]
    assert [row["instruction"] for row in train[:2]] == [
        "the dark vegetable in the orange box", "the burnt-looking food next to the meat"
    ]  # fmt: skip
    assert train[0]["masks"] == train[1]["masks"] and train[0]["image_id"] == train[1]["image_id"]
    assert train[6]["instruction"] == "the container that keeps the flowers fresh – café style"  # cp1252
    ignored = [row["sample_id"] for row in train + val if row["ignore"] is not None]
    assert ignored == [
        "reasonseg-train-000000000009_0-0", "reasonseg-train-000000000009_0-1",
        "reasonseg-val-000000000036_10-0", "reasonseg-val-000000000049_15-0",
    ]  # fmt: skip
    kinds = [row["kind"] for row in train + val]
    assert (kinds.count("phrase"), kinds.count("sentence")) == (11, 6)
    for row in train + val:
        check_row(row)


@with_samples
def test_real_unions_are_the_same_in_all_formats():
    """Where shapes are ignored, what is left is compared."""
    grefcoco = {
        plain_text(row): row for split in ("train", "val")
        for row in build_grefcoco(SAMPLES, SAMPLES / "images", split=split)
    }  # fmt: skip
    report = BuildReport()
    hosted = {plain_text(row): row for row in from_hosted_reasonseg(SAMPLES / "hosted_reasonseg", report=report)}
    assert report.counts == {} and report.num_rows == len(hosted) == 9
    compared = 0
    for split, others in (("train", [grefcoco]), ("val", [grefcoco, hosted])):
        for row in build_reasonseg(SAMPLES / "reasonseg", split=split):
            if row["instruction"] == "the burnt-looking food next to the meat":
                continue  # the second text of a file, whose mask is the first's
            mask, instruction = union(row), plain_text(row).replace("  caf style", "")
            left = ~decode_mask(row["ignore"]) if row["ignore"] else np.ones_like(mask)
            for other in others:
                theirs = union(other[instruction])
                assert not ((mask ^ theirs) & left & ~border(mask) & ~border(theirs)).any()
                compared += 1
    assert compared == 7 + 9 + 9


def jpeg(size: tuple[int, int] = (WIDTH, HEIGHT), exif: int | None = None) -> dict:
    buffer, tags = io.BytesIO(), Image.Exif()
    if exif:
        tags[0x0112] = exif
    Image.new("RGB", size).save(buffer, "JPEG", exif=tags)
    return {"bytes": buffer.getvalue(), "path": "a.jpg"}


def png(mask: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[3:8, 2:7] = True


def hosted_rows(masks: list, **columns) -> dict:
    count = len(masks)
    rows = {
        "image": [jpeg()] * count, "text": [f"text {n}" for n in range(count)], "mask": masks,
        "image_id": ["7"] * count, "ann_id": [str(n) for n in range(count)],
        "img_height": [HEIGHT] * count, "img_width": [WIDTH] * count,
    }  # fmt: skip
    return rows | columns


def hosted(tmp_path: Path, rows: dict, name: str = "data/test-00000-of-00001.parquet", mask_type=None, **kwargs):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask_type is not None:
        rows = rows | {"mask": pa.array(rows["mask"], mask_type)}
    pq.write_table(pa.table(rows), path)
    report = BuildReport()
    return from_hosted_reasonseg(tmp_path, report=report, **kwargs), report


@pytest.mark.parametrize(
    ("mask", "mask_type"),
    [
        (MASK.tolist(), None),
        (MASK.astype(int).tolist(), pa.large_list(pa.list_(pa.uint8()))),
        ((MASK * 255).tolist(), pa.list_(pa.list_(pa.int32(), WIDTH), HEIGHT)),
        (MASK.astype(float).tolist(), None),
        ([MASK.tolist()], None),
        ([(MASK & (np.arange(WIDTH) < 4)).tolist(), (MASK & (np.arange(WIDTH) >= 4)).tolist()], None),
        (MASK.ravel().tolist(), None),
        (png(MASK), None),
        (png(MASK * np.uint8(3)), None),
        (png(MASK * np.uint8(255))["bytes"], None),
        (encode_mask(MASK), None),
    ],
    ids=["lists", "large", "fixed", "float", "one_mask", "two_masks", "flat", "png1", "png", "bytes", "rle"],
)
def test_hosted_masks_in_every_form(tmp_path, mask, mask_type):
    dataset, report = hosted(tmp_path, hosted_rows([mask]), mask_type=mask_type)
    assert report.counts == {} and (masks_of(dataset[0]) == MASK).all()
    assert dataset.features == row_features()
    row = dataset[0]
    assert (row["sample_id"], row["image_id"], row["source"]) == ("reasonseg-test-7-0", "7", "reasonseg")
    assert row["is_reasoning"] is True and row["kind"] is None and row["image"].size == (WIDTH, HEIGHT)
    check_row(row)


@pytest.mark.parametrize("form", [png, lambda values: values.tolist()], ids=["png", "lists"])
def test_hosted_masks_with_a_void(tmp_path, form):
    values = MASK.astype(np.uint8)
    values[12:15, 20:25] = 255
    dataset, report = hosted(tmp_path, hosted_rows([form(values), form(MASK * np.uint8(255))]))
    assert report.counts == {} and (masks_of(dataset[0]) == MASK).all() and (masks_of(dataset[1]) == MASK).all()
    assert decode_mask(dataset[0]["ignore"]).sum() == 15 and dataset[1]["ignore"] is None


def test_hosted_rows_with_paths_stay_in_their_folder(tmp_path):
    (tmp_path / "near.jpg").write_bytes(jpeg()["bytes"])
    private = tmp_path.with_name(tmp_path.name + "-private.jpg")
    private.write_bytes(jpeg()["bytes"])
    paths = ["near.jpg", str(private), f"../{private.name}", "http://127.0.0.1:9/a.jpg", "none.jpg"]
    rows = hosted_rows([MASK.tolist()] * 5, image=[{"bytes": None, "path": path} for path in paths])
    dataset, report = hosted(tmp_path, rows)
    assert len(dataset) == 1 and report.counts == {"outside_folder": 2, "missing_image": 2}
    dataset, report = hosted(tmp_path, rows, allow_outside=True)
    assert len(dataset) == 3 and report.counts == {"missing_image": 2}
    dataset, report = hosted(tmp_path, rows | {"image": paths})
    assert len(dataset) == 1 and report.counts == {"outside_folder": 2, "missing_image": 2}


def test_hosted_files_behind_links(tmp_path):
    hosted(tmp_path / "elsewhere", hosted_rows([MASK.tolist()]))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "data").symlink_to(tmp_path / "elsewhere" / "data")
    with pytest.raises(ValueError, match="lies outside of .*root"):
        from_hosted_reasonseg(tmp_path / "root")
    assert len(from_hosted_reasonseg(tmp_path / "root", allow_outside=True)) == 1


def test_hosted_arrays_of_datasets(tmp_path):
    """The extension type of `datasets.Array2D`."""
    features = datasets.Features(
        {"mask": datasets.Array2D((HEIGHT, WIDTH), "bool"), "image": datasets.Image()}
        | {name: datasets.Value("string") for name in ("text", "image_id", "ann_id")}
    )
    rows = hosted_rows([MASK])
    rows = {name: rows[name] for name in features}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "test.parquet")
    assert (masks_of(from_hosted_reasonseg(tmp_path)[0]) == MASK).all()


def test_a_stream_gives_the_same_rows_on_every_pass(tmp_path):
    empty = np.zeros_like(MASK)
    rows = hosted_rows([MASK.tolist(), empty.tolist(), MASK.tolist()])
    dataset, report = hosted(tmp_path, rows)
    stream, of_stream = hosted(tmp_path, rows, streaming=True)
    assert isinstance(stream, datasets.IterableDataset) and stream.features == dataset.features
    for _ in range(2):
        streamed = list(stream)
        assert [row["image"].size for row in streamed] == [(WIDTH, HEIGHT)] * 2
        for name in set(row_features()) - {"image"}:
            assert [row[name] for row in streamed] == dataset[name][:]
    assert of_stream.problems == report.problems and report.counts == {"empty_mask": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mirror_on_the_hub_goes_through_load_dataset(tmp_path, monkeypatch, streaming):
    rows = hosted_rows([MASK.tolist(), np.zeros_like(MASK).tolist(), MASK.tolist()])
    local, _ = hosted(tmp_path, rows)
    load, asked = datasets.load_dataset, []

    def from_files(name, split, streaming):
        asked.append((name, split))
        files = str(tmp_path / "data" / "*.parquet")
        return load("parquet", data_files={split: files}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", from_files)
    report = BuildReport()
    dataset = from_hosted_reasonseg("owner/reasonseg", report=report, streaming=streaming)
    for _ in range(2):
        ours = list(dataset)
        assert [row["image"].size for row in ours] == [(WIDTH, HEIGHT)] * 2
        assert [row["masks"] for row in ours] == local["masks"][:]
        assert [row["sample_id"] for row in ours] == local["sample_id"][:]
    assert asked == [("owner/reasonseg", "test")] and report.counts == {"empty_mask": 1}

    def nothing(name, split, streaming):
        raise datasets.exceptions.DatasetNotFoundError("it does not exist")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    with pytest.raises(FileNotFoundError, match="no file or folder 'owner/reasonseg', and on the Hub: it does not"):
        from_hosted_reasonseg("owner/reasonseg")


@pytest.mark.parametrize(
    ("mask", "columns", "kind", "message"),
    [
        (np.zeros_like(MASK).tolist(), {}, "empty_mask", "no pixel"),
        (None, {}, "empty_mask", "the row has no mask"),
        (MASK.T.tolist(), {}, "wrong_size", r"\(30, 20\) but its image is \(20, 30\).* transposed"),
        (MASK[:-1].tolist(), {}, "wrong_size", r"\(19, 30\) but its image"),
        ([[True] * WIDTH, [True]], {}, "bad_annotation", "lines have different lengths: 1, 30"),
        (MASK.ravel()[1:].tolist(), {}, "wrong_size", r"\(599,\)"),
        (MASK.tolist(), {"text": [" ", "text 1"]}, "empty_text", "the text is ' '"),
        (MASK.tolist(), {"image": [None, jpeg()]}, "missing_image", "no content"),
        (MASK.tolist(), {"image": [{"bytes": b"no", "path": "a"}, jpeg()]}, "unreadable_image", "cannot be read"),
        (MASK.tolist(), {"image": [jpeg((WIDTH, HEIGHT), 6), jpeg()]}, "wrong_size", r"is \(30, 20\).*EXIF"),
    ],
)  # fmt: skip
def test_broken_hosted_rows_are_counted_and_named(tmp_path, mask, columns, kind, message):
    flat = mask is not None and not isinstance(mask[0], list)
    rows = hosted_rows([mask, (MASK.ravel() if flat else MASK).tolist()], **columns)
    dataset, report = hosted(tmp_path, rows)
    assert dataset["sample_id"][:] == ["reasonseg-test-7-1"] and report.num_lost == 1
    problem = next(problem for problem in report.problems if problem["lost"])
    assert problem["kind"] == kind and problem["where"] == "reasonseg-test-7-0 (row 0)"
    assert re.search(message, problem["detail"])


def test_hosted_ids_and_sizes_are_checked(tmp_path):
    rows = hosted_rows([MASK.tolist()] * 3, ann_id=["0"] * 3, text=["a", "a", "b"], img_height=[HEIGHT, HEIGHT, 99])
    dataset, report = hosted(tmp_path, rows)
    assert dataset["sample_id"][:] == ["reasonseg-test-7-0", "reasonseg-test-7-0-2"]
    assert report.counts == {"duplicate_id": 2, "wrong_size": 1} and report.num_lost == 1


def test_hosted_splits_and_files(tmp_path):
    rows = hosted_rows([MASK.tolist()])
    hosted(tmp_path, rows)
    hosted(tmp_path, rows, "data/validation-0000.parquet", split="val")
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    assert from_hosted_reasonseg(tmp_path, "validation")["split"][:] == ["validation"]
    assert len(from_hosted_reasonseg(file)) == 1
    with pytest.raises(ValueError, match="is of split 'test' by its name, not of 'val'"):
        from_hosted_reasonseg(file, "val")
    with pytest.raises(FileNotFoundError, match="no Parquet file of split 'train' .* there are files of test, val"):
        from_hosted_reasonseg(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no file or folder '.*nowhere', and it is no Hub id"):
        from_hosted_reasonseg(tmp_path / "nowhere")
    file.write_bytes(file.read_bytes()[:-30])
    report = BuildReport()
    with pytest.raises(ValueError, match="no complete Parquet file .* cut short"):
        from_hosted_reasonseg(file, report=report)
    assert report.counts == {"bad_parquet": 1}
    pq.write_table(pa.table({"image": [jpeg()], "mask": [MASK.tolist()]}), file)
    with pytest.raises(ValueError, match="no column text, image_id, ann_id; it has image, mask"):
        from_hosted_reasonseg(file)
    with pytest.raises(ValueError, match="hosted-reasonseg-test has no row that can be used: .* 1 lost.*empty_mask"):
        hosted(tmp_path, hosted_rows([np.zeros_like(MASK).tolist()]))
