# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Reference reasoning for rows that have none: the model's own, as it is before training."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def with_own_reasoning(dataset: Any, predictor: Any, batch_size: int = 8) -> Any:
    """Fill `reasoning` where it is missing with what the model itself thinks about the row.

    Without it such rows train masks behind an empty think block, which is not what the model sees when it is used: its
    own answers then get worse. Nothing says that the model's reasoning is right; it keeps its way of thinking, and
    learns masks on top of it.

    Args:
        dataset (`datasets.Dataset`): In the row schema.
        predictor ([`ModelPredictor`]): Of the model before training. Answers greedily.
        batch_size (`int`, *optional*, defaults to 8): Rows at a time.

    Returns:
        `datasets.Dataset`: the same rows in the same order, with images as they were.
    """
    reasonings = list(dataset["reasoning"])
    missing = [index for index, words in enumerate(reasonings) if not (words or "").strip()]
    if not missing:
        return dataset
    for start in logging.tqdm(range(0, len(missing), batch_size), desc="own reasoning"):
        indices = missing[start : start + batch_size]
        rows = [dataset[index] for index in indices]
        for index, prediction in zip(indices, predictor.predict(rows), strict=True):
            reasonings[index] = prediction.reasoning
    logger.info(f"{len(missing)} of {len(dataset)} rows have no reasoning and got the model's own.")
    feature = dataset.features["reasoning"]
    columns = dataset.column_names
    return (
        dataset.remove_columns("reasoning")
        .add_column("reasoning", reasonings, feature=feature)
        .select_columns(columns)
    )
