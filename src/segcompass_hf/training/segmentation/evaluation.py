# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Greedy segmentation of rows with the model's own reasoning, scored at the images' size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...data.schema import decode_mask, decode_masks
from ...evaluation.predictors.model import ModelPredictor
from ...metrics.segmentation import SampleScore, metrics_of_scores, score_sample


class ScoredRow(NamedTuple):
    """What a row's segmentation came to: its id, pixel counts, and how many slots were kept."""

    sample_id: str | None
    score: SampleScore
    kept_slots: int


def segment_and_score(model: Any, processor: Any, rows: Any, batch_size: int = 8, **segment_kwargs) -> list[ScoredRow]:
    """Segment rows greedily, as a user would, and compare with every object of every row.

    Args:
        model (`SegCompassForReasoningSegmentation`): Is left in the mode (training or not) it is in.
        processor (`SegCompassProcessor`): Its processor.
        rows (`Sequence[dict]`): In the row schema; a slice of them is a list.
        batch_size (`int`, defaults to 8): Rows at a time.
        segment_kwargs: For `model.segment`, such as `max_new_tokens`.

    Returns:
        `list[ScoredRow]`: in the order of the rows.
    """
    predictor, scored = ModelPredictor(model, processor, **segment_kwargs), []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for row, prediction in zip(batch, predictor.predict(batch), strict=True):
            size = prediction.masks.shape[1:]
            ignore = None if row.get("ignore") is None else decode_mask(row["ignore"])
            score = score_sample(prediction.masks, decode_masks(row["masks"], size), ignore)
            scored.append(ScoredRow(row.get("sample_id"), score, len(prediction.masks)))
    return scored


def segmentation_report(scored: Sequence[ScoredRow]) -> dict[str, float]:
    """gIoU, cIoU, N-acc and T-acc in [0, 1], and the mean of `kept_slots`."""
    if not scored:
        raise ValueError("there is no row to report on; the evaluation set is empty.")
    figures = metrics_of_scores(row.score for row in scored)
    return {**figures, "kept_slots": sum(row.kept_slots for row in scored) / len(scored)}
