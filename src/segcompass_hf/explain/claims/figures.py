# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From samples to the four claims: means and correlations with bootstrap intervals over samples, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...metrics.intervals import bootstrap_statistic
from .measure import TOP_PERCENT, ClaimRecord

# The order that the paper claims: each of the first two above each of the others.
CLAIMED_PAIRS = [(rich, poor) for rich in ("instance", "reasoning") for poor in ("question", "background")]
_UNDEFINED = {"value": None, "low": None, "high": None}
PLACES = ("instance", "others", "background", "question", "reasoning")


def claims_figures(
    records: Sequence[ClaimRecord], confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The claims over samples.

    Args:
        records (`Sequence[ClaimRecord]`): From `measure_claims`; at least one.
        confidence, num_resamples, seed: As for [`bootstrap_statistic`].

    Returns:
        `dict`, JSON-ready; every figure has `value`, `low`, `high` (`None` where no sample decides it):
        `samples` (numbers of them), `features_per_token` (by place, with the numbers of tokens and samples),
        `more_features` (differences `"instance - question"` etc., same resamples), `coverage` (`percent`, per rule of
        ranking a curve, and the curve of differences to random; `area`: the mean of those differences over
        `TOP_PERCENT`), `error_and_dice` (by tokens, `pearson` and `spearman` over samples with target) and
        `heatmap_and_mask` (over objects, all and of kept slots).

    Raises:
        ValueError: without records.
    """
    records = list(records)
    if not records:
        raise ValueError("got 0 records; measure at least one sample.")
    options: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    with_target = [record for record in records if record.objects]
    return {
        "samples": {
            "all": len(records),
            "with_target": len(with_target),
            "without_kept_slot": sum(not any(o["kept"] for o in record.objects) for record in with_target),
            "objects": sum(len(record.objects) for record in records),
        },
        "iou": bootstrap_statistic(_mean_of([record.iou for record in records]), len(records), **options),
        "features_per_token": {place: _features_per_token(records, place, options) for place in PLACES},
        "more_features": {f"{a} - {b}": _difference(records, a, b, options) for a, b in CLAIMED_PAIRS},
        "coverage": _coverage(records, options),
        "error_and_dice": {
            tokens: _correlations([[(record.sae_error[tokens], record.dice_loss)] for record in with_target], options)
            for tokens in ("all", "image", "text")
        },
        "heatmap_and_mask": {
            name: _correlations(
                [
                    [(o["heatmap_iou"], o["mask_iou"]) for o in record.objects if o["kept"] or name == "all"]
                    for record in with_target
                ],
                options,
            )
            for name in ("all", "kept")
        },
    }


def _mean_of(values: Sequence[float]) -> Callable[[np.ndarray], float]:
    array = np.asarray(values, dtype=float)
    return lambda draw: array[draw].mean()


def _rate(records: Sequence[ClaimRecord], place: str) -> Callable[[np.ndarray], float]:
    """Active features per token of a place, all tokens of the drawn samples alike."""
    features = np.array([record.features[place] for record in records], dtype=float)
    tokens = np.array([record.tokens[place] for record in records], dtype=float)
    return lambda draw: features[draw].sum() / tokens[draw].sum()


def _features_per_token(records: Sequence[ClaimRecord], place: str, options: dict) -> dict[str, Any]:
    figure = bootstrap_statistic(_rate(records, place), len(records), **options)
    tokens = [record.tokens[place] for record in records]
    return figure | {"num_tokens": sum(tokens), "num_samples": sum(number > 0 for number in tokens)}


def _difference(records: Sequence[ClaimRecord], rich: str, poor: str, options: dict) -> dict[str, Any]:
    first, second = _rate(records, rich), _rate(records, poor)
    return bootstrap_statistic(lambda draw: first(draw) - second(draw), len(records), **options)


def _coverage(records: Sequence[ClaimRecord], options: dict) -> dict[str, Any] | None:
    curves = [record.coverage for record in records if record.coverage is not None]
    if not curves:
        return None
    random = np.array([curve["random"] for curve in curves])
    figures: dict[str, Any] = {
        "percent": list(TOP_PERCENT),
        "num_samples": len(curves),
        "random": random.mean(0).tolist(),
        "area": {},
    }
    for rule in ("activation", "features"):
        _add_against_random(figures, rule, np.array([curve[rule] for curve in curves]), random, options)
    seen = [index for index, curve in enumerate(curves) if curve["others"] is not None]
    if seen:  # what the choice by activation covers of other objects: is it the instance that it finds, or objects?
        others = np.array([curves[index]["others"] for index in seen])
        _add_against_random(figures, "others", others, random[seen], options)
        gap = (np.array([curves[index]["activation"] for index in seen]) - others).mean(1)
        figures["area"]["activation - others"] = bootstrap_statistic(_mean_of(gap), len(gap), **options)
    return figures


def _add_against_random(
    figures: dict[str, Any], rule: str, curves: np.ndarray, random: np.ndarray, options: dict
) -> None:
    """Add figures of curves `(samples, len(TOP_PERCENT))`: along the curve, against random, and the mean of that."""
    gains = curves - random
    for name, values in ((rule, curves), (f"{rule} - random", gains)):
        figures[name] = [bootstrap_statistic(_mean_of(column), len(values), **options) for column in values.T]
    figures["area"][rule] = bootstrap_statistic(_mean_of(gains.mean(1)), len(gains), **options)


def _correlations(samples: Sequence[Sequence[tuple[float, float | None]]], options: dict) -> dict[str, Any]:
    """Pearson and Spearman over the pairs of all samples, whole samples resampled."""
    from scipy.stats import rankdata

    arrays = [np.array(pairs, dtype=float) for pairs in samples if len(pairs)]
    figures: dict[str, Any] = {"num_samples": len(arrays), "num_pairs": sum(map(len, arrays))}
    if not arrays:
        return figures | {name: dict(_UNDEFINED) for name in ("pearson", "spearman")}

    def pearson(draw: np.ndarray) -> float:
        return correlation(*np.concatenate([samples[index] for index in draw]).T)

    def spearman(draw: np.ndarray) -> float:
        return correlation(*map(rankdata, np.concatenate([samples[index] for index in draw]).T))

    statistics = {"pearson": pearson, "spearman": spearman}
    return figures | {name: bootstrap_statistic(of, len(samples), **options) for name, of in statistics.items()}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays `(n,)`; NaN where one of them does not vary."""
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 1e-12 else float("nan")


__all__ = ["claims_figures", "correlation"]
