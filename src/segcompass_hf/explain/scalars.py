# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The number that is explained of a mask."""

from __future__ import annotations

import torch

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


def _mean(logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean over a bool area `(4h, 4w)`, `(rows,)`; 0 over an empty one."""
    return (logits.float() * where).sum((1, 2)) / where.sum().clamp(min=1)
