# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Percentile bootstrap intervals: whole samples are drawn again, and a figure is computed of every draw."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

COUNTS_AT_ONCE = 4_000_000  # counts drawn at a time, 32 MB


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[int] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A mean with its interval.

    Args:
        values (`Sequence[float]`): One per mask, say.
        groups (`Sequence[int]`, *optional*): What is drawn together, as the masks of one image are.
        confidence (`float`, defaults to 0.95): Share of resamples inside the interval.
        num_resamples (`int`, defaults to 2000): Resamples of the groups.
        seed (`int`, defaults to 0): Of the resamples.

    Returns:
        `tuple[float, float, float]`: mean, low, high; NaN where there are no values.
    """
    measured = np.asarray(values, dtype=float)
    if not len(measured):
        return (float("nan"),) * 3
    _, index = np.unique(np.arange(len(measured)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, weights=measured), np.bincount(index)
    figure = bootstrap_statistic(
        lambda draw: sums[draw].sum() / counts[draw].sum(), len(sums), confidence, num_resamples, seed
    )
    return float(measured.mean()), figure["low"], figure["high"]


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float],
    num_samples: int,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Any statistic of samples with its interval.

    Statistics asked for with the same number of samples and seed see the same resamples, so that a difference of two
    is paired.

    Args:
        statistic (`Callable`): Indices of samples `(num_samples,)`, some more than once -> a number; NaN where these
            samples do not decide it.
        num_samples (`int`): 1 or more.
        confidence (`float`, defaults to 0.95): Share of resamples inside the interval.
        num_resamples (`int`, defaults to 1000): Resamples drawn.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `dict`: `value`, `low`, `high`; `None` where the statistic is undefined, also as a bound.

    Raises:
        ValueError: without samples, or for a confidence outside (0, 1).
    """
    _check(num_samples, confidence)
    draws = np.random.default_rng(seed).integers(num_samples, size=(num_resamples, num_samples))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(np.arange(num_samples)))
        values = np.array([statistic(draw) for draw in draws], dtype=float)
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    low, high = _percentiles(values[np.isfinite(values)], confidence) or (None, None)
    return {"value": value, "low": low, "high": high}


def bootstrap_ratios(
    terms: Mapping[str, tuple[np.ndarray, np.ndarray]],
    num_samples: int,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Intervals of ratios of sums over samples, any number of samples in bounded memory.

    Args:
        terms (`Mapping[str, tuple]`): By name what each sample adds to numerator and denominator, `(num_samples,)`
            each. Every ratio sees the same resamples.
        num_samples (`int`): 1 or more.
        confidence, num_resamples, seed: As for [`bootstrap_statistic`]; the draws of the two differ.

    Returns:
        `dict[str, tuple[float, float] | None]`: lower and upper bound; `None` where every denominator is 0.

    Raises:
        ValueError: without samples, or for a confidence outside (0, 1).
    """
    _check(num_samples, confidence)
    ratios: dict[str, list[np.ndarray]] = {name: [np.empty(0)] for name in terms}
    generator = np.random.default_rng(seed)
    while num_resamples > 0:
        size = min(num_resamples, max(1, COUNTS_AT_ONCE // num_samples))
        draws = generator.multinomial(num_samples, np.full(num_samples, 1 / num_samples), size)
        num_resamples -= size
        for name, (part, whole) in terms.items():
            numerator, denominator = draws @ part, draws @ whole
            seen = denominator > 0  # a resample may miss all samples that bear on the ratio
            ratios[name].append(numerator[seen] / denominator[seen])
    return {name: _percentiles(np.concatenate(chunks), confidence) for name, chunks in ratios.items()}


def images_of(num_samples: int, images: Sequence[Hashable] | None) -> Sequence[Hashable]:
    """The image of each sample; each has its own where none are given.

    Raises:
        ValueError: there are not as many images as samples.
    """
    if images is not None and len(images) != num_samples:
        raise ValueError(f"got {num_samples} samples and {len(images)} images; pass the image of each sample.")
    return range(num_samples) if images is None else images


def sums_by_image(columns: np.ndarray, images: Sequence[Hashable]) -> np.ndarray:
    """What images add to figures: sums over the samples of each, in an order that is not the samples'.

    Args:
        columns (`np.ndarray` of shape `(num_samples, num_columns)`): What each sample adds.
        images (`Sequence[Hashable]`): The image of each sample.

    Returns:
        `np.ndarray` of shape `(num_images, num_columns)`: sorted by the last column, then the one before it, and on.
    """
    order = np.lexsort(columns.T)  # also within an image, for sums of floats depend on it
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(images[sample], len(numbers)) for sample in order]
    sums = np.zeros((len(numbers), columns.shape[1]))
    np.add.at(sums, index, columns[order])
    return sums[np.lexsort(sums.T)]


def _check(num_samples: int, confidence: float) -> None:
    if num_samples < 1:
        raise ValueError(f"got {num_samples} samples; an interval needs at least one.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a share between 0 and 1 such as 0.95.")


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """The bounds that leave out the same share of values on either side; `None` without any."""
    tail = 100 * (1 - confidence) / 2
    return tuple(np.percentile(values, [tail, 100 - tail]).tolist()) if len(values) else None


__all__ = ["bootstrap_interval", "bootstrap_ratios", "bootstrap_statistic", "images_of", "sums_by_image"]
