# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Attribution: how much every active (token, feature) entry contributes to a mask.

`f` is a scalar of one mask as a function of the activations `v`; contributions share out `f(v) - f(0)` among them.

`levels` takes gradients at random levels of the features, from absent (0) to as they were (1) in the whole sequence.
Of a feature whose level is uniform, `v df/dv` is on average what `f` changes by when it comes, the
others being where they happen to be: a Shapley-like value of `f` itself, jumps included as far as levels of the others
smooth them. In half of the rows a feature is judged so, its levels stratified; in the others it is there or not, as
company of the others. Gradients next to a jump (where the last concept of a token goes, the slot encoder's LayerNorm
makes one) are outliers: the ends of each feature's distribution are cut, at the price of some bias. For the features
that come out first it is also measured what `f` loses without each of them alone, the others all there; a contribution
is the mean of both (of the others, it shrinks as those of the first do together). What the sum then misses of the
change (`quadrature_error`) is spread over the contributions by size.

`paths`, the default, measures: `f` is read as the first features come and go one by one, see `paths.py`, and
contributions add up to the change whatever `f` is. What was read of all other features together is shared out among
them by gradients: `quadrature_error` says how much that is.

`straight`, the classic integrated gradients, dims all concepts alike: `c_i = v_i int df/dv_i(a v) da`. A LayerNorm
hardly sees that until concepts are all but gone, and then everything happens at once: faint concepts (`FAINT` of their
activation) to none is a jump. It is measured, and shared equally among the tokens and a token's concepts: as in an
"or", each of them alone would have kept its token. The rest is smooth, and its quadrature refined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from .explanation import Target
from .paths import Contributions, measure_paths, share_out
from .replay import Replay
from .scalars import Scalars

Method = Literal["levels", "paths", "straight"]

JUDGED = 0.5  # share of the rows in which a feature's level is between 0 and 1, and its gradient counts
FULLNESS = 0.3  # the share of the company that is there goes from a half less this to a half and this
OUTLIERS = 0.08  # share of each feature's values cut to the nearest kept one, at either end
FAINT = 0.02  # of an activation; below, a concept is as good as gone (LayerNorm's epsilon acts at about 0.004)
POINTS = {"levels": 18, "paths": 6, "straight": 18}  # gradients; those of `paths` only order and share out
TESTED = 16  # features that `levels` takes away alone
MAX_REFINEMENTS = 2  # doublings of the number of gradients


@dataclass
class Attribution:
    """Contributions to one mask.

    Args:
        slot (`int`): Whose mask.
        target (`str`): What was explained, see [`MaskScalar`].
        contributions (`torch.Tensor` of shape `(num_active,)`): Of the captured concepts' entries, in their order.
        value, baseline_value (`float`): The scalar with all concepts and with none.
        completeness_error (`float`): |sum of contributions - change| / |change|.
        quadrature_error (`float`): What was not measured of any feature alone, over |change|: of `levels` and
            `straight` what gradients missed and was spread over the contributions, of `paths` the contributions (by
            size) of all but the first features, which were read together.
        measured (`torch.Tensor` of shape `(num_features,)`): bool; whether each feature (ids ascending) was read
            alone. None is by `levels` and `straight`, which estimate.
        num_gradients (`int`): Points at which the gradient was taken.
    """

    slot: int
    target: Target
    contributions: torch.Tensor
    value: float
    baseline_value: float
    completeness_error: float
    quadrature_error: float
    measured: torch.Tensor
    num_gradients: int

    def per_feature(self, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Contributions `(num_features,)` of whole features; `features, index = ids.unique(return_inverse=True)`."""
        return self.contributions.new_zeros(len(features)).index_add(0, index, self.contributions)


@torch.inference_mode(False)
def attribute(
    replay: Replay,
    slots: list[int],
    target: Target = "mask_logit",
    method: Method = "paths",
    *,
    num_points: int | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
) -> list[Attribution]:
    """Contributions of every active (token, feature) entry to the masks of some slots.

    Args:
        replay ([`Replay`]): Of the captured answer.
        slots (`list[int]`): Whose masks.
        target (`str`, defaults to `"mask_logit"`): The mean logit inside the mask, `mask_contrast` or `slot_logit`;
            see [`MaskScalar`].
        method (`str`, defaults to `"paths"`): `levels`, `paths` or `straight`, see above.
        num_points (`int`, *optional*): Gradients taken, `POINTS` of the method when left out; `straight` doubles them
            while they do not do.
        tolerance (`float`, defaults to 0.01): Quadrature error that `straight` refines down to.
        seed (`int`, defaults to 0): Of the levels, which depend on it and on the features active, on nothing else.

    Returns:
        `list[Attribution]`, one per slot; empty for no slots.
    """
    for name, value, known in (("method", method, Method), ("target", target, Target)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}.")
    num_points = POINTS[method] if num_points is None else num_points
    if num_points < 2:
        raise ValueError(f"num_points={num_points} is too few; an average takes at least 2.")
    if not slots:
        return []
    scalars = Scalars(replay, slots, target)
    ones = torch.ones_like(scalars.activations)
    whole, none = scalars.at(torch.stack([ones, ones * 0]))  # (masks,) each
    if not len(ones):
        found, count = whole.new_zeros(len(slots), 0), 0
    elif method == "straight":
        found, count = _straight(scalars, whole, none, num_points, tolerance)
    else:
        found, count = _levels(scalars, num_points, seed), num_points
    results = []
    for mask, slot in enumerate(slots):
        read = _measured(scalars, mask, found[mask], method, (float(none[mask]), float(whole[mask])))
        change = float(whole[mask] - none[mask])
        scale = max(abs(change), 1e-12)
        results.append(
            Attribution(
                slot=slot,
                target=scalars.scalars[mask].target,
                contributions=read.contributions,
                value=float(whole[mask]),
                baseline_value=float(none[mask]),
                completeness_error=abs(change - float(read.contributions.sum())) / scale,
                quadrature_error=read.shared / scale,
                measured=read.measured,
                num_gradients=count,
            )
        )
    return results


def _measured(
    scalars: Scalars, mask: int, estimates: torch.Tensor, method: Method, ends: tuple[float, float]
) -> Contributions:
    """From what gradients estimate of the entries, `(num_active,)`, to contributions that add up to the change."""
    if method == "paths" and len(estimates):
        return measure_paths(scalars, mask, estimates, ends)
    if method == "levels" and len(estimates):
        estimates = _with_losses(scalars, mask, estimates)
    change = ends[1] - ends[0]
    spread = share_out(estimates, torch.zeros_like(estimates, dtype=torch.long), estimates.new_tensor([change]))
    measured = estimates.new_zeros(len(scalars.replay.captured.concepts.features.unique()), dtype=torch.bool)
    return Contributions(spread, measured, abs(change - float(estimates.sum())))


def _levels(scalars: Scalars, num_points: int, seed: int) -> torch.Tensor:
    """Gradients times activations at random levels of the features, averaged robustly: `(masks, num_active)`."""
    features, index = scalars.replay.captured.concepts.features.unique(return_inverse=True)
    random = np.random.default_rng(seed)
    shape, judged = (num_points, len(features)), max(1, round(JUDGED * num_points))
    places = random.random(shape).argsort(axis=0)  # of the rows, shuffled for every feature
    between = places < judged
    share = 0.5 + FULLNESS * np.linspace(-1, 1, num_points)[:, None]  # of the company that is there
    levels = np.where(between, (places + random.random(shape)) / judged, random.random(shape) < share)
    between = torch.from_numpy(between).to(index.device)[:, None].float()  # (points, 1, num_features)
    levels = torch.from_numpy(levels).to(index.device, scalars.activations.dtype)
    gradients = scalars.gradients(levels[:, index], list(range(len(scalars.scalars))))  # (points, masks, num_active)
    by_feature = gradients.new_zeros(*gradients.shape[:2], len(features)).index_add(2, index, gradients)
    counted = by_feature.masked_fill(between == 0, float("nan"))
    low, high = (counted.nanquantile(q, dim=0) for q in (OUTLIERS, 1 - OUTLIERS))
    cut = by_feature.clamp(low, high) - by_feature  # (points, masks, num_features)
    # What is cut of a feature is taken from its entries, in proportion to their sizes.
    sizes = gradients.abs()
    totals = torch.zeros_like(by_feature).index_add(2, index, sizes).clamp(min=1e-30)
    return ((gradients + (cut / totals)[:, :, index] * sizes) * between[:, :, index]).sum(0) / judged


def _with_losses(scalars: Scalars, mask: int, scores: torch.Tensor) -> torch.Tensor:
    """Scores `(num_active,)` of one mask, averaged with what it loses without each of the first features alone."""
    features, index = scalars.replay.captured.concepts.features.unique(return_inverse=True)
    by_score = scores.new_zeros(len(features)).index_add(0, index, scores)
    first = by_score.abs().argsort(descending=True, stable=True)[:TESTED]
    keep = torch.ones(len(first) + 1, len(features), device=index.device)
    keep[torch.arange(len(first)), first] = 0.0
    values = scalars.at_mask(keep[:, index].to(scalars.activations.dtype), mask)
    mean = (by_score[first] + values[-1] - values[:-1]) / 2
    shrunk = by_score * (mean.abs().sum() / by_score[first].abs().sum().clamp(min=1e-30))
    return share_out(scores, index, shrunk.index_copy(0, first, mean))


def _straight(
    scalars: Scalars, whole: torch.Tensor, none: torch.Tensor, num_nodes: int, tolerance: float
) -> tuple[torch.Tensor, int]:
    """Integrated gradients from all concepts to faint ones, and the jump from there to none; values `(masks,)`."""
    faint = scalars.at(torch.full_like(scalars.activations, FAINT)[None])[0]
    concepts = scalars.replay.captured.concepts
    per_token = torch.bincount(concepts.token_index)[concepts.token_index]  # (num_active,)
    shares = 1 / per_token / per_token.reciprocal().sum()
    todo, count = list(range(len(scalars.scalars))), 0
    smooth = scalars.activations.new_zeros(len(scalars.scalars), len(per_token), dtype=torch.float32)
    for _ in range(MAX_REFINEMENTS + 1):
        nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
        levels = FAINT + (1 - FAINT) * torch.from_numpy((nodes + 1) / 2).to(scalars.activations)
        weights = torch.from_numpy(weights / 2).to(smooth) * (1 - FAINT)
        gradients = scalars.gradients(levels[:, None].expand(-1, len(per_token)), todo)
        smooth[todo] = (gradients * weights[:, None, None]).sum(0)
        off = (smooth.sum(1) - (whole - faint)).abs() > tolerance * (whole - none).abs()
        todo, count = off.nonzero()[:, 0].tolist(), count + num_nodes
        if not todo:
            break
        num_nodes *= 2
    return smooth + (faint - none)[:, None] * shares, count
