# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Attribution: how much every active (token, feature) entry contributes to a mask; gradients integrated along paths.

`f` is a scalar of one mask as a function of the activations `v`. Along any path from `v` to nothing the contributions
`c_i = int df/dv_i dv_i` add up to `f(v) - f(0)`: completeness. Which path is a matter of what concepts mean. The
straight line dims all concepts alike, which the slot encoder's LayerNorm hardly sees until they are all but gone; then
everything happens at once. Here features leave one group after another, in random order, so that contributions are
taken among all sizes of company; a second path in the reverse order balances the first.

A LayerNorm makes the moment when a token loses its last concept a jump, however faint that concept has become. The
jump is measured, and shared equally by the concepts that left the token then: as in an "or", each of them alone would
have kept it. Everywhere else `f` is smooth, and Gauss-Legendre quadrature is refined until it is exact to `tolerance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from ..modeling_concepts import SparseConcepts
from ..modeling_heatmaps import SlotMapperOutput
from .explanation import Target
from .replay import Replay

Method = Literal["paths", "straight"]

FAINT = 0.02  # share of its activation below which a concept is as good as gone; LayerNorm's epsilon acts at 0.004
MAX_REFINEMENTS = 3  # doublings of the nodes of a piece


@dataclass
class Attribution:
    """Contributions to one mask.

    Args:
        slot (`int`): Whose mask.
        target (`str`): `mask_logit` or `slot_logit`.
        contributions (`torch.Tensor` of shape `(num_active,)`): Of the captured concepts' entries, in their order.
        value, baseline_value (`float`): The scalar with all concepts and with none.
        completeness_error (`float`): |sum of contributions - change| / |change|.
        num_gradients (`int`): Points at which the gradient was taken.
    """

    slot: int
    target: Target
    contributions: torch.Tensor
    value: float
    baseline_value: float
    completeness_error: float
    num_gradients: int

    def per_feature(self, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Contributions `(num_features,)` of whole features; `features, index = ids.unique(return_inverse=True)`."""
        return self.contributions.new_zeros(len(features)).index_add(0, index, self.contributions)


@dataclass
class _Piece:
    """A straight piece of a path, between two levels `(num_active,)` in [0, 1]; a jump where it has `shares`."""

    start: torch.Tensor
    end: torch.Tensor
    shares: torch.Tensor | None = None
    contributions: torch.Tensor | None = None  # (masks, num_active)
    num_gradients: int = 0


class _Scalars:
    """The scalar of every mask explained, as a function of levels."""

    def __init__(self, replay: Replay, slots: list[int], target: Target):
        self.replay, self.slots = replay, slots
        captured = replay.captured
        self.activations = captured.concepts.values
        inside = captured.pred_masks[0, slots] > replay.model.config.mask_logit_threshold  # (masks, 4h, 4w)
        if replay.valid_area is not None:
            inside = inside & replay.valid_area[0]
        self.inside, self.sizes = inside, inside.sum((1, 2))
        # An empty mask has no inside: its slot's confidence is explained.
        self.targets = [target if size else "slot_logit" for size in self.sizes.tolist()]

    def _scalar(self, mask: int, maps: SlotMapperOutput) -> torch.Tensor:
        """The scalar of one mask, `(rows,)`."""
        slot = self.slots[mask]
        if self.targets[mask] == "slot_logit":
            return maps.slot_logits[:, slot].float()
        logits = self.replay.decode(maps.heatmap_logits[:, slot : slot + 1])[:, 0].float()
        return (logits * self.inside[mask]).sum((1, 2)) / self.sizes[mask]

    @torch.no_grad()
    def at(self, levels: torch.Tensor) -> torch.Tensor:
        """Values `(rows, masks)` at levels `(rows, num_active)` of the activations."""
        parts = []
        for chunk in levels.split(self.replay.chunk_size):
            maps = self.replay.maps(self.replay.embed(chunk * self.activations))
            parts.append(torch.stack([self._scalar(mask, maps) for mask in range(len(self.slots))], dim=1))
        return torch.cat(parts)

    def gradients(self, levels: torch.Tensor, masks: list[int]) -> torch.Tensor:
        """`v_i df/dv_i` of some masks at every row of levels: `(rows, len(masks), num_active)`."""
        token_index, parts = self.replay.captured.concepts.token_index, []
        for chunk in levels.split(self.replay.chunk_size):
            embeddings = self.replay.embed(chunk * self.activations).requires_grad_()
            maps = self.replay.maps(embeddings)
            per_mask = []
            for mask in masks:
                scalar = self._scalar(mask, maps).sum()
                (gradient,) = torch.autograd.grad(scalar, embeddings, retain_graph=mask != masks[-1])
                # The codebook is linear: df/dv_i is the gradient at its token, along its code.
                per_mask.append((gradient[:, token_index] * self.replay.codes).sum(-1) * self.activations)
            parts.append(torch.stack(per_mask, dim=1).float())
        return torch.cat(parts)


def attribute(
    replay: Replay,
    slots: list[int],
    target: Target = "mask_logit",
    method: Method = "paths",
    *,
    num_groups: int = 4,
    num_nodes: int = 2,
    tolerance: float = 0.01,
    seed: int = 0,
) -> list[Attribution]:
    """Contributions of every active (token, feature) entry to the masks of some slots.

    Args:
        replay ([`Replay`]): Of the captured answer.
        slots (`list[int]`): Whose masks.
        target (`str`, defaults to `"mask_logit"`): The mean logit inside the mask at the model's mask resolution, or
            the slot's confidence (`slot_logit`; also where a mask is empty).
        method (`str`, defaults to `"paths"`): `paths`: features leave in `num_groups` random groups, once in this
            order and once in the reverse. `straight`: all fade together, the classic choice; cheaper, less faithful.
        num_groups (`int`, defaults to 4): Groups of features per path.
        num_nodes (`int`, defaults to 2): Quadrature nodes per piece of a path, to begin with.
        tolerance (`float`, defaults to 0.01): Completeness error above which pieces are refined.
        seed (`int`, defaults to 0): Of the groups. A feature's group depends on it and on the features active.

    Returns:
        `list[Attribution]`, one per slot; empty for no slots.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}.")
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {', '.join(get_args(Target))}, got {target!r}.")
    if not slots:
        return []
    scalars = _Scalars(replay, slots, target)
    concepts = replay.captured.concepts
    paths = [_straight(concepts)] if method == "straight" else _random_paths(concepts, num_groups, seed)
    pieces = [piece for path in paths for piece in path]
    if pieces:
        _integrate(scalars, pieces, num_nodes, tolerance)
    ends = scalars.at(torch.stack([torch.ones_like(concepts.values), torch.zeros_like(concepts.values)]))
    results = []
    for mask, slot in enumerate(slots):
        total = sum(piece.contributions[mask] for piece in pieces) / len(paths) if pieces else concepts.values * 0
        value, baseline = ends[:, mask].tolist()
        change, found = value - baseline, float(total.sum())
        error = abs(found - change) / abs(change) if change else abs(found)
        count = sum(piece.num_gradients for piece in pieces)
        results.append(Attribution(slot, scalars.targets[mask], total, value, baseline, error, count))
    return results


def _straight(concepts: SparseConcepts) -> list[_Piece]:
    """All concepts fade together; the last bit is a jump."""
    full, gone = torch.ones_like(concepts.values), torch.zeros_like(concepts.values)
    groups = torch.zeros_like(concepts.token_index)
    return _pieces(concepts, groups, [full, gone]) if len(full) else []


def _random_paths(concepts: SparseConcepts, num_groups: int, seed: int) -> list[list[_Piece]]:
    """Two paths from all concepts to none: features leave by groups, and by the same groups in reverse."""
    features, index = concepts.features.unique(return_inverse=True)
    if not len(features):
        return [[]]
    num_groups = min(num_groups, len(features))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features))).to(index.device)
    group = (order * num_groups // len(features))[index]  # (num_active,), in [0, num_groups)
    paths = []
    for groups in (group, num_groups - 1 - group):
        knots = [(groups >= knot).to(concepts.values.dtype) for knot in range(num_groups + 1)]
        paths.append(_pieces(concepts, groups, knots))
    return paths


def _pieces(concepts: SparseConcepts, groups: torch.Tensor, knots: list[torch.Tensor]) -> list[_Piece]:
    """Straight pieces between knots; group g leaves in piece g, with a jump where it leaves tokens empty."""
    token_index, length = concepts.token_index, concepts.sequence_length
    last = groups.new_full((length,), -1).scatter_reduce(0, token_index, groups, "amax")  # group that empties a token
    pieces = []
    for number, (start, end) in enumerate(zip(knots, knots[1:], strict=False)):
        empties = (groups == number) & (last[token_index] == number)  # (num_active,)
        if not bool(empties.any()):
            pieces.append(_Piece(start, end))
            continue
        faint = end + FAINT * (start - end)
        weights = empties / torch.bincount(token_index[empties], minlength=length)[token_index].clamp(min=1)
        pieces += [_Piece(start, faint), _Piece(faint, end, shares=weights / weights.sum())]
    return pieces


def _integrate(scalars: _Scalars, pieces: list[_Piece], num_nodes: int, tolerance: float) -> None:
    """Fill in every piece's contributions, refining the pieces that are off while the whole is off."""
    ends = scalars.at(torch.stack([level for piece in pieces for level in (piece.start, piece.end)]))
    changes = ends[0::2] - ends[1::2]  # (pieces, masks)
    whole = (changes.sum(0)).abs().clamp(min=1e-6)  # (masks,), of all paths together
    for piece, change in zip(pieces, changes, strict=True):
        if piece.shares is not None:
            piece.contributions = change[:, None] * piece.shares
    smooth = [piece for piece in pieces if piece.shares is None]
    todo = [(piece, list(range(len(scalars.slots)))) for piece in smooth]
    for refinement in range(MAX_REFINEMENTS + 1):
        _quadrature(scalars, todo, num_nodes * 2**refinement)
        found = torch.stack([piece.contributions.sum(1) for piece in pieces])  # (pieces, masks)
        off = found - changes
        wrong = off.sum(0).abs() > tolerance * whole  # (masks,)
        # A piece's fair part of the tolerated error; the worst piece is refined in any case.
        bound = torch.minimum(tolerance * whole / len(smooth), off.abs().max(0).values)
        redo = wrong & (off.abs() >= bound)  # (pieces, masks)
        todo = [(piece, row.nonzero()[:, 0].tolist()) for piece, row in zip(pieces, redo, strict=True) if row.any()]
        if not todo:
            return


def _quadrature(scalars: _Scalars, todo: list[tuple[_Piece, list[int]]], num_nodes: int) -> None:
    """Gauss-Legendre along straight pieces: `int df/dv_i dv_i = (start_i - end_i) v_i mean df/dv_i`."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    nodes = torch.from_numpy((nodes + 1) / 2).to(scalars.activations)
    weights = torch.from_numpy(weights / 2).to(scalars.activations)
    by_masks: dict[tuple[int, ...], list[_Piece]] = {}
    for piece, masks in todo:
        by_masks.setdefault(tuple(masks), []).append(piece)
    for masks, pieces in by_masks.items():
        levels = torch.cat([p.start + nodes[:, None] * (p.end - p.start) for p in pieces])
        gradients = scalars.gradients(levels, list(masks)).view(len(pieces), num_nodes, len(masks), -1)
        for piece, gradient in zip(pieces, gradients, strict=True):
            if piece.contributions is None:
                piece.contributions = gradient.new_zeros(len(scalars.slots), gradient.shape[-1])
            mean = (gradient * weights[:, None, None]).sum(0)
            piece.contributions[list(masks)] = mean * (piece.start - piece.end)
            piece.num_gradients += num_nodes
