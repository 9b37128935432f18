"""The fit of calibrated scores."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.utils import logging

from segcompass_hf.configuration_segcompass import SCORE_FEATURES
from segcompass_hf.evaluation import calibrate, fit_calibration
from segcompass_hf.evaluation.report import calibration_lines
from segcompass_hf.evaluation.rows import EvaluationRow
from segcompass_hf.hub.publishing.card_facts import scores_table
from segcompass_hf.metrics import calibration_figures, expected_calibration_error
from segcompass_hf.scoring_segcompass import calibrated_scores

from ..support import tiny


def made(number: int = 4000, seed: int = 0):
    """Features, and masks that are right with a chance of sigmoid(1 - 2 x + y), x and y standardised as below."""
    generator = np.random.default_rng(seed)
    features = np.column_stack(
        [
            generator.normal(10.0, 2.0, number),  # says nothing
            generator.normal(0.5, 0.25, number),
            generator.normal(0.9, 0.05, number),
        ]
    )
    logits = 1.0 - 2.0 * (features[:, 1] - 0.5) / 0.25 + 1.0 * (features[:, 2] - 0.9) / 0.05
    return features, generator.random(number) < 1 / (1 + np.exp(-logits))


def test_finds_the_coefficients_that_made_the_masks():
    features, is_right = made()
    fitted = fit_calibration(features, is_right)
    weights = {name: entry["weight"] for name, entry in fitted["features"].items()}
    assert weights["reasoning_surprisal"] == pytest.approx(-2.0, abs=0.2)
    assert weights["mask_certainty"] == pytest.approx(1.0, abs=0.15)
    assert abs(weights.get("slot_logit", 0.0)) < 0.1 and fitted["bias"] == pytest.approx(1.0, abs=0.15)
    unseen, right = made(seed=1)
    scores = calibrated_scores(torch.from_numpy(unseen), fitted)
    assert expected_calibration_error(scores, right) < 0.03
    tiny.tiny_config(score_calibration=fitted)  # what a configuration takes


def test_wrong_signs_are_left_out():
    # The surer the slot, the wronger the mask: chance of a sample, never a reason for a lower score.
    features, is_right = made()
    features[:, 0] -= 5.0 * is_right
    fitted = fit_calibration(features, is_right)
    assert set(fitted["features"]) == {"reasoning_surprisal", "mask_certainty"}


def test_a_feature_that_is_always_the_same_or_missing():
    features, is_right = made()
    features[:, 0], features[::2, 1] = 3.0, np.nan
    fitted = fit_calibration(features, is_right)
    assert set(fitted["features"]) == {"reasoning_surprisal", "mask_certainty"}
    assert fitted["features"]["reasoning_surprisal"]["mean"] == pytest.approx(0.5, abs=0.02)
    nothing = fit_calibration(np.full_like(features, np.nan), is_right)
    share = is_right.mean()
    assert nothing["features"] == {} and nothing["bias"] == pytest.approx(np.log(share / (1 - share)), abs=1e-6)


def test_separable_masks_give_finite_weights():
    features = np.column_stack([np.zeros(40), np.zeros(40), np.repeat([0.2, 0.9], 20)])
    fitted = fit_calibration(features, np.repeat([False, True], 20))
    assert 0 < fitted["features"]["mask_certainty"]["weight"] < 50


@pytest.mark.parametrize("right, wrong", [(9, 30), (30, 9), (0, 0)])
def test_too_few_masks(right, wrong):
    is_right = [True] * right + [False] * wrong
    with pytest.raises(ValueError, match=f"{right} masks are right and {wrong} wrong"):
        fit_calibration(np.zeros((len(is_right), len(SCORE_FEATURES))), is_right)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_calibrate_judges_the_masks_that_users_see(monkeypatch):
    # 40 rows of one mask each; the first half is right (the target itself), the others meet nothing. Row 40 cannot be
    # read, and row 41's mask lies under `ignore`.
    mask = np.zeros((1, 4, 4), dtype=bool)
    mask[0, :2] = True

    class Model:
        def score_features(self, slot_logits, pred_masks, reasoning_surprisal, sizes):
            return torch.stack([slot_logits, 0 * slot_logits, pred_masks[:, :, 0, 0]], dim=-1)

    class Predictor:
        model = Model()

        def segment(self, rows):
            certainty = torch.tensor([[[[row["certainty"]]], [[0.0]]] for row in rows])
            output = SimpleNamespace(
                slot_logits=torch.tensor([[9.0, -9.0]] * len(rows)), pred_masks=certainty, reasoning_surprisal=None
            )
            result = {"slots": torch.tensor([0]), "masks": torch.from_numpy(mask)}
            return output, None, [result] * len(rows)

    rows = [EvaluationRow(i, {"certainty": 0.9 if i < 20 else 0.3}, mask if i < 20 else ~mask) for i in range(40)]
    rows += [EvaluationRow(40, {}, problem="broken"), EvaluationRow(41, {"certainty": 0.5}, mask, mask[0])]
    monkeypatch.setattr(sys, "stderr", Terminal())
    logging.enable_progress_bar()
    calibration, figures = calibrate(Predictor(), rows, batch_size=7)
    assert "calibration: 100%" in sys.stderr.getvalue() and " 42/42 [" in sys.stderr.getvalue()
    assert set(calibration["features"]) == {"mask_certainty"} and figures["samples"] == 41
    before, after = figures["before"], figures["after"]
    assert before["num_masks"] == 40 and before["right"] == 0.5
    assert before["expected_calibration_error"] == pytest.approx(0.5, abs=1e-3)  # sigmoid(9) each, half of them right
    assert after["ranking"] == 1.0 and after["expected_calibration_error"] < 0.1
    assert figures["threshold"] is None


def test_calibrate_fits_what_the_chosen_threshold_shows():
    # Of the 60 masks, 20 of a confidence of -1 to -3 are right, as are 10 of those of 2; the others meet nothing.
    mask = np.zeros((1, 4, 4), dtype=bool)
    mask[0, :2] = True

    class Predictor:
        class model:
            @staticmethod
            def score_features(slot_logits, pred_masks, reasoning_surprisal, sizes):
                return torch.stack([slot_logits, 0 * slot_logits, 0 * slot_logits + 0.5], dim=-1)

        def segment(self, rows):
            logits = torch.tensor([[row["logit"]] for row in rows])
            output = SimpleNamespace(slot_logits=logits, pred_masks=logits[..., None, None], reasoning_surprisal=None)
            result = {"slots": torch.tensor([0]), "masks": torch.from_numpy(mask)}
            return output, None, [result] * len(rows)

    def row(index, logit, is_right):
        return EvaluationRow(index, {"logit": logit}, mask if is_right else mask[:0])

    rows = [row(i, 2.0, i < 10) for i in range(20)] + [row(i, 1.0 if i < 30 else -1.0, i < 30) for i in range(20, 60)]
    calibration, figures = calibrate(Predictor(), rows, batch_size=7, with_threshold=True)
    # gIoU: 40 of 60 with nothing shown; below 2 as many; below 1 ten more; below -1 thirty fewer.
    assert figures["threshold"] == {
        "slot_logit_threshold": 0.0,
        "gIoU": 50 / 60,
        "cIoU": 20 / 30,
        "N-acc": 30 / 40,
        "T-acc": 1.0,
    }
    assert figures["after"]["num_masks"] == 30 and figures["after"]["right"] == pytest.approx(20 / 30)
    # The surer masks are wrong more often, which no feature may say: the share of right ones is left.
    assert calibration["features"] == {} and calibration["bias"] == pytest.approx(np.log(2), abs=1e-6)


def test_reports_say_what_scores_are_worth():
    scores = calibration_figures([1.0, 1.0, 0.5], [0.9, 0.1, 0.6])
    figures = {"calibration": scores, "counts": {"duplicates": 2, "duplicates_dropped": 3}}
    (line,) = calibration_lines(figures)
    # bins: 1.0 (half right: 0.5 of 2 masks) and 0.5 (right: 0.5 of 1): the error is 0.5
    assert "3 masks: mean 0.833, 0.667 of the masks right" in line and "calibration error 0.500" in line
    assert "2 masks show an object that another" in line and "3 such masks were left out" in line
    assert calibration_lines({"calibration": None, "counts": {}}) == []


def test_the_card_shows_them():
    run = {"dataset": "scenes val", "calibration": calibration_figures([0.9, 0.3], [0.9, 0.1])}
    table = scores_table([run | {"counts": {"duplicates": 0}}, {"dataset": "old", "counts": {}}])
    assert "| scenes val | 2 | 0.600 | 0.500 | 0.200 | 1.000 | 0 |" in table and "old" not in table
    assert scores_table([{"dataset": "old"}]) == ""
