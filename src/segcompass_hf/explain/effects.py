# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What concepts do: how much of which slot's masks they make, and what heatmap and mask are without them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.readable_rows import keep_images_encoded
from .answer import Answer
from .attribution import attribute
from .dictionary.effects import ConceptEffect
from .scalars import MaskScalar

NUM_TESTED = 5  # concepts of a mask that are taken away one by one


@dataclass
class _Sums:
    shares: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # slot -> one per mask
    tests: list[tuple[float, float, float]] = field(default_factory=list)  # IoU, fall inside, fall outside

    def effect(self, num_slots: int) -> ConceptEffect:
        every = [share for shares in self.shares.values() for share in shares]
        slots = [float(np.mean(self.shares[slot])) if slot in self.shares else None for slot in range(num_slots)]
        means = [float(value) for value in np.mean(self.tests, axis=0)] if self.tests else [None] * 3
        raised = float(np.mean([share > 0 for share in every]))
        return ConceptEffect(len(every), raised, float(np.mean(every)), slots, len(self.tests), *means)


def measure_effects(
    model: Any,
    processor: Any,
    rows: Iterable[dict[str, Any]],
    *,
    num_rows: int | None = None,
    num_tested: int = NUM_TESTED,
) -> dict[int, ConceptEffect]:
    """Answer rows, attribute every mask, and take the first concepts of each away one by one.

    Args:
        model (`SegCompassForReasoningSegmentation`): The model; set to evaluation mode.
        processor (`SegCompassProcessor`): Its processor.
        rows (`Iterable[dict]`): In the row schema; `image` and `instruction` are read.
        num_rows (`int`, *optional*): Answer so many at most.
        num_tested (`int`, defaults to 5): Concepts of a mask to take away.

    Returns:
        `dict[int, ConceptEffect]`: of the features that were active in an answer with a mask.
    """
    sums: dict[int, _Sums] = defaultdict(_Sums)
    for row in itertools.islice(iter(keep_images_encoded(rows)), num_rows):
        answer = Answer(model, processor, row["image"], row["instruction"])
        if answer.kept:
            for attribution in attribute(answer.replay, answer.slots):
                _add(sums, answer, attribution, num_tested)
    return {feature: sums[feature].effect(model.config.num_slots) for feature in sorted(sums)}


def _add(sums: dict[int, _Sums], answer: Any, attribution: Any, num_tested: int) -> None:
    """Count one mask."""
    features, index = answer.captured.concepts.features.unique(return_inverse=True)
    totals = attribution.per_feature(features, index)
    shares = totals / totals.clamp(min=0).sum().clamp(min=1e-12)
    for feature, share in zip(features.tolist(), shares.tolist(), strict=True):
        sums[feature].shares[attribution.slot].append(share)
    first = totals.abs().argsort(descending=True, stable=True)[:num_tested]
    if len(first):
        for place, test in zip(first.tolist(), _without(answer, attribution.slot, index, first), strict=True):
            sums[int(features[place])].tests.append(test)


def _without(answer: Any, slot: int, index: torch.Tensor, first: torch.Tensor) -> list[tuple[float, float, float]]:
    """Of every feature in places `first`: IoU of the mask without it, and how much the heatmap falls in and off it."""
    levels = torch.ones(len(first) + 1, int(index.max()) + 1, device=index.device)
    levels[torch.arange(len(first)), first] = 0.0
    replay, scalar = answer.replay, MaskScalar(answer.replay, slot, "mask_logit")
    output = replay.run(replay.embed(levels[:, index] * answer.captured.concepts.values), [slot])
    iou = scalar.iou(output.pred_masks[:-1, 0])  # (tests,)
    heat = output.heatmap_logits[:, slot].float().sigmoid()  # (tests + 1, 4h, 4w)
    fall, places = heat[-1] - heat[:-1], (scalar.inside, scalar.area & ~scalar.inside)
    falls = [(fall * place).sum((1, 2)) / place.sum().clamp(min=1) for place in places]
    return list(zip(iou.tolist(), *(column.tolist() for column in falls), strict=True))


__all__ = ["measure_effects"]
