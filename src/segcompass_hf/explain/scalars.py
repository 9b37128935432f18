# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The number that is explained of a mask, and its readings and gradients as concepts change."""

from __future__ import annotations

import torch

from ..reading_segcompass import SegCompassOutput
from .explanation import Target
from .replay import Replay


class MaskScalar:
    """One number per changed mask of a slot, at the model's mask resolution and within the image.

    `mask_logit`: mean logit inside the mask as it was. `mask_contrast`: that minus the mean logit outside, which a
    mask that grows over everything does not raise. `slot_logit`: the slot's confidence, before the sigmoid.

    Args:
        replay ([`Replay`]): Of the captured answer.
        slot (`int`): Whose mask.
        target (`str`): One of the three; an empty mask has no inside, its `slot_logit` is taken (see `target`).
    """

    def __init__(self, replay: Replay, slot: int, target: Target):
        self.slot, self.threshold = slot, replay.model.config.mask_logit_threshold
        original = replay.captured.pred_masks[0, slot]
        self.area = torch.ones_like(original, dtype=torch.bool)  # (4h, 4w)
        if replay.valid_area is not None:
            self.area = replay.valid_area[0, 0]
        self.inside = (original > self.threshold) & self.area  # (4h, 4w)
        self.target = target if bool(self.inside.any()) else "slot_logit"

    def __call__(self, slot_logits: torch.Tensor, mask_logits: torch.Tensor | None) -> torch.Tensor:
        """Values `(rows,)` of slot logits `(rows, K)` and the slot's mask logits `(rows, 4h, 4w)`; differentiable."""
        if self.target == "slot_logit":
            return slot_logits[:, self.slot].float()
        value = _mean(mask_logits, self.inside)
        return value - _mean(mask_logits, self.area & ~self.inside) if self.target == "mask_contrast" else value

    def iou(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """IoU `(rows,)` of masks with logits `(rows, 4h, 4w)` to the mask as it was; two empty masks agree (1)."""
        masks = (mask_logits > self.threshold) & self.area
        union = (masks | self.inside).sum((1, 2))
        return torch.where(union > 0, (masks & self.inside).sum((1, 2)) / union.clamp(min=1), 1.0)


class Scalars:
    """The scalar of every mask explained, as a function of levels of the activations.

    Args:
        replay ([`Replay`]): Of the captured answer.
        slots (`list[int]`): Whose masks.
        target (`str`): See [`MaskScalar`].
    """

    def __init__(self, replay: Replay, slots: list[int], target: Target):
        self.replay = replay
        self.activations = replay.captured.concepts.values
        self.scalars = [MaskScalar(replay, slot, target) for slot in slots]

    def _scalar(self, mask: int, maps: SegCompassOutput) -> torch.Tensor:
        """The scalar of one mask, `(rows,)`."""
        scalar, logits = self.scalars[mask], None
        if scalar.target != "slot_logit":
            logits = self.replay.decode(maps.heatmap_logits[:, scalar.slot : scalar.slot + 1])[:, 0]
        return scalar(maps.slot_logits, logits)

    @torch.no_grad()
    def at(self, levels: torch.Tensor) -> torch.Tensor:
        """Values `(rows, masks)` at levels `(rows, num_active)` of the activations."""
        parts = []
        for chunk in levels.split(self.replay.chunk_size):
            maps = self.replay.maps(self.replay.embed(chunk * self.activations))
            parts.append(torch.stack([self._scalar(mask, maps) for mask in range(len(self.scalars))], dim=1))
        return torch.cat(parts)

    @torch.no_grad()
    def at_mask(self, levels: torch.Tensor, mask: int) -> torch.Tensor:
        """Values `(rows,)` of one mask at levels `(rows, num_active)`."""
        parts = []
        for chunk in levels.split(self.replay.chunk_size):
            parts.append(self._scalar(mask, self.replay.maps(self.replay.embed(chunk * self.activations))))
        return torch.cat(parts)

    @torch.enable_grad()
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


def _mean(logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean over a bool area `(4h, 4w)`, `(rows,)`; 0 over an empty one."""
    return (logits.float() * where).sum((1, 2)) / where.sum().clamp(min=1)
