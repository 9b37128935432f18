"""Predictions of other models in a folder: PNGs and JSONLs, and everything that can be wrong with them."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_image, tiny_mask

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation import evaluate_dataset
from segcompass_hf.evaluation.predictors.external import FolderPredictor, prediction_file_name

IDS = ["val/1", "val/2", "../3"]


def row(sample_id, targets=()):
    """A row on a 40 x 30 picture."""
    return {
        "image": tiny_image(),
        "instruction": "the red circle",
        "masks": [encode_mask(mask) for mask in targets],
        "sample_id": sample_id,
    }


def save(folder, sample_id, values):
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(folder / prediction_file_name(sample_id))


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def line(sample_id, masks, **fields):
    return {"sample_id": sample_id, "masks": [encode_mask(mask) for mask in masks], **fields}


def predict(folder, *sample_ids, **kwargs):
    return FolderPredictor(folder, **kwargs).predict([row(sample_id) for sample_id in sample_ids])


def test_file_names_are_safe_and_distinct():
    assert prediction_file_name("refcoco-unc/val/7-0") == "refcoco-unc%2Fval%2F7-0.png"
    assert prediction_file_name("../../etc") == "..%2F..%2Fetc.png"
    assert prediction_file_name("a%2Fb c:é") == "a%252Fb%20c%3A%C3%A9.png"
    long = ["x" * 400, "x" * 399 + "y"]
    names = [prediction_file_name(sample_id) for sample_id in long]
    assert len(set(names)) == 2 and max(map(len, names)) <= 255


def test_pngs_binary_instances_and_empty(tmp_path):
    stripes = tiny_mask(3)  # 13 columns each
    save(tmp_path, IDS[0], stripes[0] * 255)
    save(tmp_path, IDS[1], stripes[0] * 1 + stripes[1] * 2 + stripes[2] * 7)
    save(tmp_path, IDS[2], stripes[0] * 0)
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    predictor = FolderPredictor(tmp_path, IDS)
    one, three, none = predictor.predict([row(sample_id) for sample_id in IDS])
    assert np.array_equal(one.masks, stripes[:1])
    assert np.array_equal(three.masks, stripes)
    assert none.masks.shape == (0, 30, 40)
    assert predictor.extra == [] and predictor.name == tmp_path.name


@pytest.mark.parametrize("as_file", [False, True])
def test_jsonl_with_scores_and_words(tmp_path, as_file):
    stripes, blank = tiny_mask(2), np.zeros((30, 40), bool)
    path = tmp_path / "model.jsonl"
    runs = {"size": [30, 40], "counts": [30, 60, 30 * 40 - 90]}  # COCO counts down the columns: columns 1 and 2
    square = [[4, 4, 8, 4, 8, 8, 4, 8]]
    write_lines(
        path,
        line(IDS[0], [stripes[1], blank], scores=[0.75, 0], reasoning="left", text="<think>left</think>"),
        {"sample_id": IDS[1], "masks": []},
        {"sample_id": IDS[2], "masks": [runs, square]},
    )
    predictor = FolderPredictor(path if as_file else tmp_path, IDS)
    first, second, third = predictor.predict([row(sample_id) for sample_id in IDS])
    assert np.array_equal(first.masks, [stripes[1], blank])  # a mask without a pixel keeps its place and score
    assert (first.scores, first.reasoning, first.text) == ([0.75, 0.0], "left", "<think>left</think>")
    assert second.masks.shape == (0, 30, 40) and second.scores == [] and second.text is None
    expected = np.zeros((30, 40), bool)
    expected[:, 1:3] = True
    assert np.array_equal(third.masks[0], expected) and third.masks[1].sum() == 16
    assert predictor.name == ("model" if as_file else tmp_path.name)


@pytest.mark.parametrize(
    "scores", [[87.5], [-3.0], [1.01], [float("nan")], [True], ["0.5"], [10**400], 0.5, 0, "", {}]
)
def test_scores_are_probabilities_and_nothing_else(tmp_path, scores):
    """Percent or logits would give a calibration error that means nothing."""
    write_lines(tmp_path / "model.jsonl", line("a", tiny_mask(1), scores=scores))
    with pytest.raises(ValueError, match=r'the prediction of \'a\' in .*"scores" is .* number in \[0, 1\] per mask'):
        predict(tmp_path, "a")


def test_lines_of_nothing_but_brackets(tmp_path):
    (tmp_path / "model.jsonl").write_text('{"sample_id": "a", "masks": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"model.jsonl, line 1 is no json"):
        predict(tmp_path, "a")


def test_missing_predictions_stop_with_their_number_or_count_as_empty(tmp_path):
    ids = [f"s/{index}" for index in range(9)]
    save(tmp_path, ids[0], tiny_mask()[0])
    with pytest.raises(ValueError, match=r"no prediction for 8 of 9 samples: 's/1', .*'s/5', \.\.\.\. .*'s%2F1.png'"):
        FolderPredictor(tmp_path, ids)
    with pytest.raises(ValueError, match="no prediction for 1 of 2 samples in this batch: 's/4'"):
        predict(tmp_path, "s/0", "s/4")
    predictor = FolderPredictor(tmp_path, ids, missing="empty")
    assert predictor.missing_ids == ids[1:] and predictor.settings["num_missing"] == 8
    predictions = predictor.predict([row(sample_id) for sample_id in ids[:3]])
    assert [len(prediction.masks) for prediction in predictions] == [1, 0, 0]
    assert predictor.num_missing == 2
    with pytest.raises(ValueError, match="missing is 'skip'"):
        FolderPredictor(tmp_path, missing="skip")


def test_what_belongs_to_no_sample_is_listed(tmp_path):
    save(tmp_path, "val/1", tiny_mask()[0])
    save(tmp_path, "val/9", tiny_mask()[0])
    write_lines(tmp_path / "more.jsonl", line("val/2", []), line("val/8", []))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "val").mkdir()
    assert FolderPredictor(tmp_path).extra == ["notes.txt", "val/"]
    predictor = FolderPredictor(tmp_path, ["val/1", "val/2"])
    assert sorted(predictor.extra) == ["notes.txt", "val%2F9.png", "val/", "val/8"]
    with pytest.raises(
        ValueError, match="no prediction for 1 of 1 samples: 'nine'.*unused there: 'notes.txt', 'val/'"
    ):
        FolderPredictor(tmp_path, ["nine"])


def test_wrong_sizes_are_named(tmp_path):
    save(tmp_path, "turned", tiny_mask()[0].T)
    save(tmp_path, "small", np.ones((15, 20)))
    write_lines(tmp_path / "lines.jsonl", line("line", [tiny_mask()[0], np.ones((8, 8))]))
    with pytest.raises(ValueError, match=r"'turned' in .*turned.png.*\(40, 30\) but the image is \(30, 40\).*transp"):
        predict(tmp_path, "turned")
    with pytest.raises(ValueError, match=r"'small'.*\(15, 20\) but the image is \(30, 40\)"):
        predict(tmp_path, "small")
    with pytest.raises(ValueError, match=r"'line' in .*lines.jsonl.*mask 1: the RLE is \[8, 8\] .*\[30, 40\]"):
        predict(tmp_path, "line")


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n no image")
    with pytest.raises(ValueError, match="'broken' in .*broken.png.*cannot be read as an image"):
        predict(tmp_path, "broken")
    lines = tmp_path / "lines.jsonl"
    for text, message in (
        ('{"sample_id": "a", "masks": []}\n{"sample_id": "b", "ma', "line 2 is no json .*cut short"),
        ('{"sample_id": "a"}\n', r"line 1 holds \['sample_id'\]; expected"),
        ('{"sample_id": 7, "masks": []}\n', 'line 1 holds .* expected an object with "sample_id" .a text.'),
        ("[]\n", "line 1 holds list"),
        ('{"sample_id": "a", "masks": []}\n\n{"sample_id": "a", "masks": []}\n', "'a' has two predictions, in"),
    ):
        lines.write_text(text)
        with pytest.raises(ValueError, match=message):
            FolderPredictor(tmp_path)
    for fields, message in (
        ({"masks": None}, '"masks" is None'),
        ({"masks": [{"size": [30, 40], "counts": "%%"}]}, "mask 0: RLE counts"),
        ({"masks": [], "scores": ["high"]}, '"scores" is'),
        ({"masks": [], "scores": [0.5]}, "0 masks but 1 scores"),
        ({"masks": [], "text": 3}, '"text" is a int'),
    ):
        write_lines(lines, {"sample_id": "a", **fields})
        with pytest.raises(ValueError, match=f"'a' in .*{message}"):
            predict(tmp_path, "a")


GRID = np.zeros((30, 40), int)
GRID[5:20, 5:20] = 1
CORNERS = [5, 5, 20, 5, 20, 20, 5, 20]
POINTS = [[5, 5], [20, 5], [20, 20], [5, 20]]


def masks_in(tmp_path, masks):
    write_lines(tmp_path / "lines.jsonl", {"sample_id": "a", "masks": masks})
    return predict(tmp_path, "a")[0].masks


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([CORNERS], GRID),
        (CORNERS, GRID),
        ([POINTS], GRID),
        (POINTS, GRID),
        ([CORNERS, [0, 0, 5, 0, 5, 5, 0, 5]], GRID + np.pad(np.ones((5, 5), int), ((0, 25), (0, 35)))),
        ({"size": [30, 40], "counts": [5 * 30 + 5, *[15, 15] * 14, 15, 10 + 20 * 30]}, GRID),
        ({"size": [30, 40], "counts": [float(run) for run in (5 * 30 + 5, *[15, 15] * 14, 15, 610)]}, GRID),
        ({"size": [30, 40], "counts": [1200]}, GRID * 0),  # a model may well predict a mask without a pixel
        (encode_mask(GRID * 0), GRID * 0),
        ([], GRID * 0),
        ([[]], GRID * 0),
    ],
)
def test_forms_of_masks(tmp_path, mask, expected):
    assert np.array_equal(masks_in(tmp_path, [mask]), expected[None])
    assert np.array_equal(masks_in(tmp_path, [encode_mask(GRID), mask]), [GRID, expected])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            [[[value / (30 if i % 2 else 40) for i, value in enumerate(CORNERS)]]],
            "all coordinates lie between 0 and 1",
        ),
        ([[[0, 0, 1, 0, 1, 1, 0, 1]]], "all coordinates lie between 0 and 1"),  # it would cover a pixel
        ([[[5, 5, 20, 20]]], "no polygon of three or more points among 1. Is it a box"),
        ([[5, 5, 20, 20]], "no polygon of three or more points among 1. Is it a box"),
        ([[[5, 5, 20, 20], [22, 22, 30, 30]]], "no polygon of three or more points"),
        ([[[5, 5]]], "no polygon of three or more points"),
        (POINTS, "no polygon of three or more points"),  # one object per point
        ([5, 5, 20, 20], "mask 0: the segmentation is 5"),
        ([[[5, 5, 5, 5, 5, 5]]], "has no pixel"),
        ([[[50, 35, 60, 35, 60, 38]]], "no pixel inside the image of 30 x 40"),  # beside the image
        ([[[0, 0, 60, 0, 60, 45, 0, 45]]], "is it of another image, of the image in another size"),  # in another size
        ([GRID.tolist()], "30 rows of 40 numbers are a mask written out"),
        (GRID.tolist(), "30 rows of 40 numbers are a mask written out"),
        ([(GRID * 255).tolist()], "30 rows of 40 numbers are a mask written out"),
        ((GRID * 39).tolist(), "30 rows of 40 numbers are a mask written out"),
        ([GRID.astype(float).tolist()], "30 rows of 40 numbers are a mask written out"),
        (GRID.astype(bool).tolist(), "30 rows of 40 numbers are a mask written out"),
        ([[GRID.tolist()]], "no list of finite numbers"),
        ([[{"size": [30, 40], "counts": [1200]}]], "no list of finite numbers"),
        ([{"points": POINTS}], 'an RLE has "size"'),
        ([{"bbox": [5, 5, 15, 15]}], 'an RLE has "size"'),
        ([None], "the segmentation is None"),
        ([True], "the segmentation is True"),
        (["s1.png"], "the segmentation is 's1.png'"),
        ("masks.png", '"masks" is .masks.png'),
        ({"size": [30, 40], "counts": [1200]}, '"masks" is {'),
        ([{"size": [30, 40], "counts": [1199]}], "cover 1199 pixels"),
        ([{"size": [40, 30], "counts": [1200]}], "It looks transposed"),
        ([{"size": [30, 40], "counts": "1é"}], "ASCII"),
        ([{"size": [30, 40], "counts": "\ud800"}], "ASCII"),
    ],
)
def test_what_is_no_mask_is_an_error_and_not_an_empty_prediction(tmp_path, masks, message):
    with pytest.raises(ValueError, match=f"the prediction of 'a' in .*{message}"):
        masks_in(tmp_path, masks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (20 + 200 * GRID, "has the values 20, 220 and nowhere 0"),  # scores of background and object
        (20 + 0 * GRID, "has the values 20 and nowhere 0"),  # scores of an image without object
        (20 + 100 * GRID + np.eye(30, 40, dtype=int), "has the values 20, 21, 120, 121 and nowhere 0"),
        (127 * np.pad(np.ones((17, 17), int), ((4, 9), (4, 19))) + 128 * GRID, "the values 127, 255, .*smooth edges"),
    ],
)
def test_grey_levels_are_no_objects(tmp_path, values, message):
    save(tmp_path, "a", values)
    with pytest.raises(ValueError, match=f"the prediction of 'a' in .*{message}"):
        predict(tmp_path, "a")


@pytest.mark.parametrize("values", [1 + GRID, 1 + 0 * GRID, 255 + 0 * GRID, 100 * GRID, 100 * GRID + 3 * (GRID[::-1])])
def test_objects_may_cover_everything(tmp_path, values):
    save(tmp_path, "a", values)
    assert len(predict(tmp_path, "a")[0].masks) == len(set(values.flat) - {0})


def test_endings_in_capitals(tmp_path):
    Image.fromarray(GRID.astype(np.uint8)).save(tmp_path / "val%2F1.PNG")
    write_lines(tmp_path / "lines.JSONL", line("val/2", [GRID]), line("../3", []))
    one, two, none = FolderPredictor(tmp_path, IDS).predict([row(sample_id) for sample_id in IDS])
    assert np.array_equal(one.masks, two.masks) and one.masks.sum() == 225 and len(none.masks) == 0
    alone = FolderPredictor(tmp_path / "lines.JSONL")
    assert alone.name == "lines" and alone.predict([row("val/2")])[0].masks.sum() == 225
    Image.fromarray(GRID.astype(np.uint8)).save(tmp_path / "val%2F1.png")
    if len(list(tmp_path.iterdir())) == 3:  # a disk that tells capitals
        with pytest.raises(ValueError, match="a sample has two predictions"):
            FolderPredictor(tmp_path)


def test_a_changed_record_of_a_run_is_no_prediction(tmp_path):
    save(tmp_path, "a", GRID)
    evaluate_dataset(FolderPredictor(tmp_path), [row("a", [GRID])], tmp_path / "run", page_samples=0)
    lines = tmp_path / "run" / "samples.jsonl"
    content = lines.read_text()
    lines.write_text(content.replace('"target_pixels": 225', '"target_pixels": 226'))
    with pytest.raises(ValueError, match="'a' in .*samples.jsonl.* has changed since it was written"):
        predict(lines, "a")
    lines.write_text(content)
    assert predict(lines, "a")[0].masks.sum() == 225


def test_one_sample_has_one_prediction(tmp_path):
    save(tmp_path, "a", tiny_mask()[0])
    write_lines(tmp_path / "lines.jsonl", line("a", []))
    with pytest.raises(ValueError, match="'a' has two predictions, 'a.png' and a line of 'lines.jsonl'"):
        predict(tmp_path, "a")
    with pytest.raises(ValueError, match=r"stand for several samples \('b'\)"):
        FolderPredictor(tmp_path, ["b", "b"])
    with pytest.raises(ValueError, match="a row has no sample_id"):
        predict(tmp_path, None)


def test_folders_without_predictions(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of predictions"):
        FolderPredictor(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no predictions .found: nothing."):
        FolderPredictor(tmp_path)
    (tmp_path / "mask.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no predictions .found: 'mask.jpg'."):
        FolderPredictor(tmp_path)


def test_settings_change_with_the_masks(tmp_path):
    save(tmp_path, "a", tiny_mask()[0])
    before = FolderPredictor(tmp_path).settings
    assert FolderPredictor(tmp_path).settings == before
    save(tmp_path, "a", 1 - tiny_mask()[0])
    assert FolderPredictor(tmp_path).settings != before


def test_results_of_a_run_can_be_evaluated_again(tmp_path):
    stripes = tiny_mask(4)
    rows = [row("val/1", stripes[:1]), row("val/2", stripes[2:]), row("val/3")]
    masks = tmp_path / "masks"
    masks.mkdir()
    save(masks, "val/1", stripes[0])
    save(masks, "val/2", stripes[1] * 1 + stripes[2] * 2)  # 300 of 900 pixels are right
    ids = [one["sample_id"] for one in rows]
    first = evaluate_dataset(FolderPredictor(masks, ids, "empty"), rows, tmp_path / "run", batch_size=2)
    assert first.metrics["gIoU"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert first.metrics["N-acc"] == 1.0
    again = evaluate_dataset(
        FolderPredictor(tmp_path / "run" / "samples.jsonl", ids), rows, tmp_path / "again", batch_size=1
    )
    assert again.metrics == first.metrics
    contents = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "again")]
    assert contents[0] == contents[1]
