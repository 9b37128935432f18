# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Slot pull: slots learn where their objects are from the image tokens under the masks, before any mask is drawn.

A mask says little about which of hundreds of tokens a slot should attend to: asked for masks at once, new slots stay
blurred for thousands of steps. Which image token the object lies on is a choice among few, and says it directly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from ...losses_segcompass import SlotAssignments, assign_slots

FREQUENCIES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # waves per image side
PLACE_WIDTH = 64  # in which slots and places are compared
_WAVES = 2 * len(FREQUENCIES)


class SlotPull(nn.Module):
    r"""Scores every image token for every slot, by its concepts and by its place. Dropped after training.

    `s_kt = (A q_k) . LN(e_t) / sqrt(d_slot) + (B q_k) . (F f_t)`: slot `q_k`, concept embedding `e_t` of image token t
    and waves `f_t` of its place. Concepts alone tell two like objects badly apart, places alone learn later.

    Args:
        d_slot (`int`): Width of slots and concept embeddings.
    """

    def __init__(self, d_slot: int):
        super().__init__()
        self.by_concepts = nn.Linear(d_slot, d_slot)
        self.by_place = nn.Linear(d_slot, PLACE_WIDTH)
        self.place = nn.Linear(2 * _WAVES + _WAVES**2, PLACE_WIDTH)

    def forward(
        self, slots: torch.Tensor, embeddings: torch.Tensor, places: torch.Tensor, is_image: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`): Concept slots.
            embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_slot)`): Concept embeddings.
            places (`torch.Tensor` of shape `(batch_size, sequence_length, 2)`): (y, x) of image tokens, in [0, 1].
            is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Image tokens.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_slots, sequence_length)`: logits, very low off the image.
        """
        keys = F.layer_norm(embeddings, embeddings.shape[-1:])
        scores = self.by_concepts(slots) @ keys.mT / keys.shape[-1] ** 0.5
        scores = scores + self.by_place(slots) @ self.place(place_waves(places)).mT
        return scores.masked_fill(~is_image[:, None], -1e4)  # finite: a row may have no image


def place_waves(places: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of (y, x) `(..., 2)` in [0, 1], and their products: `(..., 168)`."""
    angles = 2 * math.pi * places[..., None] * torch.tensor(FREQUENCIES, device=places.device)
    y, x = torch.cat([angles.sin(), angles.cos()], dim=-1).unbind(-2)  # each (..., 12)
    return torch.cat([y, x, (y[..., :, None] * x[..., None, :]).flatten(-2)], dim=-1)


class PullLoss(NamedTuple):
    """Sums over the samples of a batch, and the pairs they come from.

    Args:
        loss (`torch.Tensor` of shape `()`): Sum over samples of the mean over their pairs, in nats.
        right (`torch.Tensor` of shape `()`): Pairs whose best image token the object covers in part or whole.
        num_pairs (`torch.Tensor` of shape `()`): Pairs of slots with objects that cover some image token.
        assignments ([`SlotAssignments`]): All pairs.
    """

    loss: torch.Tensor
    right: torch.Tensor
    num_pairs: torch.Tensor
    assignments: SlotAssignments


def slot_pull_loss(
    scores: torch.Tensor,
    coverage: torch.Tensor,
    num_objects: torch.Tensor,
) -> PullLoss:
    r"""Divergence of what a slot points at from what its object covers.

    With `c_jt` the share of image token t that object j covers, `w_jt = c_jt / sum_t c_jt` and `p_k = softmax(s_k)`:

        L_kj = sum_t w_jt log(w_jt / p_kt)

    which is 0 where slot k points at the tokens of object j in proportion to their coverage. The first n slots share a
    sample's n objects out among themselves at the least total loss: how many slots hold an object is then known from
    the start, and the order in which a data set lists its objects does not matter.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_slots, sequence_length)`): From [`SlotPull`].
        coverage (`torch.Tensor` of shape `(batch_size, num_masks, sequence_length)`): From [`ObjectPatches`].
        num_objects (`torch.LongTensor` of shape `(batch_size,)`): Objects per sample.

    Returns:
        [`PullLoss`]
    """
    coverage = coverage.to(scores)
    weights = coverage / coverage.sum(-1, keepdim=True).clamp(min=1e-6)
    log_odds = F.log_softmax(scores, dim=-1)
    entropy = torch.special.entr(weights).sum(-1)  # (batch_size, num_masks)
    losses = -log_odds @ weights.mT - entropy[:, None]  # (batch_size, num_slots, num_masks)
    later = torch.arange(scores.shape[1], device=scores.device) >= num_objects[:, None]  # (batch_size, num_slots)
    assignments = assign_slots(losses.detach() + 1e5 * later[..., None], num_objects, on_nonfinite="match")
    samples, slots = assignments.pairs
    objects = assignments.object_index
    seen = (coverage[samples, objects] > 0).any(-1)  # an object may be cropped away, or smaller than a pixel
    pairs = torch.tensor(assignments.pairs_per_sample, device=scores.device).clamp(min=1)
    loss = (losses[samples, slots, objects] * seen / pairs[samples]).sum()
    best = scores[samples, slots].argmax(-1, keepdim=True)
    right = coverage[samples, objects].gather(-1, best)[:, 0] > 0
    return PullLoss(loss, (right & seen).sum(), seen.sum(), assignments)


class SlotPullCallback(TrainerCallback):
    """Keeps the gradients of a [`SlotPull`], which is no part of the model, in step with the model's."""

    def __init__(self, pull: SlotPull, accelerator):
        self.pull, self.accelerator = pull, accelerator

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for parameter in self.pull.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.pull.zero_grad()


__all__ = ["PullLoss", "SlotPull", "SlotPullCallback", "place_waves", "slot_pull_loss"]
