# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Two runs on the same samples: how far apart, and in which samples."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..metrics.segmentation import ALL_METRIC_NAMES, metrics_of_scores
from ..printable import printable
from .records import read_samples, score_of

SCORE_TOLERANCE = 0.001


@dataclass
class SampleDifference:
    """A sample that two runs answered differently.

    Args:
        index, sample_id: Which.
        iou, other_iou (`float`): In [0, 1].
        differs (`list[str]`): What does, of `"masks"`, `"scores"` (by more than 0.001), `"text"` and `"problem"`.
    """

    index: int
    sample_id: str | None
    iou: float
    other_iou: float
    differs: list[str]


@dataclass
class RunComparison:
    """How two runs differ.

    Args:
        num_samples (`int`): Samples of each.
        metrics (`dict[str, float]`): By name, this run's value minus the other's.
        differences (`list[SampleDifference]`): The largest difference of IoU first.
    """

    num_samples: int
    metrics: dict[str, float]
    differences: list[SampleDifference]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self, limit: int = 20) -> str:
        """A paragraph and the first `limit` samples."""
        deltas = ", ".join(f"{name} {value:+.6f}" for name, value in self.metrics.items())
        lines = [f"{len(self.differences)} of {self.num_samples} samples differ; metrics differ by {deltas}."]
        for row in self.differences[:limit]:
            lines.append(
                f"  {row.index} {printable(row.sample_id)}: IoU {row.iou:.4f} against {row.other_iou:.4f} "
                f"({', '.join(row.differs)})"
            )
        if len(self.differences) > limit:
            lines.append(f"  ... and {len(self.differences) - limit} more")
        return "\n".join(lines)


def compare_runs(folder: str | os.PathLike, other: str | os.PathLike) -> RunComparison:
    """Compare two finished runs sample by sample.

    Args:
        folder, other (path): Their `output_dir`s.

    Returns:
        `RunComparison`

    Raises:
        FileNotFoundError: one of them is not finished.
        ValueError: they are about different samples.
    """
    records, others = read_samples(folder), read_samples(other)
    ids, other_ids = ([(r["sample_id"], r["instruction"]) for r in run] for run in (records, others))
    if ids != other_ids:
        first = next((i for i, pair in enumerate(zip(ids, other_ids, strict=False)) if pair[0] != pair[1]), None)
        where = "" if first is None else f"; sample {first} is {ids[first]} in one and {other_ids[first]} in the other"
        raise ValueError(
            f"{os.fspath(folder)!r} holds {len(ids)} samples and {os.fspath(other)!r} {len(other_ids)}{where}. Only "
            "runs on the same data set can be compared."
        )
    differences = []
    for record, old in zip(records, others, strict=True):
        differs = [name for name in ("masks", "text", "problem") if record[name] != old[name]]
        scores, old_scores = _same_length(record["scores"], old["scores"])
        if not np.allclose(scores, old_scores, rtol=0, atol=SCORE_TOLERANCE):
            differs.append("scores")
        if differs:
            iou, other_iou = score_of(record).iou, score_of(old).iou
            differences.append(SampleDifference(record["index"], record["sample_id"], iou, other_iou, differs))
    differences.sort(key=lambda row: (-abs(row.iou - row.other_iou), row.index))
    metrics, old = (metrics_of_scores(map(score_of, run), ALL_METRIC_NAMES) for run in (records, others))
    return RunComparison(len(records), {name: metrics[name] - old[name] for name in metrics}, differences)


def _same_length(*scores: list[float]) -> list[list[float]]:
    """With zeros for masks that the other one has."""
    longest = max(map(len, scores))
    return [values + [0.0] * (longest - len(values)) for values in scores]
