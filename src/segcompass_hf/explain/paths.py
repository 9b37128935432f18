# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Measured contributions: the scalar is read as the first concepts come one by one, and as they go one by one.

Gradients choose and order the `FIRST` features. They come into an empty sequence one by one, then all others together;
and they are taken one by one from the whole, in the same order, until the others alone are left, which then go
together. Read backwards the second way is the first in reverse: an order and its reverse are the smallest antithetic
sample for the Shapley value (Mitchell et al., 2022, arXiv 2104.12199), in which the others are one player. A feature's
contribution is the mean of what it brought and of what went with it, so that what works only together, and what can
stand for each other, is shared by halves. Each way begins and ends at the whole or at nothing: contributions add up to
the change, whatever the scalar is.

The others are measured as one. Among them that is shared out by gradients, brought to the scale that these have on the
first ones and corrected so that they add up to it. It is much where many concepts could stand for the first ones: then
the others alone bring the mask, half of that is theirs, and no reading gives it to one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .scalars import Scalars

FIRST = 12  # features read one by one
SMALLEST = 1e-30  # sums of sizes below it are none


@dataclass
class Contributions:
    """Contributions to one mask, and what of them was measured.

    Args:
        contributions (`torch.Tensor` of shape `(num_active,)`): Of the entries; within a feature shared out by
            gradients.
        measured (`torch.Tensor` of shape `(num_features,)`): bool; whether a feature was read alone.
        shared (`float`): Size of the contributions that were not read of a feature alone but shared out, in units of
            the scalar.
    """

    contributions: torch.Tensor
    measured: torch.Tensor
    shared: float


def measure_paths(scalars: Scalars, mask: int, scores: torch.Tensor, ends: tuple[float, float]) -> Contributions:
    """Read the scalar of one mask along both ways.

    Args:
        scalars ([`Scalars`]): Of the answer.
        mask (`int`): Which of its masks.
        scores (`torch.Tensor` of shape `(num_active,)`): Estimates by gradients, which choose, order and share out.
        ends (`tuple[float, float]`): The scalar without concepts and with all of them.
    """
    features, index = scalars.replay.captured.concepts.features.unique(return_inverse=True)
    by_score = scores.new_zeros(len(features)).index_add(0, index, scores)
    order = by_score.argsort(descending=True, stable=True)
    first, others = order[:FIRST], order[FIRST:]
    come = torch.zeros(len(first), len(features), dtype=torch.bool, device=index.device)
    come[:, first] = torch.ones(len(first), len(first), dtype=torch.bool, device=index.device).tril()
    levels = torch.cat([come, ~come])[:, index].to(scalars.activations.dtype)
    inserted, deleted = scalars.at_mask(levels, mask).view(2, -1)  # (len(first),) each
    nothing, whole = (inserted.new_tensor([end]) for end in ends)
    brought, taken = torch.cat([nothing, inserted]).diff(), torch.cat([whole, deleted]).diff()
    alone = ((brought - taken) / 2).to(by_score)
    rest = float(whole - inserted[-1] + deleted[-1] - nothing) / 2 if len(others) else 0.0
    scale = (alone.abs().sum() / by_score[first].abs().sum().clamp(min=SMALLEST)).clamp(max=1.0)
    total = torch.zeros_like(by_score).index_copy(0, first, alone)
    total[others] = share_out(scale * by_score[others], torch.zeros_like(others), total.new_tensor([rest]))
    measured = torch.zeros(len(features), dtype=torch.bool, device=index.device).index_fill(0, first, True)
    return Contributions(share_out(scores, index, total), measured, float(total[others].abs().sum()))


def share_out(scores: torch.Tensor, group: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Scores `(n,)` corrected so that those of each group add up to its total: in proportion to their sizes, or alike
    where all of a group are 0."""
    nothing = torch.zeros_like(totals, dtype=scores.dtype)
    sizes = scores.abs()
    sizes = torch.where(nothing.index_add(0, group, sizes)[group] > SMALLEST, sizes, 1.0)
    missing = totals - nothing.index_add(0, group, scores)
    return scores + (missing / nothing.index_add(0, group, sizes).clamp(min=SMALLEST))[group] * sizes
