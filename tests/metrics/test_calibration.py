"""Calibration error, ranking, best IoUs and duplicates, worked out by hand."""

import math

import numpy as np
import pytest

from segcompass_hf.metrics import (
    best_ious,
    calibration_figures,
    count_duplicates,
    expected_calibration_error,
    ranking,
)


def row(*spans):
    """Masks `(n, 1, 10)` of pixels `[start, stop)`."""
    masks = np.zeros((len(spans), 1, 10), dtype=bool)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = True
    return masks


class TestExpectedCalibrationError:
    def test_saturated_scores(self):
        # One bin, all scores 1, 3 of 4 right: the distance is 1/4.
        assert expected_calibration_error([1.0] * 4, [True, True, True, False]) == pytest.approx(0.25)

    def test_bins_are_weighed_by_masks(self):
        # Two bins of [0, 1]: scores 0.2 and 0.4 (none right: |0 - 0.3|), score 0.9 (right: 0.1); (2 * 0.3 + 0.1) / 3
        error = expected_calibration_error([0.2, 0.4, 0.9], [False, False, True], num_bins=2)
        assert error == pytest.approx(0.7 / 3)

    def test_within_a_bin_errors_cancel(self):
        assert expected_calibration_error([0.5, 0.5], [True, False]) == 0.0

    def test_both_ends_and_nothing(self):
        assert expected_calibration_error([0.0, 1.0], [False, True]) == 0.0
        assert math.isnan(expected_calibration_error([], []))


class TestRanking:
    def test_pairs(self):
        # Right 0.9 and 0.4, wrong 0.5 and 0.4: wins 2, then 0 and a tie: (2 + 0.5) / 4
        assert ranking([0.9, 0.4, 0.5, 0.4], [True, True, False, False]) == pytest.approx(2.5 / 4)

    def test_one_kind_alone(self):
        assert math.isnan(ranking([0.9], [True])) and math.isnan(ranking([0.9], [False]))


class TestBestIous:
    def test_the_best_target_counts(self):
        # [0, 4) with [0, 2): 2 / 4, with [2, 5): 2 / 5
        assert best_ious(row((0, 4)), row((0, 2), (2, 5))) == [0.5]

    def test_nothing_meant_and_nothing_predicted(self):
        assert best_ious(row((0, 4)), row()) == [0.0]
        assert best_ious(row(), row((0, 4))) == []

    def test_ignored_pixels(self):
        ignore = row((0, 2))[0]
        assert best_ious(row((0, 4)), row((2, 6)), ignore) == [0.5]  # 2 of 4 left
        assert best_ious(row((0, 2)), row((2, 6)), ignore) == [None]  # nothing of it can be judged


class TestCountDuplicates:
    def test_counts_masks_not_pairs(self):
        # the second and the third are the first again: two masks too many, in three pairs
        assert count_duplicates(row((0, 4), (0, 4), (0, 4), (6, 8))) == 2

    def test_threshold_and_empty_masks(self):
        assert count_duplicates(row((0, 4), (0, 8))) == 1  # IoU 0.5 is reached
        assert count_duplicates(row((0, 4), (0, 9))) == 0
        assert count_duplicates(row((0, 0), (0, 0))) == 0 and count_duplicates(row()) == 0


class TestFigures:
    def test_figures(self):
        figures = calibration_figures([1.0, 1.0, 0.9], [0.5, 0.49, None])
        assert figures["num_masks"] == 2 and figures["right"] == 0.5 and figures["mean_score"] == 1.0
        assert figures["expected_calibration_error"] == 0.5 and figures["ranking"] == 0.5

    def test_without_masks(self):
        assert calibration_figures([], []) is None and calibration_figures([0.5], [None]) is None
        assert calibration_figures([0.9], [1.0])["ranking"] is None
