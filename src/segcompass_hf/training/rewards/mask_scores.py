# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores of predicted masks: soft IoU on matched pairs, or the mixed score of a single object.

Columns of a whole rollout -> small batches on the device of the masks -> one table of scores -> one copy to the host,
where only the assignments of a few slots to a few objects are left to do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...losses_segcompass import DICE_EPSILON, pairwise_soft_iou

# Map values in a batch: on a CPU what its caches hold (temporaries of a whole rollout took 4 times longer),
# on an accelerator what keeps it busy without filling its memory.
CPU_BATCH_VALUES, DEVICE_BATCH_VALUES = 2**19, 2**26


@dataclass
class MaskBatch:
    """
    Some completions, all on one device.

    Args:
        pred_masks (`torch.Tensor` of shape `(batch_size, num_slots, height, width)`): As given: logits, or else.
        mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, height, width)`): Targets in [0, 1].
        num_objects (`torch.Tensor` of shape `(batch_size,)`): Of a sample's masks, the first so many are objects.
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)`, *optional*): Confidences, float32.
        valid_area (`torch.BoolTensor` of shape `(batch_size, 1, height, width)`, *optional*): Pixels that count.
        thresholds (`torch.Tensor` of shape `(batch_size, 1)`): Of the slot logits.
    """

    pred_masks: torch.Tensor
    mask_labels: torch.Tensor
    num_objects: torch.Tensor
    slot_logits: torch.Tensor | None
    valid_area: torch.Tensor | None
    thresholds: torch.Tensor


def mask_batches(
    pred_masks: Sequence[torch.Tensor] | torch.Tensor,
    mask_labels: Sequence[torch.Tensor] | torch.Tensor,
    num_objects: Sequence[int] | torch.Tensor,
    slot_logits: Sequence[torch.Tensor] | torch.Tensor | None,
    valid_area: Sequence[torch.Tensor] | torch.Tensor | None,
    slot_logit_threshold: float | Sequence[float] = 0.0,
) -> Iterator[MaskBatch]:
    """The columns of `mask_reward`, lists or tensors, some completions at a time."""
    if np.ndim(slot_logit_threshold) == 0:
        slot_logit_threshold = [float(slot_logit_threshold)] * len(pred_masks)
    columns = {
        "pred_masks": pred_masks,
        "mask_labels": mask_labels,
        "num_objects": num_objects,
        "slot_logits": slot_logits,
        "valid_area": valid_area,
        "slot_logit_threshold": slot_logit_threshold,
    }
    for name, column in columns.items():
        if column is not None and len(column) != len(pred_masks):
            raise ValueError(f"{name} has {len(column)} entries for {len(pred_masks)} completions; pass one for each.")
    if len(pred_masks) == 0:
        return
    first = torch.as_tensor(pred_masks[0])
    if first.ndim != 3:
        raise _shape_error("pred_masks", tuple(first.shape), ("num_slots", "height", "width"))
    values = CPU_BATCH_VALUES if first.device.type == "cpu" else DEVICE_BATCH_VALUES
    size = max(1, values // max(1, first.numel()))
    num_masks = max(len(labels) for labels in mask_labels)  # rows may hold their own number of masks
    for start in range(0, len(pred_masks), size):
        rows = {name: None if column is None else column[start : start + size] for name, column in columns.items()}
        yield _mask_batch(rows, first, num_masks)


def _mask_batch(rows: dict[str, Any], first: torch.Tensor, num_masks: int) -> MaskBatch:
    device, num_slots, map_size = first.device, first.shape[0], tuple(first.shape[1:])
    labels, slot_logits, area = rows["mask_labels"], rows["slot_logits"], rows["valid_area"]
    if not isinstance(labels, torch.Tensor):
        labels = [_with_filling(torch.as_tensor(label), num_masks) for label in labels]
    if slot_logits is not None:
        slot_logits = _stack("slot_logits", slot_logits, (num_slots,)).to(device).float()
    if area is not None:
        area = [one[None] if one.ndim == 2 else one for one in map(torch.as_tensor, area)]
        area = _stack("valid_area", area, (1, *map_size)).to(device)
    return MaskBatch(
        pred_masks=_stack("pred_masks", rows["pred_masks"], tuple(first.shape)),
        mask_labels=_stack("mask_labels", labels, (num_masks, *map_size)).to(device),
        num_objects=_stack("num_objects", rows["num_objects"], ()).to(device),
        slot_logits=slot_logits,
        valid_area=area,
        thresholds=torch.as_tensor(rows["slot_logit_threshold"], dtype=torch.float32, device=device)[:, None],
    )


def _with_filling(labels: torch.Tensor, num_masks: int) -> torch.Tensor:
    missing = num_masks - len(labels)
    return torch.cat([labels, labels.new_zeros(missing, *labels.shape[1:])]) if missing else labels


def _stack(name: str, values: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Entries of `shape`, one per completion, as one tensor; a tensor as it is."""
    tensors = values if isinstance(values, torch.Tensor) else [torch.as_tensor(value) for value in values]
    for tensor in tensors:
        if tuple(tensor.shape) != shape:
            raise _shape_error(name, tuple(tensor.shape), shape)
    return tensors if isinstance(tensors, torch.Tensor) else torch.stack(tensors)


def _shape_error(name: str, found: tuple, expected: tuple) -> ValueError:
    wanted = ", ".join(str(size) for size in expected)
    return ValueError(f"{name} has an entry of shape {found}, expected ({wanted}) per completion, all of one size.")


@torch.no_grad()
def matched_iou_table(
    probabilities: torch.Tensor,
    mask_labels: torch.Tensor,
    num_objects: torch.Tensor,
    kept: torch.Tensor,
    valid_area: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What [`matched_iou_rewards`] needs: per slot its soft IoU with each mask, whether it is kept, the object count.

    Args:
        probabilities (`torch.Tensor` of shape `(batch_size, num_slots, height, width)`): Masks, in [0, 1].
        mask_labels, num_objects, valid_area: As in [`MaskBatch`].
        kept (`torch.Tensor` of shape `(batch_size, num_slots)`): 1 for slots that count, else 0; NaN is an error.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_slots, num_masks + 2)`.
    """
    iou = pairwise_soft_iou(probabilities, mask_labels, valid_area)
    return torch.cat([iou, kept[..., None], num_objects.to(iou)[:, None, None].expand(-1, iou.shape[1], 1)], dim=-1)


def matched_iou_rewards(table: np.ndarray) -> list[float]:
    """Sum of the soft IoUs of matched pairs over `max(kept slots, objects)`, 1 without either, for each completion.

    Raises:
        `ValueError`: NaN, or more objects than masks.
    """
    from scipy.optimize import linear_sum_assignment

    rewards = []
    for sample, rows in enumerate(table):
        iou, is_kept, count = rows[:, :-2], rows[:, -2], _object_count(rows[0, -1], rows.shape[1] - 2, sample)
        check_numbers(sample, iou[:, :count], is_kept)
        iou = iou[is_kept > 0, :count]  # (kept slots, objects)
        total = iou[linear_sum_assignment(iou, maximize=True)].sum()
        rewards.append(float(total) / max(iou.shape) if max(iou.shape) else 1.0)
    return rewards


@torch.no_grad()
def single_object_table(
    probabilities: torch.Tensor,
    mask_labels: torch.Tensor,
    num_objects: torch.Tensor,
    kept: torch.Tensor,
    valid_area: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What [`single_object_rewards`] needs: `0.5 * soft IoU + 0.2 * soft Dice + 0.3 * hard IoU` of the one slot with the
    one mask, whether no pixel reaches a probability of 0.5, whether the slot is kept, the object count.

    Arguments as in [`matched_iou_table`], with one slot.

    Returns:
        `torch.Tensor` of shape `(batch_size, 4)`.
    """
    predictions = probabilities[:, 0].float()
    targets = mask_labels[:, 0].float() if mask_labels.shape[1] else torch.zeros_like(predictions)
    if valid_area is not None:
        predictions, targets = predictions * valid_area[:, 0], targets * valid_area[:, 0]
    soft_overlap, soft_sum = (predictions * targets).sum((1, 2)), (predictions + targets).sum((1, 2))
    is_predicted, is_target = predictions >= 0.5, targets >= 0.5
    hard_overlap, hard_union = (is_predicted & is_target).sum((1, 2)), (is_predicted | is_target).sum((1, 2))
    soft_iou = soft_overlap / (soft_sum - soft_overlap).clamp(min=DICE_EPSILON)
    soft_dice = 2 * soft_overlap / soft_sum.clamp(min=DICE_EPSILON)
    score = 0.5 * soft_iou + 0.2 * soft_dice + 0.3 * hard_overlap / hard_union.clamp(min=1)
    is_empty = ~is_predicted.flatten(1).any(1)
    return torch.stack([score, is_empty.to(score), kept[:, 0].to(score), num_objects.to(score)], dim=-1)


def single_object_rewards(table: np.ndarray) -> list[float]:
    """The score where there is an object; else 1 for an empty mask or a slot that is not kept, and 0 for any other.

    Raises:
        `ValueError`: NaN, or more than one object.
    """
    rewards = []
    for sample, (score, is_empty, is_kept, count) in enumerate(table):
        check_numbers(sample, score, is_kept)
        has_object = _object_count(count, 1, sample) == 1
        rewards.append(float(score if has_object else is_empty or not is_kept))
    return rewards


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
