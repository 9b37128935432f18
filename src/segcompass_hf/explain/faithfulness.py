# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Faithfulness: concepts are deleted or inserted in the order that a method gives, and the mask is watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .attribution import Attribution
from .replay import Replay
from .scalars import MaskScalar

# Shares of a sequence's features at which curves are read; nothing (0) and everything (1) are known and not computed.
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)


@dataclass
class FaithfulnessCurves:
    """What becomes of one mask as features go, or come.

    Args:
        fractions (`np.ndarray` of shape `(P,)`): Share of the features deleted (or inserted), from 0 to 1.
        deletion_iou, insertion_iou (`np.ndarray` of shape `(P,)`): IoU to the full mask, at the model's mask
            resolution, in [0, 1].
        deletion_value, insertion_value (`np.ndarray` of shape `(P,)`): The explained scalar.
    """

    fractions: np.ndarray
    deletion_iou: np.ndarray
    insertion_iou: np.ndarray
    deletion_value: np.ndarray
    insertion_value: np.ndarray

    @property
    def deletion_area(self) -> float:
        """Area under the IoU as features are deleted, in [0, 1]; a faithful order has a small one."""
        return float(np.trapezoid(self.deletion_iou, self.fractions))

    @property
    def insertion_area(self) -> float:
        """Area under the IoU as features are inserted, in [0, 1]; a faithful order has a large one."""
        return float(np.trapezoid(self.insertion_iou, self.fractions))


def feature_orders(replay: Replay, attribution: Attribution, seed: int = 0) -> dict[str, torch.Tensor]:
    """The orders compared, each a permutation of the answer's features (`captured.features`), first to go first.

    `attribution`: by contribution, the largest first, those against the mask last. `activation`: by activation summed
    over the tokens. `random`: from `seed`.
    """
    concepts = replay.captured.concepts
    features, index = concepts.features.unique(return_inverse=True)
    activation = concepts.values.new_zeros(len(features)).index_add(0, index, concepts.values)
    random = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    return {
        "attribution": attribution.per_feature(features, index).argsort(descending=True, stable=True),
        "activation": activation.argsort(descending=True, stable=True),
        "random": random.to(index.device),
    }


def faithfulness_curves(
    replay: Replay,
    attribution: Attribution,
    orders: Mapping[str, torch.Tensor],
    fractions: Sequence[float] = FRACTIONS,
) -> dict[str, FaithfulnessCurves]:
    """Delete and insert whole features in several orders, all of them together.

    Args:
        replay ([`Replay`]): Of the captured answer.
        attribution ([`Attribution`]): Of the mask watched; says slot and scalar.
        orders (`Mapping[str, torch.Tensor]`): Permutations `(num_features,)`, see [`feature_orders`].
        fractions (`Sequence[float]`): Points between 0 and 1 at which the curves are read.

    Returns:
        `dict[str, FaithfulnessCurves]`, as `orders`.
    """
    _, index = replay.captured.concepts.features.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    keeps = []
    for order in orders.values():
        rank = torch.empty_like(order)
        rank[order] = torch.arange(count, device=order.device)
        gone = torch.stack([rank < round(fraction * count) for fraction in fractions])  # (P - 2, num_features)
        keeps += [~gone, gone]
    ends = torch.stack([torch.ones_like(keeps[0][0]), torch.zeros_like(keeps[0][0])])
    iou, value = mask_readings(replay, attribution, torch.cat([ends, *keeps])[:, index])
    full, empty = (iou[0], value[0]), (iou[1], value[1])
    points = np.array([0.0, *fractions, 1.0])
    curves, size = {}, len(fractions)
    for number, name in enumerate(orders):
        start = 2 + 2 * size * number
        deleted, inserted = slice(start, start + size), slice(start + size, start + 2 * size)
        columns = [
            np.concatenate([[first], reading[rows], [last]])
            for rows, one, other in ((deleted, full, empty), (inserted, empty, full))
            for reading, first, last in zip((iou, value), one, other, strict=True)
        ]
        curves[name] = FaithfulnessCurves(points, columns[0], columns[2], columns[1], columns[3])
    return curves


def mask_readings(replay: Replay, attribution: Attribution, levels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """IoU to the full mask and the explained scalar, both `(rows,)`, at levels of the activations.

    Args:
        replay ([`Replay`]): Of the captured answer.
        attribution ([`Attribution`]): Of the mask; says slot and scalar.
        levels (`torch.Tensor` of shape `(rows, num_active)`): Factors of the activations, or bool.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The IoU is taken at the model's mask resolution, within the image.
    """
    scalar = MaskScalar(replay, attribution.slot, attribution.target)
    activations, iou, value = replay.captured.concepts.values, [], []
    for rows in levels.to(activations.dtype).split(replay.chunk_size):
        output = replay.run(replay.embed(rows * activations), [scalar.slot])
        iou.append(scalar.iou(output.pred_masks[:, 0]))
        value.append(scalar(output.slot_logits, output.pred_masks[:, 0]))
    return torch.cat(iou).cpu().numpy(), torch.cat(value).cpu().numpy()
