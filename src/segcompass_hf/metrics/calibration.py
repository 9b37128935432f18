# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether the scores of masks say how often masks are right, and how many masks show one object twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RIGHT_IOU = 0.5  # a mask is right from this IoU with one of the objects asked for
NUM_BINS = 15  # of equal width over [0, 1], as in Guo et al., ICML 2017


def best_ious(masks: np.ndarray, targets: np.ndarray, ignore: np.ndarray | None = None) -> list[float | None]:
    """The IoU of each mask with the target that it fits best, in [0, 1]; 0 where nothing is meant.

    Args:
        masks (`np.ndarray` of shape `(num_masks, height, width)`): bool.
        targets (`np.ndarray` of shape `(num_objects, height, width)`): bool, one per object.
        ignore (`np.ndarray` of shape `(height, width)`, *optional*): bool, pixels left out of both.

    Returns:
        `list[float | None]`: `None` for a mask that has no pixel outside of `ignore`, and so cannot be judged.
    """
    if ignore is not None:
        masks, targets = masks & ~ignore, targets & ~ignore
    best = []
    for mask in masks:
        overlaps = [(np.count_nonzero(mask & target), np.count_nonzero(mask | target)) for target in targets]
        ious = [both / either for both, either in overlaps if either]
        best.append(max(ious, default=0.0) if mask.any() else None)
    return best


def count_duplicates(masks: np.ndarray, iou_threshold: float = RIGHT_IOU) -> int:
    """How many of the masks `(num_masks, height, width)`, bool, have an IoU of the threshold or more with one before.

    Masks without a pixel are no duplicates.
    """
    masks = masks[masks.any((1, 2))]
    overlaps = [[(np.count_nonzero(a & b), np.count_nonzero(a | b)) for b in masks[:i]] for i, a in enumerate(masks)]
    return sum(any(both >= iou_threshold * either for both, either in pairs) for pairs in overlaps)


def expected_calibration_error(scores: Sequence[float], is_right: Sequence[bool], num_bins: int = NUM_BINS) -> float:
    """`sum over bins of share of masks * |share of right masks - mean score|`, bins of equal width over [0, 1].

    Args:
        scores (`Sequence[float]`): One per mask, in [0, 1].
        is_right (`Sequence[bool]`): Whether it is right.
        num_bins (`int`, defaults to 15): Number of bins.

    Returns:
        `float`: in [0, 1]; NaN without masks.

    Example:

    >>> expected_calibration_error([1.0, 1.0, 0.5, 0.5], [True, False, True, False])
    0.25
    """
    shown, right = np.asarray(scores, dtype=float), np.asarray(is_right, dtype=float)
    if not len(shown):
        return float("nan")
    bins = np.clip((shown * num_bins).astype(int), 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - shown, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(shown))


def ranking(scores: Sequence[float], is_right: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a right mask has a higher score than a wrong one, ties counting half.

    Returns:
        `float`: in [0, 1], 0.5 where scores say nothing; NaN where all masks are right or all wrong.

    Example:

    >>> ranking([0.9, 0.5, 0.5], [True, True, False])
    0.75
    """
    shown, chosen = np.asarray(scores, dtype=float), np.asarray(is_right, dtype=bool)
    right, wrong = shown[chosen], np.sort(shown[~chosen])
    if not len(right) or not len(wrong):
        return float("nan")
    below, up_to = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + up_to).mean() / (2 * len(wrong)))


def calibration_figures(scores: Sequence[float], ious: Sequence[float | None]) -> dict[str, Any] | None:
    """What a summary says about the scores of its masks; `None` where there are none.

    Args:
        scores (`Sequence[float]`): One per mask, in [0, 1].
        ious (`Sequence[float | None]`): See [`best_ious`]; masks that cannot be judged do not count.

    Returns:
        `dict`: `num_masks`, `right` (share of right masks), `mean_score`, `expected_calibration_error`, `ranking`
        (`None` where all masks are right or all wrong), and how these are meant: `right_iou`, `num_bins`.
    """
    judged = [(score, iou) for score, iou in zip(scores, ious, strict=True) if iou is not None]
    if not judged:
        return None
    scores, ious = zip(*judged, strict=True)
    is_right = [iou >= RIGHT_IOU for iou in ious]
    area = ranking(scores, is_right)
    return {
        "num_masks": len(scores),
        "right": float(np.mean(is_right)),
        "mean_score": float(np.mean(scores)),
        "expected_calibration_error": expected_calibration_error(scores, is_right),
        "ranking": None if np.isnan(area) else area,
        "right_iou": RIGHT_IOU,
        "num_bins": NUM_BINS,
    }


__all__ = [
    "best_ious",
    "calibration_figures",
    "count_duplicates",
    "expected_calibration_error",
    "ranking",
]
