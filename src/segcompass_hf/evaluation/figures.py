# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From records to figures: metrics with intervals, over everything and by group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from ..metrics.segmentation import SampleScore, bootstrap_intervals, metrics_of_scores
from .environment import commit, device, versions
from .records import score_of

UNNAMED = "(none)"  # group of samples without a source or kind


def summarize(records: Sequence[dict[str, Any]], run: dict[str, Any], timing: dict[str, Any]) -> dict[str, Any]:
    """All that `summary.json` says.

    Args:
        records (`Sequence[dict]`): Of all samples, see `records.record_of`.
        run (`dict`): What was run; `predictor`, `dataset` and `settings`.
        timing (`dict`): What the runner measured.

    Returns:
        `dict`: `run`'s entries; `counts`; `metrics` (per name `value`, `low`, `high` in [0, 1] and `num_samples`, the
        samples that bear on it); `by_source` and `by_kind` (per group the same); `unreadable`; `timing`, `date`,
        `versions`, `commit` and `device`.
    """
    seconds = sum(record["seconds"] for record in records)
    return {
        **run,
        "counts": _counts(records),
        "metrics": metrics_with_intervals([score_of(record) for record in records]),
        "by_source": _by(records, "source"),
        "by_kind": _by(records, "kind"),
        "unreadable": [
            {name: record[name] for name in ("index", "sample_id", "problem")}
            for record in records
            if record["problem"] is not None
        ],
        "timing": {
            **timing,
            "process_seconds": round(seconds, 2),  # summed over processes and starts
            "process_seconds_per_sample": round(seconds / len(records), 4),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "device": device(),
    }


def metrics_with_intervals(scores: Sequence[SampleScore], seed: int = 0) -> dict[str, dict[str, float]]:
    """Every metric with its 95 % bootstrap interval.

    Args:
        scores (`Sequence[SampleScore]`): At least one.
        seed (`int`, *optional*, defaults to 0): Of the resamples.

    Returns:
        `dict[str, dict]`: by name `value`, `low`, `high` in [0, 1], and `num_samples`, those that bear on it.
    """
    values, intervals = metrics_of_scores(scores), bootstrap_intervals(scores, seed=seed)
    no_target = sum(score.target_pixels == 0 for score in scores)
    bearing = {"N-acc": no_target, "T-acc": len(scores) - no_target}
    return {
        name: {
            "value": value,
            "low": intervals[name][0],
            "high": intervals[name][1],
            "num_samples": bearing.get(name, len(scores)),
        }
        for name, value in values.items()
    }


def _counts(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "samples": len(records),
        "no_target": sum(record["target_pixels"] == 0 for record in records),
        "several_objects": sum((record["num_targets"] or 0) > 1 for record in records),
        "empty_predictions": sum(record["predicted_pixels"] == 0 for record in records),
        "unreadable": sum(record["problem"] is not None for record in records),
    }


def _by(records: Sequence[dict[str, Any]], column: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[SampleScore]] = {}
    for record in records:
        groups.setdefault(record[column] or UNNAMED, []).append(score_of(record))
    return {name: metrics_with_intervals(groups[name]) for name in sorted(groups)}
