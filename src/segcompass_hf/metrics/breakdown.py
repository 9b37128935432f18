# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics with their intervals, over everything and by source, kind or whatever samples are told apart by."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from .intervals import images_of
from .segmentation import (
    ALL_METRIC_NAMES,
    SampleScore,
    bootstrap_intervals,
    metric_names,
    metrics_of_scores,
    num_bearing_samples,
)


def metrics_with_intervals(
    scores: Iterable[SampleScore],
    names: str | Sequence[str] = ALL_METRIC_NAMES,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    images: Sequence[Hashable] | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric with its bootstrap interval and the number of samples it stands on.

    Args:
        scores (iterable of `SampleScore`): At least one, for instance a `SegmentationAccumulator`.
        names (`str` or `Sequence[str]`, *optional*): As for `metrics_of_scores`; gIoU, cIoU, N-acc, T-acc and
            precision at 0.5, 0.7 and 0.9 by default.
        confidence, num_resamples, seed, images: As for `bootstrap_intervals`.

    Returns:
        `dict[str, dict[str, float]]`: by name `value`, `low`, `high` in [0, 1], and `num_samples`, those that bear on
        it.
    """
    scores, names = list(scores), metric_names(names)
    values = metrics_of_scores(scores, names)
    intervals = bootstrap_intervals(scores, confidence, num_resamples, seed, names, images)
    return {
        name: {
            "value": values[name],
            "low": intervals[name][0],
            "high": intervals[name][1],
            "num_samples": num_bearing_samples(scores, name),
        }
        for name in names
    }


def breakdown(
    scores: Iterable[SampleScore],
    groups: Iterable[Hashable],
    images: Sequence[Hashable] | None = None,
    **kwargs: Any,
) -> dict[Hashable, dict[str, dict[str, float]]]:
    """`metrics_with_intervals` of each group of samples.

    Args:
        scores (iterable of `SampleScore`): One per sample.
        groups (iterable of hashables): One per sample, for instance its `source` or `kind`; `None` is a group too.
        images (`Sequence[Hashable]`, *optional*): One per sample, see `bootstrap_intervals`.
        kwargs: For `metrics_with_intervals`.

    Returns:
        `dict`: by group, groups sorted by their text, so that neither order nor sharding of the samples shows.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> hit, miss = SampleScore(4, 4, 4, 4), SampleScore(0, 8, 4, 4)
        >>> figures = breakdown([hit, miss, hit], ["colour", "place", "place"], names=("gIoU",))
        >>> {kind: figures[kind]["gIoU"]["value"] for kind in figures}
        {'colour': 1.0, 'place': 0.5}
    """
    scores = list(scores)
    members: dict[Hashable, list[tuple[SampleScore, Hashable]]] = {}
    for score, group, image in zip(scores, groups, images_of(len(scores), images), strict=True):
        members.setdefault(group, []).append((score, image))
    found = {}
    for group in sorted(members, key=str):
        own, of = zip(*members[group], strict=True)
        found[group] = metrics_with_intervals(own, images=of, **kwargs)
    return found
