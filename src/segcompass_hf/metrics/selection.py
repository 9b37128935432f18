# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Selection against masks: how much gIoU is lost to choosing the wrong objects, and how much to drawing them badly.

Where all objects of an image are known, every mask is taken to show the known objects whose union fits it best. With
their true masks in its place (the oracle), what is missing to an IoU of 1 was lost to the choice; what the true masks
add to the prediction was lost to the drawing. The two add up: `1 = IoU + lost to selection + lost to masks`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import numpy as np

from .intervals import bootstrap_ratios, images_of, sums_by_image
from .segmentation import SampleScore, score_sample

# Of a summary, in the order of its tables; each is a mean over samples.
SELECTION_NAMES = ("gIoU", "oracle_gIoU", "lost_to_selection", "lost_to_masks", "right_choice")


def shown_objects(mask: np.ndarray, objects: np.ndarray) -> list[int]:
    """The objects that a mask shows: those whose union has the largest IoU with it.

    Starting from none, the object is added or dropped that raises the IoU most, until none does. Where objects do not
    overlap, no other set fits better: the best IoU `v` takes exactly the objects with `inside / outside > v`, pixels
    inside and outside of the mask, and every other set gains by one step.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool.
        objects (`np.ndarray` of shape `(num_objects, height, width)`): bool.

    Returns:
        `list[int]`: indices, ascending; empty where the mask touches no object.

    Example:
        >>> objects = np.array([[[1, 1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 1]]], dtype=bool)
        >>> shown_objects(np.array([[0, 1, 1, 1, 0, 0]], dtype=bool), objects)  # 2 of 4 pixels; of both 3 of 6
        [0]
    """
    candidates = [index for index, each in enumerate(objects) if (each & mask).any()]
    shown: list[int] = []
    best = 0.0
    while True:
        changes = [sorted({*shown} ^ {index}) for index in candidates]
        fits = [_iou(mask, np.any(objects[change], axis=0)) for change in changes]
        if max(fits, default=0.0) <= best:
            return shown
        best = max(fits)
        shown = changes[fits.index(best)]


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0


def choose_objects(
    masks: np.ndarray, targets: np.ndarray, others: np.ndarray, ignore: np.ndarray | None = None
) -> tuple[list[list[int]], SampleScore]:
    """What every mask of a prediction shows, and the prediction's score if it had drawn just that.

    A mask that touches no known object stays as it is: it chose wrongly, whatever it shows.

    Args:
        masks (`np.ndarray` of shape `(num_masks, height, width)`): bool, the prediction.
        targets (`np.ndarray` of shape `(num_targets, height, width)`): bool, the objects asked for.
        others (`np.ndarray` of shape `(num_others, height, width)`): bool, all other known objects.
        ignore (`np.ndarray` of shape `(height, width)`, *optional*): bool, pixels left out of everything.

    Returns:
        `tuple`: per mask the objects it shows (see [`shown_objects`]), numbered through targets and then others; and
        the [`SampleScore`] of their true masks against the targets.
    """
    objects = np.concatenate([targets, others])
    seen = objects if ignore is None else objects & ~ignore
    judged = masks if ignore is None else masks & ~ignore
    shown = [shown_objects(mask, seen) for mask in judged]
    drawn = [seen[found].any(axis=0) if found else mask for mask, found in zip(judged, shown, strict=True)]
    oracle = np.stack(drawn) if drawn else masks
    return shown, score_sample(oracle, targets, ignore)


def selection_figures(
    scores: Sequence[SampleScore],
    oracle_scores: Sequence[SampleScore],
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    images: Sequence[Hashable] | None = None,
) -> dict[str, dict[str, float]]:
    """What was lost to the choice and what to the drawing, with intervals.

    Args:
        scores (`Sequence[SampleScore]`): Of the predictions; at least one.
        oracle_scores (`Sequence[SampleScore]`): Of the true masks of what they chose, see [`choose_objects`].
        confidence, num_resamples, seed, images: As for [`~metrics.segmentation.bootstrap_intervals`].

    Returns:
        `dict[str, dict[str, float]]`: by name `value`, `low`, `high` and `num_samples`: `gIoU`; `oracle_gIoU`;
        `lost_to_selection` = 1 - `oracle_gIoU`; `lost_to_masks` = `oracle_gIoU` - `gIoU` (below 0 where a mask of a
        wrong object touches the right one); `right_choice`, the share of samples whose choice is the targets exactly.
        All see the same resamples.

    Raises:
        ValueError: without samples, or not as many of one as of the other.
    """
    if len(scores) != len(oracle_scores):
        raise ValueError(f"got {len(scores)} scores and {len(oracle_scores)} oracle scores; one of each per sample.")
    ious = np.array([[score.iou, oracle.iou] for score, oracle in zip(scores, oracle_scores, strict=True)])
    drawn, chosen = ious.reshape(-1, 2).T  # (num_samples,) each
    columns = dict(zip(SELECTION_NAMES, (drawn, chosen, 1 - chosen, chosen - drawn, chosen == 1), strict=True))
    counted = np.column_stack([*columns.values(), np.ones(len(ious)), drawn, chosen])  # the last two for their order
    sums = sums_by_image(counted, images_of(len(ious), images)).T  # (num_columns, num_images)
    terms = {name: (column, sums[-3]) for name, column in zip(columns, sums, strict=False)}
    intervals = bootstrap_ratios(terms, sums.shape[1], confidence, num_resamples, seed)
    figures = {}
    for name, column in columns.items():
        low, high = cast(tuple[float, float], intervals[name])  # never None: every sample bears on every figure
        figures[name] = {"value": float(column.mean()), "low": low, "high": high, "num_samples": len(ious)}
    return figures


def selection_by_group(
    scores: Sequence[SampleScore],
    oracle_scores: Sequence[SampleScore],
    groups: Sequence[Hashable],
    images: Sequence[Hashable] | None = None,
) -> dict[Hashable, dict[str, dict[str, float]]]:
    """[`selection_figures`] of each group of samples, groups sorted by their text."""
    images = images_of(len(scores), images)
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    return {
        group: selection_figures(
            [scores[place] for place in places[group]],
            [oracle_scores[place] for place in places[group]],
            images=[images[place] for place in places[group]],
        )
        for group in sorted(places, key=str)
    }


__all__ = ["SELECTION_NAMES", "choose_objects", "selection_by_group", "selection_figures", "shown_objects"]
