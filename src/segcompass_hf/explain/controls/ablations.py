# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Ablations as controls: first concepts against others of equal norm, and two at once against each of the two."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from ..attribution import Attribution
from ..faithfulness import feature_orders, mask_readings
from ..replay import Replay

TOP = 5  # concepts taken away together
PAIRED = 4  # concepts whose pairs are taken away
NEAREST = 8  # features nearest in norm, of which one is drawn
DRAWS = 4  # sets of controls, averaged


@dataclass(frozen=True)
class MatchedAblation:
    """What a mask loses without its first concepts, and without as many others.

    Args:
        first, matched, random (`float`): Loss of IoU, in [0, 1]: without the `TOP` first concepts, without as many of
            equal norm, and without as many of any norm (means over `DRAWS`).
        norm_ratio (`float`): Norm of what the matched ones put into the concept embeddings, over that of the first.
    """

    first: float
    matched: float
    random: float
    norm_ratio: float


@dataclass(frozen=True)
class UnionTest:
    """What two concepts do together and each alone, in units of the change that all concepts make.

    Args:
        alone (`tuple[float, float]`): What the explained scalar loses without each.
        together (`float`): What it loses without both.
    """

    alone: tuple[float, float]
    together: float

    @property
    def interference(self) -> float:
        """What the two do together beyond the sum of both: above 0 where they stand in for each other."""
        return self.together - sum(self.alone)


def matched_ablation(replay: Replay, attribution: Attribution, seed: int = 0) -> MatchedAblation | None:
    """Take a mask's first concepts away, and in their place as many others of equal norm, or of any.

    Args:
        replay ([`Replay`]): Of the captured answer.
        attribution ([`Attribution`]): Of the mask.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        [`MatchedAblation`]; `None` with fewer than twice `TOP` features.
    """
    norms, index = feature_norms(replay)
    if len(norms) < 2 * TOP:
        return None
    first = feature_orders(replay, attribution)["attribution"][:TOP].tolist()
    others = sorted(set(range(len(norms))) - set(first))
    generator = np.random.default_rng(seed)
    matched = [_of_equal_norm(norms, first, others, generator) for _ in range(DRAWS)]
    random = [generator.permutation(others)[:TOP].tolist() for _ in range(DRAWS)]
    keep = torch.ones(1 + 2 * DRAWS, len(norms), device=index.device)
    for row, gone in enumerate([first, *matched, *random]):
        keep[row, gone] = 0.0
    loss = 1 - mask_readings(replay, attribution, keep[:, index])[0]
    ratios = [np.linalg.norm(norms[chosen]) / np.linalg.norm(norms[first]) for chosen in matched]
    return MatchedAblation(
        float(loss[0]), float(loss[1 : 1 + DRAWS].mean()), float(loss[1 + DRAWS :].mean()), float(np.mean(ratios))
    )


def union_tests(replay: Replay, attribution: Attribution) -> list[UnionTest]:
    """Take every two of a mask's `PAIRED` first concepts away, and each of them alone.

    Args:
        replay ([`Replay`]): Of the captured answer.
        attribution ([`Attribution`]): Of the mask.
    """
    change = abs(attribution.value - attribution.baseline_value)
    first = feature_orders(replay, attribution)["attribution"][:PAIRED].tolist()
    pairs = list(combinations(range(len(first)), 2))
    if not pairs or not change:
        return []
    _, index = replay.captured.concepts.features.unique(return_inverse=True)
    keep = torch.ones(len(first) + len(pairs), int(index.max()) + 1, device=index.device)
    for row, gone in enumerate([*((place,) for place in range(len(first))), *pairs]):
        keep[row, [first[place] for place in gone]] = 0.0
    lost = (attribution.value - mask_readings(replay, attribution, keep[:, index])[1]) / change
    return [
        UnionTest((float(lost[one]), float(lost[two])), float(lost[len(first) + row]))
        for row, (one, two) in enumerate(pairs)
    ]


def feature_norms(replay: Replay) -> tuple[np.ndarray, torch.Tensor]:
    """Norm of what each feature puts into the concept embeddings, over all tokens: `|code| sqrt(sum of v^2)`.

    Returns:
        `tuple`: norms `(num_features,)` in the order of `captured.features`, and each entry's feature `(num_active,)`.
    """
    concepts = replay.captured.concepts
    features, index = concepts.features.unique(return_inverse=True)
    squares = (concepts.values[:, None] * replay.codes).float().pow(2).sum(-1)  # (num_active,)
    norms = squares.new_zeros(len(features)).index_add(0, index, squares).sqrt()
    return norms.cpu().numpy(), index


def _of_equal_norm(
    norms: np.ndarray, first: list[int], others: list[int], generator: np.random.Generator
) -> list[int]:
    """For each of the first, the largest before, one of the `NEAREST` others in norm; none twice."""
    left, chosen = list(others), []
    for feature in sorted(first, key=lambda one: -norms[one]):
        near = sorted(left, key=lambda one: abs(np.log((norms[one] + 1e-12) / (norms[feature] + 1e-12))))
        chosen.append(int(generator.choice(near[:NEAREST])))
        left.remove(chosen[-1])
    return chosen


__all__ = ["MatchedAblation", "UnionTest", "feature_norms", "matched_ablation", "union_tests"]
