# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A folder of one's own: its splits, and `examples/finetune_folder.py` from the command line to an adapter."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from scripts import module

from segcompass_hf.data import BuildReport, build_folder, scenes
from segcompass_hf.data.builders.splitting import build_folder_splits, split_by_image
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.evaluation import Prediction
from segcompass_hf.training.segmentation.own_reasoning import with_own_reasoning

POLYGON = [[[2, 3, 7, 3, 7, 8, 2, 8]]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path) -> Path:
    """Six images, each with two lines and no split."""
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for number in range(6):
        Image.new("RGB", (30, 20)).save(root / f"{number}.png")
        lines += [{"image": f"{number}.png", "instruction": words, "masks": POLYGON} for words in ("one", "two")]
    write(root / "annotations.jsonl", lines)
    return root


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_rows_of_an_image_stay_together(root):
    train, held_out = build_folder_splits(root, held_out_share=1 / 3)
    assert (len(train), len(held_out)) == (8, 4)  # 4 and 2 of the images, each with two lines
    assert not set(train["image_id"]) & set(held_out["image_id"])
    assert len({tuple(sorted(set(build_folder_splits(root, seed=s)[1]["image_id"]))) for s in range(8)}) > 1


def test_an_image_is_one_however_lines_spell_its_path(root):
    (root / "images").mkdir()
    (root / "0.png").rename(root / "images" / "0.png")
    lines = lines_of(root / "annotations.jsonl")
    lines[1]["image"] = "images/0.png"  # the first line says "0.png"
    write(root / "annotations.jsonl", lines)
    for seed in range(6):
        train, held_out = build_folder_splits(root, seed=seed)
        assert not set(train["image_id"]) & set(held_out["image_id"]) and len(train) % 2 == len(held_out) % 2 == 0


def test_which_images_are_held_out_does_not_depend_on_the_order_of_lines(root):
    before = set(build_folder_splits(root)[1]["image_id"])
    write(root / "annotations.jsonl", lines_of(root / "annotations.jsonl")[::-1])
    assert set(build_folder_splits(root)[1]["image_id"]) == before


def test_a_column_counts_and_broken_lines_are_listed_once(root):
    lines = lines_of(root / "annotations.jsonl")
    for number, line in enumerate(lines):
        line["split"] = ("train", "train", "validation", "other")[number % 4]
    lines[0]["image"] = "missing.png"
    lines[2]["masks"] = [[[2, 3, 7, 3]]]  # two points
    write(root / "annotations.jsonl", lines)
    with open(root / "annotations.jsonl", "a") as file:
        file.write('{"image": "0.png", "instr')
    report = BuildReport()
    train, held_out = build_folder_splits(root, report=report)
    assert (len(train), len(held_out)) == (5, 2)  # of 6 and 3
    assert report.num_rows == 7 and report.num_lost == 3 and report.left_out == {"other splits": 3}
    assert {problem["where"] for problem in report.problems} == {
        "annotations.jsonl line 1",
        "annotations.jsonl line 3",
        "annotations.jsonl line 13",
    }
    assert report.counts["missing_image"] == report.counts["bad_json"] == 1


@pytest.mark.parametrize("layout", ["{}.jsonl", "{}/annotations.jsonl"])
def test_files_of_the_splits_count(root, layout):
    lines = lines_of(root / "annotations.jsonl")
    (root / "annotations.jsonl").unlink()
    for name, part in {"train": lines[:10], "val": lines[10:], "test": lines[:2]}.items():
        path = root / layout.format(name)
        path.parent.mkdir(exist_ok=True)
        write(path, part)
    train, held_out = build_folder_splits(root)
    assert (len(train), len(held_out)) == (10, 2)
    assert set(held_out["split"]) == {"val"}


def test_images_in_both_splits_are_named(root, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("segcompass_hf"), "propagate", True)
    lines = lines_of(root / "annotations.jsonl")
    for number, line in enumerate(lines):
        line["split"] = ("train", "val")[number % 2]
    write(root / "annotations.jsonl", lines)
    build_folder_splits(root)
    assert "6 images are both in train and in val (first: '0.png')" in caplog.text


def test_what_cannot_be_split_is_refused(root):
    with pytest.raises(ValueError, match=r"share is 1.0; expected a number in \(0, 1\)"):
        build_folder_splits(root, held_out_share=1.0)
    rows = build_folder_splits(root)[0]
    with pytest.raises(ValueError, match="all 2 rows are about one image"):
        split_by_image(rows.select([0, 1]))


def run(monkeypatch, folder: Path, output: Path, **flags) -> None:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "lora_r": 4}
    words = ["finetune_folder.py", "--folder", str(folder), "--output_dir", str(output), "--use_cpu"]
    for name, value in (settings | {"disable_tqdm": "true"} | flags).items():
        words += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    module("examples/finetune_folder.py").main()


def test_a_folder_without_annotations_or_pictures_ends_with_one_line(monkeypatch, tmp_path):
    (tmp_path / "pictures").mkdir()
    for folder, words in {"pictures": "there is no annotations.jsonl", "nothing": "there is no folder"}.items():
        with pytest.raises(SystemExit, match=f"^error: {words}"):
            run(monkeypatch, tmp_path / folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_example_trains_saves_an_adapter_and_can_be_resumed(monkeypatch, tmp_path, capsys):
    from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
    from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset
    from segcompass_hf.training.adapters import load_adapter

    root, output, lines = tmp_path / "pictures", tmp_path / "out", []
    root.mkdir()
    for number, row in enumerate(scenes.iterate("val", 6, seed=5)):
        row["image"].save(root / f"{number}.png")
        line = {"image": f"{number}.png", "instruction": row["instruction"], "masks": row["masks"]}
        reasoning = {"reasoning": row["reasoning"]} if number % 2 else {}  # rows may lack it
        lines.append(line | reasoning | {"split": "val" if number > 3 else "train"})
    write(root / "annotations.jsonl", [*lines, lines[0] | {"image": "missing.png"}])

    run(monkeypatch, root, output, max_steps=1)
    run(monkeypatch, root, output)
    printed = capsys.readouterr().out
    assert "6 rows, 1 lost. Problems: missing_image x 1 (first: annotations.jsonl line 7" in printed
    assert "after-2-steps" in printed
    assert json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["train_rows"], summary["left_out_rows"], summary["held_out_rows"]) == (4, 0, 2)
    assert "train_rows 4 left_out_rows 0" in printed
    assert list(summary["metrics"]) == ["before", "after-2-steps"]

    assert not (output / "model.safetensors").exists()
    base = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint())
    model = load_adapter(base, output).get_base_model().eval()
    adapters = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert adapters and any(torch.count_nonzero(value) for value in adapters)  # they start at 0
    _, held_out = build_folder_splits(root)
    predictor = ModelPredictor(model, SegCompassProcessor.from_pretrained(output))
    again = evaluate_dataset(predictor, held_out, tmp_path / "again")
    assert again.metrics == pytest.approx(summary["metrics"]["after-2-steps"])


class Thinker:
    """Thinks about every row, and finds the masks of those whose instruction is not in `misses`."""

    name = "thinker"

    def __init__(self, rows, misses=()):
        self.masks = {row["instruction"]: decode_masks(row["masks"], row["image"].size[::-1]) for row in rows}
        self.misses = misses

    def predict(self, rows):
        found = [self.masks[row["instruction"]] for row in rows]
        found = [
            ~masks.any(0)[None] if row["instruction"] in self.misses else masks
            for row, masks in zip(rows, found, strict=True)
        ]
        return [
            Prediction(masks, reasoning=f"I see {row['instruction']} {row['image'].size}")
            for row, masks in zip(rows, found, strict=True)
        ]


@pytest.fixture
def rows_with_one_reasoning(root):
    lines = lines_of(root / "annotations.jsonl")[:4]
    lines[2]["reasoning"] = "known"
    for number, line in enumerate(lines):
        line["instruction"] = f"thing {number}"
    write(root / "annotations.jsonl", lines)
    return build_folder(root)


def test_rows_without_reasoning_get_the_model_s_own(rows_with_one_reasoning):
    rows = rows_with_one_reasoning
    filled = with_own_reasoning(rows, Thinker(rows), batch_size=2)
    expected = [f"I see thing {number} (30, 20)" for number in range(4)]
    expected[2] = "known"
    assert list(filled["reasoning"]) == expected
    assert filled.features == rows.features and filled.column_names == rows.column_names
    assert with_own_reasoning(filled, None) is filled
    without = rows.remove_columns("reasoning")
    expected[2] = "I see thing 2 (30, 20)"
    assert list(with_own_reasoning(without, Thinker(rows), batch_size=2)["reasoning"]) == expected


def test_damaged_images_are_left_out_and_named(rows_with_one_reasoning, root, caplog, monkeypatch):
    from transformers.utils import logging

    for name in ("transformers", "segcompass_hf"):
        monkeypatch.setattr(logging.get_logger(name), "propagate", True)
    picture = root / "0.png"  # of things 0 and 1
    Image.effect_noise((30, 20), 90).save(picture, "JPEG")
    picture.write_bytes(picture.read_bytes()[:-200])  # its header, which the builder reads, is whole
    rows = build_folder(root)
    filled = with_own_reasoning(rows, Thinker(rows_with_one_reasoning.select([2, 3])), batch_size=2)
    assert list(filled["instruction"]) == ["thing 2", "thing 3"]
    assert "row 0 (" in caplog.text and "row 1 (" in caplog.text and "is unreadable and left out" in caplog.text
    assert "1 got the model's own, 0 are left out" in caplog.text and "2 because their image" in caplog.text
    with pytest.raises(ValueError, match="no row's image and masks can be read"):
        with_own_reasoning(rows.select([0, 1]), None)


def test_rows_whose_own_reasoning_leads_elsewhere_stay_unless_min_iou_leaves_them_out(rows_with_one_reasoning):
    rows = rows_with_one_reasoning
    wrong = Thinker(rows, misses=["thing 0", "thing 2"])
    kept = with_own_reasoning(rows, wrong)
    expected = [f"I see thing {number} (30, 20)" for number in range(4)]
    assert list(kept["reasoning"]) == [*expected[:2], "known", expected[3]]
    filled = with_own_reasoning(rows, wrong, min_iou=0.5)
    assert list(filled["instruction"]) == ["thing 1", "thing 2", "thing 3"]  # thing 2 has reasoning and is not asked
    assert list(filled["reasoning"])[1] == "known"
    alone = rows.select([0, 1])
    everything_wrong = Thinker(rows, misses=["thing 0", "thing 1"])
    assert len(with_own_reasoning(alone, everything_wrong)) == 2
    with pytest.raises(ValueError, match=r"led to other masks in every row \(IoU below 0.5\); lower min_iou"):
        with_own_reasoning(alone, everything_wrong, min_iou=0.5)


def test_rows_whose_text_the_model_refuses_are_left_out_and_named(rows_with_one_reasoning, caplog, monkeypatch):
    from transformers.utils import logging

    def refuse(row):
        if row["instruction"] == "thing 1":
            raise ValueError("too long")

    for name in ("transformers", "segcompass_hf"):
        monkeypatch.setattr(logging.get_logger(name), "propagate", True)
    rows = rows_with_one_reasoning
    thinker = Thinker(rows)
    thinker.check_row = refuse
    assert list(with_own_reasoning(rows, thinker)["instruction"]) == ["thing 0", "thing 2", "thing 3"]
    assert f"row 1 ({rows[1]['sample_id']}) is unreadable and left out: ValueError: too long" in caplog.text
