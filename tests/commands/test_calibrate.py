"""`segcompass calibrate`: what it writes, and that it writes nothing where it fails."""

import json
import shutil

import pytest

import segcompass_hf
from segcompass_hf import evaluation
from segcompass_hf.checkpoint import load_checkpoint
from segcompass_hf.cli import main
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.metrics import segmentation_metrics

FITTED = {"features": {"mask_certainty": {"mean": 0.9, "scale": 0.1, "weight": 1.0}}, "bias": 2.0}
FIGURES = {
    "num_masks": 40,
    "right": 0.75,
    "mean_score": 0.75,
    "expected_calibration_error": 0.125,
    "ranking": 0.875,
    "right_iou": 0.5,
    "num_bins": 15,
}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(segcompass_hf.bundled_checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["score_calibration"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_writes_into_the_configuration(checkpoint, monkeypatch, capsys):
    seen = {}

    def calibrate(predictor, rows, batch_size, with_threshold):
        assert not with_threshold and predictor.slot_logit_threshold is None
        seen.update(rows=[row.sample_id for row in rows], batch_size=batch_size, **predictor.segment_kwargs)
        return FITTED, {"before": FIGURES, "after": FIGURES, "samples": 2, "threshold": None}

    monkeypatch.setattr(evaluation, "calibrate", calibrate, raising=False)
    before = json.loads((checkpoint / "config.json").read_text())
    command = ["calibrate", str(checkpoint), "--dataset", "scenes:val:11", "--num-samples", "2"]
    assert main([*command, "--max-new-tokens", "40"]) == 0
    assert len(seen["rows"]) == 2 and seen["max_new_tokens"] == 40
    after = json.loads((checkpoint / "config.json").read_text())
    written = after.pop("score_calibration")
    assert written["bias"] == 2.0 and written["features"] == FITTED["features"]
    assert written["fit"]["dataset"] == "scenes val seed 11" and written["fit"]["samples"] == 2
    before.pop("score_calibration")
    assert after == before
    assert segcompass_hf.SegCompassConfig.from_pretrained(checkpoint).score_calibration == written
    assert "expected calibration error 0.125" in capsys.readouterr().out
    assert [path.name for path in checkpoint.iterdir() if ".part" in path.name] == []


def test_a_threshold_is_chosen_where_it_is_asked_for(checkpoint, monkeypatch, capsys):
    """Of the bundled checkpoint's own answers, which are calibrated already."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"score_calibration": FITTED}))
    monkeypatch.setattr(evaluation.calibration, "MIN_MASKS", 0)
    command = ["calibrate", str(checkpoint), "--dataset", "scenes:val:11", "--num-samples", "8", "--json"]
    assert main([*command, "--threshold"]) == 0
    printed = json.loads(capsys.readouterr().out)
    after = segcompass_hf.SegCompassConfig.from_pretrained(checkpoint)
    chosen = printed["threshold"]["slot_logit_threshold"]
    assert after.slot_logit_threshold == chosen != config["slot_logit_threshold"]
    assert after.score_calibration["fit"]["num_masks"] == printed["after"]["num_masks"]
    model, processor, _ = load_checkpoint(str(checkpoint))
    rows = list(scenes.iterate("val", 8, seed=11))
    answers = evaluation.ModelPredictor(model, processor).predict(rows)
    masks = [decode_masks(row["masks"], row["image"].size[::-1]) for row in rows]
    found = segmentation_metrics([answer.masks for answer in answers], masks)
    assert found == pytest.approx({name: printed["threshold"][name] for name in found})


def test_too_few_wrong_masks_leave_the_checkpoint_as_it_was(checkpoint, capsys):
    before = (checkpoint / "config.json").read_bytes()
    assert main(["calibrate", str(checkpoint), "--dataset", "scenes:val:11", "--num-samples", "2"]) == 2
    assert "needs at least 10 of each" in capsys.readouterr().err
    assert (checkpoint / "config.json").read_bytes() == before


def test_no_checkpoint(tmp_path, capsys):
    assert main(["calibrate", str(tmp_path), "--dataset", "scenes:val"]) == 2
    assert "holds no config.json" in capsys.readouterr().err
