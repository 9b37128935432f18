# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Every control of one sample after another, as records of plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ...data.schema import decode_mask, decode_masks
from ...metrics import score_sample
from ...token_grids_segcompass import UnknownPlacesError
from ..answer import Answer
from ..attribution import Attribution, attribute
from ..faithfulness import faithfulness_curves, feature_orders, mask_readings
from .ablations import TOP, matched_ablation, union_tests
from .patches import causal_patches
from .reasoning import Objects, reasoning_test


@dataclass
class ControlRecord:
    """What one sample says.

    Args:
        sample_id (`str`, *optional*): The row's.
        iou (`float`): Of the answer to the target, in [0, 1].
        num_features (`int`): Active features.
        masks (`list[dict]`): Of every mask that the model keeps: `slot`, `shared_out` (see `quadrature_error`),
            `deletion` and `insertion` (areas of faithfulness curves by attribution, and `random_deletion`,
            `random_insertion`), `specificity` (loss of IoU without its first concepts: `own` and the `others`'; `None`
            for a mask alone), `matched` ([`MatchedAblation`]), `unions` (list of [`UnionTest`]) and `patches`
            ([`PatchTest`] of its first concept that fires on the picture), `None` where there is nothing to measure.
        reasoning (`dict`, *optional*): [`ReasoningTest`]; `None` where the answer has none.
    """

    sample_id: str | None
    iou: float
    num_features: int
    masks: list[dict[str, Any]] = field(default_factory=list)
    reasoning: dict[str, Any] | None = None


def measure_controls(
    model: Any,
    processor: Any,
    row: dict[str, Any],
    objects: Callable[[dict[str, Any]], Objects],
    seed: int = 0,
    **segment_kwargs,
) -> ControlRecord:
    """Answer a row and hold the answer's explanation against the controls.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model.
        processor ([`SegCompassProcessor`]): Its processor.
        row (`dict`): In the row schema.
        objects (`Callable`): Row -> words and mask of every known object, such as [`scenes_objects`], or
            [`target_objects`] where only the target is known.
        seed (`int`, defaults to 0): Of everything that is drawn.
        segment_kwargs: For `segment`.
    """
    answer = Answer(model, processor, row["image"], row["instruction"], **segment_kwargs)
    size = (answer.image.height, answer.image.width)
    targets = decode_masks(row["masks"], size)
    ignore = None if row.get("ignore") is None else decode_mask(row["ignore"])
    kept = answer.masks if answer.kept else answer.masks[:0]
    record = ControlRecord(
        row.get("sample_id"), score_sample(kept, targets, ignore).iou, len(answer.captured.features)
    )
    if answer.kept and len(answer.captured.features):
        attributions = attribute(answer.replay, answer.slots)
        record.masks = [_mask_record(answer, attributions, number, seed) for number in range(len(attributions))]
    if answer.reasoning:
        record.reasoning = asdict(reasoning_test(answer, objects(row), targets, ignore, seed))
    return record


def _mask_record(answer: Answer, attributions: list[Attribution], number: int, seed: int) -> dict[str, Any]:
    replay, attribution = answer.replay, attributions[number]
    orders = feature_orders(replay, attribution, seed)
    curves = faithfulness_curves(replay, attribution, {name: orders[name] for name in ("attribution", "random")})
    matched = matched_ablation(replay, attribution, seed)
    patches = _first_patches(answer, orders["attribution"].tolist(), seed)
    return {
        "slot": attribution.slot,
        "shared_out": attribution.quadrature_error,
        "deletion": curves["attribution"].deletion_area,
        "insertion": curves["attribution"].insertion_area,
        "random_deletion": curves["random"].deletion_area,
        "random_insertion": curves["random"].insertion_area,
        "specificity": specificity(answer.replay, attributions, number),
        "matched": None if matched is None else asdict(matched),
        "unions": [asdict(test) | {"interference": test.interference} for test in union_tests(replay, attribution)],
        "patches": None if patches is None else asdict(patches),
    }


def specificity(replay: Any, attributions: list[Attribution], number: int, top: int = TOP) -> dict[str, float] | None:
    """Loss of IoU, in [0, 1], without the first concepts of one mask: its `own`, and the mean of the `others`.

    Args:
        replay ([`Replay`]): Of the captured answer.
        attributions (`list[Attribution]`): Of all its masks; `None` is returned for one alone.
        number (`int`): Whose concepts go.
        top (`int`, defaults to 5): How many.
    """
    if len(attributions) < 2:
        return None
    features, index = replay.captured.concepts.features.unique(return_inverse=True)
    keep = torch.ones(1, len(features), device=index.device)
    keep[0, feature_orders(replay, attributions[number])["attribution"][:top]] = 0.0
    losses = [1 - float(mask_readings(replay, other, keep[:, index])[0][0]) for other in attributions]
    own = losses.pop(number)
    return {"own": own, "others": float(np.mean(losses))}


def _first_patches(answer: Answer, order: list[int], seed: int) -> Any:
    """Causal patches of the first concept of an order that fires on the picture."""
    ids, first = answer.captured.features, order[:TOP]
    for feature in (int(ids[place]) for place in first):
        try:
            tested = causal_patches(answer.model, answer.processor, answer.image, answer.instruction, feature, seed)
        except UnknownPlacesError:  # known of no picture of this family
            return None
        if tested is not None:
            return tested
    return None


__all__ = ["ControlRecord", "measure_controls", "specificity"]
