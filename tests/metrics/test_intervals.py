"""Bootstrap intervals: known cases by hand, the draws that earlier figures were made with, and bad input."""

import numpy as np
import pytest

from segcompass_hf import explain
from segcompass_hf.metrics import SampleScore, bootstrap_intervals
from segcompass_hf.metrics.intervals import bootstrap_interval, bootstrap_ratios, bootstrap_statistic


def test_statistic_by_hand():
    values = np.arange(100.0)
    figure = bootstrap_statistic(lambda draw: values[draw].mean(), 100, num_resamples=2000)
    # mean 49.5, standard error 28.87 / 10
    assert figure["value"] == 49.5
    assert figure["low"] == pytest.approx(49.5 - 1.96 * 2.887, abs=0.6)
    assert figure["high"] == pytest.approx(49.5 + 1.96 * 2.887, abs=0.6)
    assert bootstrap_statistic(lambda draw: float("nan"), 3) == {"value": None, "low": None, "high": None}
    for arguments, message in (((0,), "0 samples"), ((3, 1.0), "confidence is 1.0")):
        with pytest.raises(ValueError, match=message):
            bootstrap_statistic(np.mean, *arguments)


def test_resamples_that_decide_nothing_are_left_out():
    # Of two samples one decides: 7 where it is drawn at all, nothing (0 / 0) where the other one is drawn twice.
    parts, wholes = np.array([7.0, 0.0]), np.array([1.0, 0.0])
    figure = bootstrap_statistic(lambda draw: parts[draw].sum() / wholes[draw].sum(), 2)
    assert figure == {"value": 7.0, "low": 7.0, "high": 7.0}
    assert bootstrap_ratios({"one": (parts, wholes), "none": (parts, 0 * wholes)}, 2) == {"one": (7, 7), "none": None}


def test_statistics_of_one_size_see_the_same_resamples():
    first, second = np.random.default_rng(1).random((2, 30))
    seen = [], []
    for values, means in zip((first, second), seen, strict=True):
        bootstrap_statistic(lambda draw, v=values, m=means: m.append(v[draw].mean()) or 0.0, 30, num_resamples=20)
    gap = bootstrap_statistic(lambda draw: (first - second)[draw].mean(), 30, num_resamples=20)
    gaps = np.subtract(*seen)[1:]  # the first is of the samples as they are
    assert [gap["low"], gap["high"]] == pytest.approx(np.percentile(gaps, [2.5, 97.5]).tolist())


def test_mean_and_its_groups():
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    # one group: its mean is the only one that can be drawn
    assert bootstrap_interval([0.0, 1.0, 5.0], groups=[7, 7, 7]) == (2.0, 2.0, 2.0)
    assert all(np.isnan(bootstrap_interval([])))
    mean, low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert mean == 0.5 and 0.35 < low < 0.45 and 0.55 < high < 0.65
    # Two groups, {0, 4} and {1}: resamples are both (5 / 3), the first twice (2) or the second twice (1).
    mean, low, high = bootstrap_interval([0.0, 4.0, 1.0], groups=[4, 4, 9])
    assert (mean, low, high) == (pytest.approx(5 / 3), 1.0, 2.0)


def test_published_intervals_are_drawn_as_before():
    """The figures of the study and the card were made with these draws; the same seed gives the same bounds."""
    values, groups = np.random.default_rng(3).random(40), np.arange(40) // 3
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
    drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    expected = (values.mean(), *np.quantile(means, [0.025, 0.975]))
    assert bootstrap_interval(values, groups) == pytest.approx(expected, rel=1e-12)

    scores = [SampleScore(hit, 10, hit, 10) for hit in (1, 4, 4, 9, 10)]
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 1 / 5), 1000)
    bounds = np.percentile(draws @ np.array([0.1, 0.4, 0.4, 0.9, 1.0]) / 5, [2.5, 97.5])
    assert bootstrap_intervals(scores, names=["gIoU"])["gIoU"] == pytest.approx(tuple(bounds), rel=1e-12)


def test_it_is_also_a_name_of_explain():
    assert explain.bootstrap_interval is bootstrap_interval
