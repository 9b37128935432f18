"""The fit of calibrated scores."""

import numpy as np
import pytest
import torch

from segcompass_hf.configuration_segcompass import SCORE_FEATURES
from segcompass_hf.evaluation import fit_calibration
from segcompass_hf.metrics import expected_calibration_error
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
