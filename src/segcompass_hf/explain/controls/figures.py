# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From records of the controls to figures with intervals over images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...metrics.intervals import bootstrap_interval
from .seeds import FeatureMatches

Interval = tuple[float, float, float]  # mean, low, high
Records = Sequence[Mapping[str, Any]]

SMALL = 0.1  # of the change: smaller effects are none, and two concepts add up whose interference is smaller
SAME_FEATURE = (0.7, 0.9)  # cosines and correlations from which a concept counts as come again
OF_A_PIPELINE = {  # what two models are compared in -> of a mask's record, or `None` where it is not measured
    "deletion (small is good)": lambda mask: mask["deletion"],
    "insertion (large is good)": lambda mask: mask["insertion"],
    "first concepts over equal norm": lambda mask: _matched(mask, "first") - _matched(mask, "matched"),
    "own mask over others": lambda mask: _own_over_others(mask),
}


def controls_figures(records: Records) -> dict[str, Any]:
    """Figures of one model.

    Args:
        records (`Sequence[Mapping]`): [`ControlRecord`] of every sample, as dicts.

    Returns:
        `dict`: `samples`, `masks`, and by control the figures that its table shows: (mean, low, high), 95 % bootstrap
        over images, NaN where nothing was measured.
    """
    of_masks = _Values(records, lambda record: record["masks"])
    unions = _Values(records, lambda record: [test for mask in record["masks"] for test in mask["unions"]])
    patches = _Values(records, lambda record: [mask["patches"] for mask in record["masks"]])
    return {
        "samples": len(records),
        "masks": sum(len(record["masks"]) for record in records),
        "pipeline": pipeline_figures(records),
        "matched": {
            name: of_masks.mean(lambda mask, name=name: _matched(mask, name))
            for name in ("first", "matched", "random", "norm_ratio")
        }
        | {"difference": of_masks.mean(lambda mask: _matched(mask, "first") - _matched(mask, "matched"))},
        "unions": {
            "idle": unions.mean(_is_idle),
            "additive": unions.mean(lambda test: abs(test["interference"]) <= SMALL and not _is_idle(test)),
            "stand_ins": unions.mean(lambda test: test["interference"] > SMALL and not _is_idle(test)),
            "overlap": unions.mean(lambda test: test["interference"] < -SMALL and not _is_idle(test)),
            "interference": unions.mean(lambda test: test["interference"]),
        },
        "patches": {
            name: patches.mean(lambda test, name=name: np.nan if test is None else test[name])
            for name in ("effect_inside", "without_firing", "without_causal", "without_random")
        }
        | {"area": patches.mean(lambda test: np.nan if test is None else test["firing"] / test["blocks"])},
        "reasoning": _reasoning_figures(records),
    }


def pipeline_figures(records: Records) -> dict[str, Interval]:
    """What two pipelines are compared in."""
    of_masks = _Values(records, lambda record: record["masks"])
    figures = {"gIoU": bootstrap_interval([record["iou"] for record in records])}
    return figures | {name: of_masks.mean(read) for name, read in OF_A_PIPELINE.items()}


def compared_figures(records: Records, others: Records) -> dict[str, dict[str, Interval]]:
    """Another pipeline beside this one, on the same samples.

    Returns:
        `dict`: by figure `this`, `other` and `difference` (this less the other, per image, paired).

    Raises:
        ValueError: The samples are not the same.
    """
    names = [[record["sample_id"] for record in of] for of in (records, others)]
    if names[0] != names[1]:
        raise ValueError("the two pipelines were measured on different samples; measure both on the same.")
    readings: dict[str, Callable] = {"gIoU": lambda record: record["iou"]}
    readings |= {name: (lambda record, read=read: _mean_of(record, read)) for name, read in OF_A_PIPELINE.items()}
    compared = {}
    for name, read in readings.items():
        pairs = np.array([[read(one), read(two)] for one, two in zip(records, others, strict=True)])
        both = pairs[np.isfinite(pairs).all(1)] if len(pairs) else np.zeros((0, 2))
        columns = (both[:, 0], both[:, 1], both[:, 0] - both[:, 1])
        compared[name] = dict(zip(("this", "other", "difference"), map(bootstrap_interval, columns), strict=True))
    return compared


def seed_figures(matches: FeatureMatches) -> dict[str, Any]:
    """How many concepts come again, by what they write and by where they fire; intervals over concepts."""
    values = {"cosine": matches.cosines.numpy(), "correlation": matches.correlations.numpy()}
    figures: dict[str, Any] = {"features": len(matches.features)}
    for name, of in values.items():
        of = of[np.isfinite(of)]
        figures[f"{name}_mean"] = bootstrap_interval(of)
        figures |= {f"{name}_{least}": bootstrap_interval(of >= least) for least in SAME_FEATURE}
    return figures


def _reasoning_figures(records: Records) -> dict[str, Any]:
    tests = _Values(records, lambda record: [record["reasoning"]] if record["reasoning"] else [])
    named = _Values(records, lambda record: record["reasoning"]["named"] if record["reasoning"] else [])
    changes = sorted({name for _, test in tests for name in test["iou_to_answer"]})

    def of(field: str, name: str) -> Interval:
        return tests.mean(lambda test: test[field].get(name, np.nan))

    return {
        "iou_to_answer": {name: of("iou_to_answer", name) for name in changes},
        "iou_to_truth": {name: of("iou_to_truth", name) for name in ("as_written", *changes)},
        "error_followed": tests.mean(lambda test: _or_nan(test["shows_named"])),
        "error_ignored": tests.mean(lambda test: _or_nan(test["shows_former"])),
        "shows_what_is_named": named.mean(float),
    }


class _Values:
    """Parts of records, each with the number of its image."""

    def __init__(self, records: Records, parts: Callable[[Mapping], list]):
        self.parts = [(image, part) for image, record in enumerate(records) for part in parts(record)]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return iter(self.parts)

    def mean(self, read: Callable[[Any], float]) -> Interval:
        """Mean of a number of every part where it is one, images drawn again as wholes."""
        values = np.array([read(part) for _, part in self.parts], dtype=float)
        images, known = np.array([image for image, _ in self.parts]), np.isfinite(values)
        return bootstrap_interval(values[known], images[known] if len(images) else None)


def _mean_of(record: Mapping[str, Any], read: Callable) -> float:
    values = [read(mask) for mask in record["masks"]]
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else np.nan


def _is_idle(test: Mapping[str, Any]) -> bool:
    """Whether two concepts do nothing, neither singly nor together."""
    return max(map(abs, (*test["alone"], test["together"]))) <= SMALL


def _matched(mask: Mapping[str, Any], name: str) -> float:
    return np.nan if mask["matched"] is None else mask["matched"][name]


def _own_over_others(mask: Mapping[str, Any]) -> float:
    return np.nan if mask["specificity"] is None else mask["specificity"]["own"] - mask["specificity"]["others"]


def _or_nan(flag: bool | None) -> float:
    return np.nan if flag is None else float(flag)


__all__ = ["compared_figures", "controls_figures", "pipeline_figures", "seed_figures"]
