# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Minimal sufficient sets: the fewest concepts that keep a mask as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attribution import Attribution
from .faithfulness import feature_orders, mask_readings
from .replay import Replay

PROBES = 8  # sets tried together


@dataclass
class SufficientSet:
    """Features that suffice for a mask.

    Args:
        features (`tuple[int, ...]`): SAE feature ids, largest contribution first.
        iou (`float`): Of the mask they make alone to the full one, in [0, 1].
        num_features (`int`): Active features altogether.
        prefix_size (`int`): How many first features in the order of attribution sufficed, before any was pruned.
        num_evaluations (`int`): Masks made on the way.
    """

    features: tuple[int, ...]
    iou: float
    num_features: int
    prefix_size: int
    num_evaluations: int


def minimal_sufficient_set(
    replay: Replay, attribution: Attribution, min_iou: float = 0.9, max_evaluations: int = 200
) -> SufficientSet:
    """The fewest features whose mask keeps an IoU of `min_iou` to the full one.

    Greedy: the shortest prefix in the order of attribution that suffices, found by ever finer grids of sizes; then
    groups of it are left out, halved in size whenever none can be spared. Not proven the smallest: that would take all
    subsets.

    Args:
        replay ([`Replay`]): Of the captured answer.
        attribution ([`Attribution`]): Of the mask.
        min_iou (`float`, defaults to 0.9): In (0, 1].
        max_evaluations (`int`, defaults to 200): Masks made at most (pruning stops there).
    """
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou must be in (0, 1], got {min_iou}.")
    features, index = replay.captured.concepts.features.unique(return_inverse=True)
    order = feature_orders(replay, attribution)["attribution"]
    search = _Search(replay, attribution, index, len(features))
    size, iou = _shortest_prefix(search, order, min_iou)
    kept, iou = _prune(search, order[:size], iou, min_iou, max_evaluations)
    return SufficientSet(tuple(features[kept].tolist()), iou, len(features), size, search.num_evaluations)


class _Search:
    """Makes masks of sets of features and counts them."""

    def __init__(self, replay: Replay, attribution: Attribution, index: torch.Tensor, num_features: int):
        self.replay, self.attribution, self.index, self.num_features = replay, attribution, index, num_features
        self.num_evaluations = 0

    def iou(self, sets: list[torch.Tensor]) -> np.ndarray:
        """IoU of every set of places of features, `(len(sets),)`."""
        levels = torch.zeros(len(sets), self.num_features, device=self.index.device)
        for row, places in enumerate(sets):
            levels[row, places] = 1.0
        self.num_evaluations += len(sets)
        return mask_readings(self.replay, self.attribution, levels[:, self.index])[0]


def _shortest_prefix(search: _Search, order: torch.Tensor, min_iou: float) -> tuple[int, float]:
    """Size of the shortest prefix found that suffices, and its IoU. The IoU need not rise with size: hence grids."""
    low, high, best = -1, len(order), 1.0  # sizes up to `low` do not suffice, as far as seen; all features do
    sizes = np.append(0, np.geomspace(1, max(1, high), PROBES))
    while high - low > 1:
        sizes = np.unique(sizes.round().astype(int))
        sizes = sizes[(sizes > low) & (sizes < high)]
        found = search.iou([order[:size] for size in sizes.tolist()])
        enough = np.flatnonzero(found >= min_iou)
        first = int(enough[0]) if len(enough) else len(sizes)
        low = int(sizes[first - 1]) if first else low
        if len(enough):
            high, best = int(sizes[first]), float(found[first])
        sizes = np.linspace(low, high, PROBES + 2)
    return high, best


def _prune(
    search: _Search, kept: torch.Tensor, iou: float, min_iou: float, max_evaluations: int
) -> tuple[torch.Tensor, float]:
    """Leave out groups while the rest suffices, the best group of each round; smaller groups when none can go."""
    group = len(kept)
    while len(kept) > 0 and search.num_evaluations < max_evaluations:
        group, rest = max(1, min(group, len(kept) // PROBES)), []
        for start in range(0, len(kept), group):
            rest.append(torch.cat([kept[:start], kept[start + group :]]))
        found = search.iou(rest)
        best = int(found.argmax())
        if found[best] >= min_iou:
            kept, iou = rest[best], float(found[best])
        elif group == 1:
            break
        else:
            group = max(1, group // 2)
    return kept, iou
