# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A reward without noise: which objects an answer chose, and in coarse tiers how well it drew them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...metrics.answers import choice_f1, chosen_objects, is_right_choice

RIGHT_SHARE, F1_SHARE, MASK_SHARE = 0.5, 0.3, 0.2  # of the reward; the choice counts most, since reasoning makes it
MASK_TIERS = 4  # an IoU below 1/4, 1/2, 3/4 or up to 1: within a tier masks are worth the same


def object_reward(
    completions: Sequence[Any] | None = None,
    *,
    pred_masks: Sequence[torch.Tensor] | torch.Tensor,
    object_masks: Sequence[torch.Tensor],
    num_targets: Sequence[int],
    others_known: Sequence[bool],
    slot_logits: Sequence[torch.Tensor] | torch.Tensor,
    valid_area: Sequence[torch.Tensor] | torch.Tensor,
    slot_logit_threshold: Sequence[float],
    mask_logit_threshold: Sequence[float],
    **kwargs: Any,
) -> list[float]:
    """
    Reward answers that choose the objects asked for.

    `0.5 * (chosen objects are the targets) + 0.3 * F1(chosen objects, targets) + 0.2 * tier`, where the tier is 0,
    1/3, 2/3 or 1 for an IoU of the union of the masks with the union of the targets below 1/4, 1/2, 3/4, or above. All
    of it follows from counts of pixels, so that answers that choose alike and draw in the same tier get exactly the
    same reward. What a mask chose says [`chosen_objects`]: with the other objects of the image where a data set knows
    them (`distractor_masks`), else with the targets alone.

    Args:
        completions (`list`, *optional*): Unused; the place where TRL passes the answers.
        pred_masks (`list[torch.Tensor]`): Mask logits of each completion, `(num_slots, height, width)`.
        object_masks (`list[torch.Tensor]`): bool, `(num_objects, height, width)`: targets, then other objects.
        num_targets (`list[int]`): The first so many of them are targets.
        others_known (`list[bool]`): Whether the rest of them are all other objects of the image.
        slot_logits (`list[torch.Tensor]`): Confidences, logits, `(num_slots,)`.
        valid_area (`list[torch.Tensor]`): bool, `(height, width)`: pixels that count.
        slot_logit_threshold, mask_logit_threshold (`list[float]`): The model's own.
        kwargs: Other columns, unused.

    Returns:
        `list[float]`: In [0, 1], one per completion.

    Raises:
        `ValueError`: a completion's masks or logits are NaN.

    Examples:

    >>> import torch
    >>> from segcompass_hf.training.rewards.object_reward import object_reward

    >>> objects = torch.eye(4)[:2, None] > 0  # a target and another object, of a pixel each
    >>> answers = [objects[[0, 0]], objects[[1, 1]], objects]
    >>> columns = {
    ...     "pred_masks": [20.0 * answer - 10 for answer in answers],
    ...     "object_masks": [objects] * 3,
    ...     "num_targets": [1] * 3,
    ...     "others_known": [True] * 3,
    ...     "slot_logits": [torch.tensor([3.0, -3.0]), torch.tensor([3.0, -3.0]), torch.tensor([3.0, 3.0])],
    ...     "valid_area": [torch.ones(1, 4, dtype=torch.bool)] * 3,
    ...     "slot_logit_threshold": [0.0] * 3,
    ...     "mask_logit_threshold": [0.0] * 3,
    ... }
    >>> [round(reward, 4) for reward in object_reward(**columns)]  # right; wrong; one too many, and half of the pixels
    [1.0, 0.0, 0.3333]
    """
    answers = zip(pred_masks, slot_logits, valid_area, slot_logit_threshold, mask_logit_threshold, strict=True)
    rewards = []
    for sample, (answer, *objects) in enumerate(zip(answers, object_masks, num_targets, others_known, strict=True)):
        masks = shown_masks(*answer, sample=sample)
        chosen, iou_tier = _judged(masks, *objects)
        right, f1 = is_right_choice(chosen, objects[1]), choice_f1(chosen, objects[1])
        rewards.append(RIGHT_SHARE * right + F1_SHARE * f1 + MASK_SHARE * iou_tier / (MASK_TIERS - 1))
    return rewards


def shown_masks(
    pred_masks: torch.Tensor,
    slot_logits: torch.Tensor,
    valid_area: torch.Tensor,
    slot_logit_threshold: float,
    mask_logit_threshold: float,
    sample: int = 0,
) -> np.ndarray:
    """The masks of one completion that would be shown, `(num_kept, height, width)` bool; shapes as above.

    Raises:
        `ValueError`: masks or logits are NaN; names the `sample`.
    """
    if bool(pred_masks.isnan().any()) or bool(slot_logits.isnan().any()):
        raise ValueError(
            f"completion {sample} has NaN mask logits or slot logits, so it cannot be scored; check the weights, the "
            "learning rate and the dtype (float16 overflows)."
        )
    kept = slot_logits > slot_logit_threshold
    return ((pred_masks[kept] > mask_logit_threshold) & valid_area.to(pred_masks.device)).cpu().numpy()


def right_answers(columns: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each completion chose the targets and nothing else; `columns` as reward functions get them."""
    names = ("pred_masks", "slot_logits", "valid_area", "slot_logit_threshold", "mask_logit_threshold")
    right = []
    for sample, column in enumerate(columns):
        masks = shown_masks(**{name: column[name] for name in names}, sample=sample)
        chosen = _chosen(masks, column["object_masks"].cpu().numpy(), column["num_targets"], column["others_known"])
        right.append(is_right_choice(chosen, column["num_targets"]))
    return right


def _chosen(masks: np.ndarray, objects: np.ndarray, num_targets: int, others_known: bool) -> frozenset[int]:
    return chosen_objects(masks, objects[:num_targets], objects[num_targets:] if others_known else None)


def _judged(
    masks: np.ndarray, objects: torch.Tensor, num_targets: int, others_known: bool
) -> tuple[frozenset[int], int]:
    """What an answer chose, and the tier of its IoU: 0 to `MASK_TIERS - 1`."""
    objects = objects.cpu().numpy()
    predicted, wanted = masks.any(axis=0), objects[:num_targets].any(axis=0)
    union, overlap = np.count_nonzero(predicted | wanted), np.count_nonzero(predicted & wanted)
    tier = min(int(MASK_TIERS * overlap // union), MASK_TIERS - 1) if union else MASK_TIERS - 1
    return _chosen(masks, objects, num_targets, others_known), tier


__all__ = ["object_reward", "right_answers", "shown_masks"]
