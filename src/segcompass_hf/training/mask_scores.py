# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores of a batch of predicted masks: soft IoU on matched pairs, or the mixed score of a single object."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from segcompass_hf.losses_segcompass import DICE_EPSILON, pairwise_soft_iou


@torch.no_grad()
def matched_iou_rewards(
    probabilities: torch.Tensor,
    mask_labels: torch.Tensor,
    num_objects: torch.Tensor,
    kept: torch.Tensor,
    valid_area: torch.Tensor | None = None,
) -> list[float]:
    """
    Sum of the soft IoUs of matched pairs over `max(kept slots, objects)`; 1 without either.

    Args:
        probabilities (`torch.Tensor` of shape `(batch_size, num_slots, height, width)`): Masks, in [0, 1].
        mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, height, width)`): Targets, in [0, 1].
        num_objects (`torch.Tensor` of shape `(batch_size,)`): Of a sample's masks, the first so many are objects.
        kept (`torch.Tensor` of shape `(batch_size, num_slots)`): 1 for slots that count, else 0; NaN is an error.
        valid_area (`torch.BoolTensor` of shape `(batch_size, 1, height, width)`, *optional*): Pixels that count.

    Returns:
        `list[float]`: In [0, 1].
    """
    from scipy.optimize import linear_sum_assignment

    iou = pairwise_soft_iou(probabilities, mask_labels, valid_area)  # (batch_size, num_slots, num_masks)
    # one copy to the host for all that the matching needs
    table = torch.cat([iou, kept[..., None], num_objects.to(iou)[:, None, None].expand(-1, iou.shape[1], 1)], dim=-1)
    table = table.cpu().numpy()
    rewards = []
    for sample, rows in enumerate(table):
        iou, is_kept, count = rows[:, :-2], rows[:, -2], _object_count(rows[0, -1], rows.shape[1] - 2, sample)
        check_numbers(sample, iou[:, :count], is_kept)
        iou = iou[is_kept > 0, :count]  # (kept slots, objects)
        total = iou[linear_sum_assignment(iou, maximize=True)].sum()
        rewards.append(float(total) / max(iou.shape) if max(iou.shape) else 1.0)
    return rewards


@torch.no_grad()
def single_object_rewards(
    probabilities: torch.Tensor,
    mask_labels: torch.Tensor,
    num_objects: torch.Tensor,
    kept: torch.Tensor,
    valid_area: torch.Tensor | None = None,
) -> list[float]:
    """
    `0.5 * soft IoU + 0.2 * soft Dice + 0.3 * hard IoU` of one slot and one object; arguments as in
    [`matched_iou_rewards`] with one slot.
    """
    if mask_labels.shape[1] == 0:
        mask_labels = torch.zeros_like(probabilities)
    score, is_empty = single_object_score(probabilities[:, 0], mask_labels[:, 0], valid_area)
    table = torch.stack([score, is_empty.to(score), kept[:, 0], num_objects.to(score)], dim=-1).cpu().numpy()
    rewards = []
    for sample, (score, is_empty, is_kept, count) in enumerate(table):
        check_numbers(sample, score, is_kept)
        has_object = _object_count(count, 1, sample) == 1
        rewards.append(float(score if has_object else is_empty or not is_kept))
    return rewards


def single_object_score(
    probabilities: torch.Tensor, labels: torch.Tensor, valid_area: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Score of each mask with its target, and whether the mask is empty (no pixel of probability 0.5 or more).

    Args:
        probabilities, labels (`torch.Tensor` of shape `(batch_size, height, width)`): In [0, 1].
        valid_area (`torch.BoolTensor` of shape `(batch_size, 1, height, width)`, *optional*): Pixels that count.

    Returns:
        Two `torch.Tensor` of shape `(batch_size,)`: float32 in [0, 1], and bool.
    """
    predictions, targets = probabilities.float(), labels.float()
    if valid_area is not None:
        predictions, targets = predictions * valid_area[:, 0], targets * valid_area[:, 0]
    soft_overlap, soft_sum = (predictions * targets).sum((1, 2)), (predictions + targets).sum((1, 2))
    is_predicted, is_target = predictions >= 0.5, targets >= 0.5
    hard_overlap, hard_union = (is_predicted & is_target).sum((1, 2)), (is_predicted | is_target).sum((1, 2))
    soft_iou = soft_overlap / (soft_sum - soft_overlap).clamp(min=DICE_EPSILON)
    soft_dice = 2 * soft_overlap / soft_sum.clamp(min=DICE_EPSILON)
    score = 0.5 * soft_iou + 0.2 * soft_dice + 0.3 * hard_overlap / hard_union.clamp(min=1)
    return score, ~is_predicted.flatten(1).any(1)


def stack_samples(
    pred_masks: Sequence[torch.Tensor] | torch.Tensor,
    mask_labels: Sequence[torch.Tensor] | torch.Tensor,
    num_objects: Sequence[int] | torch.Tensor,
    valid_area: Sequence[torch.Tensor] | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    The columns of `mask_reward`, lists or tensors, as batches on the device of the masks.

    Returns:
        Masks `(batch_size, num_slots, height, width)`, labels `(batch_size, num_masks, height, width)`, object counts
        `(batch_size,)`, valid area `(batch_size, 1, height, width)` or `None`.
    """
    masks = stack_values(pred_masks, "pred_masks")
    labels = mask_labels
    if not isinstance(labels, torch.Tensor):
        labels = [torch.as_tensor(label) for label in labels]
        most = max((len(label) for label in labels), default=0)  # rows may hold their own number of masks
        labels = [torch.nn.functional.pad(label, (0, 0, 0, 0, 0, most - len(label))) for label in labels]
    labels = stack_values(labels, "mask_labels").to(masks.device)
    counts = stack_values(num_objects, "num_objects").to(masks.device)
    batch_size = masks.shape[0]
    for name, tensor, expected in (
        ("pred_masks", masks, (batch_size, "num_slots", "height", "width")),
        ("mask_labels", labels, (batch_size, "num_masks", *masks.shape[2:])),
        ("num_objects", counts, (batch_size,)),
    ):
        _check_shape(name, tensor, expected)
    if valid_area is None:
        return masks, labels, counts, None
    area = stack_values(valid_area, "valid_area").to(masks.device)
    area = area[:, None] if area.ndim == 3 else area
    _check_shape("valid_area", area, (batch_size, 1, *masks.shape[2:]))
    return masks, labels, counts, area


def stack_values(values: Any, name: str) -> torch.Tensor:
    """A tensor as it is; a list of equal shapes or of whole numbers stacked."""
    if isinstance(values, torch.Tensor):
        return values
    if all(isinstance(value, (int, np.integer)) for value in values):
        return torch.tensor([int(value) for value in values], dtype=torch.long)
    tensors = [torch.as_tensor(value) for value in values]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        raise ValueError(f"{name} has entries of shapes {shapes}; completions of one batch must agree.")
    return torch.stack(tensors)


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple) -> None:
    fits = tensor.ndim == len(expected) and all(
        isinstance(size, str) or size == found for size, found in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({wanted}): one entry per completion, maps of one size."
        )


def _object_count(count: float, num_masks: int, sample: int) -> int:
    if not 0 <= count <= num_masks:
        raise ValueError(
            f"completion {sample} has num_objects={count:g}, but at most {num_masks} can be scored; pass one mask per "
            "object, or merge or drop objects in the processor."
        )
    return int(count)


def check_numbers(sample: int, *values: np.ndarray) -> None:
    """Raise where a completion's values are NaN: TRL would take a NaN reward for "not applicable" and go on."""
    if any(np.isnan(value).any() for value in values):
        raise ValueError(
            f"completion {sample} has NaN mask logits, slot logits or mask labels, so it cannot be scored; check the "
            "weights, the learning rate and the dtype (float16 overflows)."
        )
