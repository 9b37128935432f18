# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From records to figures: metrics with intervals, over everything and by group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from ..metrics.breakdown import breakdown, metrics_with_intervals
from ..metrics.calibration import calibration_figures
from ..metrics.selection import selection_by_group, selection_figures
from .environment import commit, device, versions
from .records import choice_score_of, score_of

UNNAMED = "(none)"  # group of samples without a source or kind


def summarize(records: Sequence[dict[str, Any]], run: dict[str, Any], timing: dict[str, Any]) -> dict[str, Any]:
    """All that `summary.json` says.

    Args:
        records (`Sequence[dict]`): Of all samples, see `records.record_of`.
        run (`dict`): What was run; `predictor`, `dataset` and `settings`.
        timing (`dict`): What the runner measured.

    Returns:
        `dict`: `run`'s entries; `counts`; `metrics` (per name `value`, `low`, `high` in [0, 1] and `num_samples`, the
        samples that bear on it); `calibration` of the masks' scores, see [`calibration_figures`] (`None` without
        scores); `selection`, what is lost to choosing and to drawing, over all samples whose objects are known and
        `by_kind`, see [`selection_figures`] (`None` where none are); `by_source` and `by_kind` (metrics per group);
        `unreadable`; `timing`, `date`, `versions`, `commit` and `device`.
    """
    seconds = sum(record["seconds"] for record in records)
    scores = [score_of(record) for record in records]
    images = _images(records)
    groups = {column: [record[column] or UNNAMED for record in records] for column in ("source", "kind")}
    return {
        **run,
        "counts": _counts(records),
        "metrics": metrics_with_intervals(scores, images=images),
        "calibration": _calibration(records),
        "selection": _selection(records),
        "by_source": breakdown(scores, groups["source"], images),
        "by_kind": breakdown(scores, groups["kind"], images),
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


def _counts(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    judged = [record for record in records if not record["left_out"]]
    return {
        "samples": len(records),
        "left_out": len(records) - len(judged),  # all of their target is ignored
        "no_target": sum(record["target_pixels"] == 0 for record in judged),
        "several_objects": sum((record["num_targets"] or 0) > 1 for record in records),
        "empty_predictions": sum(record["predicted_pixels"] == 0 for record in judged),
        "unreadable": sum(record["problem"] is not None for record in records),
        "duplicates": sum(record.get("duplicates", 0) for record in records),
        "duplicates_dropped": sum(record.get("duplicates_dropped", 0) for record in records),
    }


def _images(records: Sequence[dict[str, Any]]) -> list[str | int]:
    """The image of every sample, which intervals draw as wholes; its own where none is named."""
    return [record.get("image_id") or record["index"] for record in records]


def _selection(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the records of samples whose other objects are known."""
    known = [record for record in records if choice_score_of(record) is not None]
    if not known:
        return None
    scores = [[of(record) for record in known] for of in (score_of, choice_score_of)]
    kinds = [record["kind"] or UNNAMED for record in known]
    images = _images(known)
    return {
        "all": selection_figures(*scores, images=images),
        "by_kind": selection_by_group(*scores, kinds, images),
    }


def _calibration(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the records whose masks have scores in [0, 1]."""
    scored = [record for record in records if record["scores"] and "mask_ious" in record]
    scores = [score for record in scored for score in record["scores"]]
    if any(not 0 <= score <= 1 for score in scores):
        return None  # another model's, on a scale of its own
    return calibration_figures(scores, [iou for record in scored for iou in record["mask_ious"]])
