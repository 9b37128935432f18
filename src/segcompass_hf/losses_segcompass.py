# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Matching of slots to objects, and the segmentation and confidence losses (L_seg and L_conf of the paper)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

DICE_EPSILON = 1e-6
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


@dataclass
class SlotAssignments:
    """
    Which slot answers for which object, for a whole batch: three index tensors of one length, sorted by sample.

    Iterating (or indexing) yields per sample `(slot_index, object_index)`, slots in ascending order.

    Args:
        sample_index (`torch.LongTensor` of shape `(num_pairs,)`): Sample of every matched pair.
        slot_index (`torch.LongTensor` of shape `(num_pairs,)`): Its slot.
        object_index (`torch.LongTensor` of shape `(num_pairs,)`): Its object, an index into `mask_labels`.
        pairs_per_sample (`list[int]`): Matched pairs of each sample, `min(num_slots, num_objects)`.
    """

    sample_index: torch.Tensor
    slot_index: torch.Tensor
    object_index: torch.Tensor
    pairs_per_sample: list[int]

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample and slot indices, as `MaskStage.decode(pairs=...)` takes them."""
        return self.sample_index, self.slot_index

    def __len__(self) -> int:
        return len(self.pairs_per_sample)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        return list(self)[sample]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        slots, objects = (index.split(self.pairs_per_sample) for index in (self.slot_index, self.object_index))
        return iter(zip(slots, objects, strict=True))


@dataclass
class SegmentationLossOutput(ModelOutput):
    """
    Segmentation losses of a batch. Everything but `loss`, `segmentation_loss` and `confidence_loss` is detached.

    Args:
        loss (`torch.Tensor` of shape `()`):
            `seg_loss_weight * segmentation_loss + conf_loss_weight * confidence_loss`.
        segmentation_loss (`torch.Tensor` of shape `()`): L_seg.
        confidence_loss (`torch.Tensor` of shape `()`): L_conf; 0 without slot logits.
        heatmap_bce, heatmap_dice, mask_dice, mask_focal (`torch.Tensor` of shape `()`): Unweighted terms of L_seg.
        assignments (`SlotAssignments`): The matched pairs.
    """

    loss: torch.Tensor | None = None
    segmentation_loss: torch.Tensor | None = None
    confidence_loss: torch.Tensor | None = None
    heatmap_bce: torch.Tensor | None = None
    heatmap_dice: torch.Tensor | None = None
    mask_dice: torch.Tensor | None = None
    mask_focal: torch.Tensor | None = None
    assignments: SlotAssignments | None = None


def pairwise_soft_iou(
    probabilities: torch.Tensor, mask_labels: torch.Tensor, valid_area: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Soft IoU of every prediction with every object: `sum(p g) / (sum(p) + sum(g) - sum(p g))`.

    Args:
        probabilities (`torch.Tensor` of shape `(batch_size, num_slots, height, width)`): In [0, 1].
        mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, height, width)`): In [0, 1].
        valid_area (`torch.BoolTensor` of shape `(batch_size, 1, height, width)`, *optional*): Pixels that count.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_slots, num_masks)`, float32, in [0, 1].
    """
    predictions, targets = probabilities.float(), mask_labels.float()
    if valid_area is not None:
        predictions = predictions * valid_area
        targets = targets * valid_area
    predictions, targets = predictions.flatten(2), targets.flatten(2)
    with torch.autocast(predictions.device.type, enabled=False):  # sums over 65,536 pixels need more than bf16
        intersection = predictions @ targets.transpose(1, 2)  # (batch_size, num_slots, num_masks)
    union = predictions.sum(-1)[:, :, None] + targets.sum(-1)[:, None] - intersection
    return intersection / union.clamp(min=DICE_EPSILON)


@torch.no_grad()
def match_slots(
    heatmap_logits: torch.Tensor,
    mask_labels: torch.Tensor,
    num_objects: torch.Tensor,
    slot_logits: torch.Tensor | None = None,
    confidence_weight: float = 0.3,
    valid_area: torch.Tensor | None = None,
    on_nonfinite: Literal["error", "match"] = "error",
) -> SlotAssignments:
    """
    Assign slots to objects, one to one, at the least total cost (Hungarian algorithm).

    Cost of slot k for object j: `1 - soft_iou(sigmoid(heatmap_k), object_j) - confidence_weight * sigmoid(c_k)`.

    Args:
        heatmap_logits (`torch.Tensor` of shape `(batch_size, num_slots, height, width)`): Heatmaps, logits.
        mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, height, width)`):
            Soft targets in [0, 1]; of sample b the first `num_objects[b]` are objects, the rest filling.
        num_objects (`torch.LongTensor` of shape `(batch_size,)`): Objects per sample.
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)`, *optional*): Confidences, logits.
        confidence_weight (`float`, *optional*, defaults to 0.3):
            How much a confident slot is preferred; 0 reproduces the original.
        valid_area (`torch.BoolTensor` of shape `(batch_size, 1, height, width)`, *optional*):
            Pixels that count; the whole padded canvas when missing, as in the original.
        on_nonfinite (`"error"` or `"match"`):
            NaN or infinite costs are refused, or matched somehow, for a loss that is to be NaN too.

    Returns:
        [`SlotAssignments`], on the device of the heatmaps.
    """
    _check_targets(heatmap_logits, mask_labels, num_objects)
    cost = 1 - pairwise_soft_iou(heatmap_logits.float().sigmoid(), mask_labels, valid_area)
    if slot_logits is not None and confidence_weight:
        cost = cost - confidence_weight * slot_logits.float().sigmoid()[..., None]
    return assign_slots(cost, num_objects, on_nonfinite)


@torch.no_grad()
def assign_slots(
    cost: torch.Tensor, num_objects: torch.Tensor, on_nonfinite: Literal["error", "match"] = "error"
) -> SlotAssignments:
    """
    Assign slots to objects, one to one, at the least total cost (Hungarian algorithm).

    Args:
        cost (`torch.Tensor` of shape `(batch_size, num_slots, num_masks)`): Of every slot for every object.
        num_objects (`torch.LongTensor` of shape `(batch_size,)`): Objects per sample; costs beyond them do not count.
        on_nonfinite (`"error"` or `"match"`): See [`match_slots`].

    Returns:
        [`SlotAssignments`], on the device of the costs.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Matching slots to objects needs scipy; install it with `pip install scipy`.") from error

    device = cost.device
    if on_nonfinite == "match":
        cost = cost.nan_to_num()
    cost = torch.cat([cost, num_objects.to(cost)[:, None, None].expand(-1, cost.shape[1], 1)], dim=-1)
    cost = cost.cpu()  # one copy for costs and counts together
    counts, cost = cost[:, 0, -1].long().tolist(), cost[..., :-1].numpy()
    samples, slots, objects = [], [], []
    for sample, count in enumerate(counts):
        if count > cost.shape[2]:
            raise ValueError(
                f"sample {sample} has num_objects={count}, but mask_labels holds {cost.shape[2]} masks per sample; "
                "pass one mask per object, or merge or drop objects in the processor."
            )
        try:
            rows, columns = linear_sum_assignment(cost[sample, :, :count])
        except ValueError as error:
            raise ValueError(
                f"sample {sample} has NaN or infinite heatmap logits, slot logits or mask labels, so its slots cannot "
                "be matched; check the weights and the learning rate."
            ) from error
        samples += [sample] * len(rows)
        slots += rows.tolist()
        objects += columns.tolist()
    index = torch.tensor([samples, slots, objects], dtype=torch.long).to(device)
    return SlotAssignments(*index, pairs_per_sample=[min(count, cost.shape[1]) for count in counts])


def segmentation_loss(
    heatmap_logits: torch.Tensor,
    pred_masks: torch.Tensor | Callable[[SlotAssignments], torch.Tensor],
    slot_logits: torch.Tensor | None,
    mask_labels: torch.Tensor,
    num_objects: torch.Tensor | None = None,
    valid_area: torch.Tensor | None = None,
    *,
    assignments: SlotAssignments | None = None,
    seg_loss_weight: float = 1.0,
    conf_loss_weight: float = 0.2,
    heatmap_bce_weight: float = 1.0,
    heatmap_dice_weight: float = 0.6,
    mask_dice_weight: float = 0.6,
    mask_focal_weight: float = 0.0,
    match_confidence_weight: float = 0.3,
    match_valid_area_only: bool = True,
    empty_samples: Literal["exclude", "zero"] = "exclude",
    pixel_reduction: Literal["map", "batch"] = "map",
    num_items: int | torch.Tensor | None = None,
    num_samples: int | torch.Tensor | None = None,
    sample_weights: torch.Tensor | None = None,
) -> SegmentationLossOutput:
    """
    `L_seg = w_b BCE(heatmap) + w_hd Dice(heatmap) + w_d Dice(mask) + w_f focal(mask)` on matched pairs, and
    `L_conf = mean over slots of BCE(c_k, matched?)`.

    Each term is a mean over the valid pixels of a map, then over the pairs of a sample, then over samples.

    Args:
        heatmap_logits (`torch.Tensor` of shape `(batch_size, num_slots, height, width)`): Heatmaps, logits.
        pred_masks (`torch.Tensor` or `Callable`):
            Mask logits of all slots `(batch_size, num_slots, height, width)`, or of the pairs of `assignments` alone
            `(num_pairs, height, width)`, or a function from the assignments to the latter, which lets training decode
            matched slots only: `lambda a: stage.decode(image_embeddings, heatmap_logits, area, pairs=a.pairs)`.
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)` or `None`):
            Confidences, logits; without them L_conf is 0 (the original's single-slot path).
        mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, height, width)`):
            Soft targets in [0, 1]; of sample b the first `num_objects[b]` are objects.
        num_objects (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Objects per sample; 1 each when missing.
        valid_area (`torch.BoolTensor` of shape `(batch_size, 1, height, width)`, *optional*):
            Pixels that count in L_seg; all when missing.
        assignments (`SlotAssignments`, *optional*): Matching done before, else it is done here.
        seg_loss_weight, conf_loss_weight (`float`): lambda_s and lambda_c, which enter `loss` only.
        heatmap_bce_weight, heatmap_dice_weight, mask_dice_weight, mask_focal_weight (`float`): Weights within L_seg.
        match_confidence_weight (`float`): See [`match_slots`].
        match_valid_area_only (`bool`): Whether matching, too, looks at `valid_area` only.
        empty_samples (`"exclude"` or `"zero"`):
            Samples without objects are left out of the mean of L_seg, or count in it as zeros (the original).
        pixel_reduction (`"map"` or `"batch"`):
            `"batch"` takes BCE and focal over the pixels of all matched maps at once (the original's single-slot
            path), so that large images weigh more.
        num_items (`int` or `torch.Tensor`, *optional*):
            Samples that the mean of L_seg is taken over, when the batch is a part of a larger one (accumulation,
            processes): the non-empty ones, or all with `empty_samples="zero"`.
        num_samples (`int` or `torch.Tensor`, *optional*): All samples of that larger batch, for L_conf.
        sample_weights (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Weight of every sample in the means of L_seg and L_conf, 0 or more; `num_items` and `num_samples` are then
            sums of weights. All 1 when missing.

    Returns:
        [`SegmentationLossOutput`]
    """
    batch_size = heatmap_logits.shape[0]
    if pixel_reduction == "batch" and num_items is not None:
        raise ValueError(
            'num_items counts samples, but pixel_reduction="batch" averages over pixels; leave one of the two out.'
        )
    if num_objects is None:
        num_objects = torch.ones(batch_size, dtype=torch.long, device=heatmap_logits.device)
    if assignments is None:
        area = valid_area if match_valid_area_only else None
        # Of NaN logits the loss is NaN, which a trainer can skip on all its processes; an error would end the run.
        assignments = match_slots(
            heatmap_logits, mask_labels, num_objects, slot_logits, match_confidence_weight, area, on_nonfinite="match"
        )
    else:
        _check_targets(heatmap_logits, mask_labels, num_objects)
    samples, slots = assignments.pairs
    if callable(pred_masks):
        pred_masks = pred_masks(assignments)
    matched_masks = pred_masks[samples, slots] if pred_masks.ndim == 4 else pred_masks
    if matched_masks.shape[0] != len(samples):
        raise ValueError(
            f"pred_masks has {matched_masks.shape[0]} maps, but {len(samples)} slots are matched to objects; pass the "
            "masks of all slots, (batch_size, num_slots, height, width), or those of `assignments` in its order."
        )
    heatmaps = heatmap_logits[samples, slots].float()  # (num_pairs, height, width)
    masks = matched_masks.float()
    targets = mask_labels[samples, assignments.object_index].float()
    area = torch.ones_like(targets) if valid_area is None else valid_area[samples, 0].float()

    pairs_per_sample = torch.tensor(assignments.pairs_per_sample, device=heatmaps.device)
    if sample_weights is None:
        sample_weights = torch.ones(batch_size, device=heatmaps.device)
    elif sample_weights.shape != (batch_size,):
        raise ValueError(f"sample_weights has shape {tuple(sample_weights.shape)}, expected ({batch_size},).")
    if num_items is None:
        num_items = _total(sample_weights * (pairs_per_sample > 0) if empty_samples == "exclude" else sample_weights)
    # mean over a sample's pairs, then over samples
    pair_weights = sample_weights[samples] / (pairs_per_sample[samples] * num_items)
    pixels = area.sum((1, 2)).clamp(min=1)
    if pixel_reduction == "map":
        map_weights = pair_weights / pixels
    else:
        map_weights = sample_weights[samples] / (sample_weights[samples] * pixels).sum().clamp(min=1)

    heatmap_bce = _bce_sums(heatmaps, targets, area)
    mask_focal = _focal_sums(masks, targets, area)
    terms = {
        "heatmap_bce": (map_weights * heatmap_bce).sum(),
        "heatmap_dice": (pair_weights * _dice(heatmaps, targets, area)).sum(),
        "mask_dice": (pair_weights * _dice(masks, targets, area)).sum(),
        "mask_focal": (map_weights * mask_focal).sum(),
    }
    seg_loss = (
        heatmap_bce_weight * terms["heatmap_bce"]
        + heatmap_dice_weight * terms["heatmap_dice"]
        + mask_dice_weight * terms["mask_dice"]
        + mask_focal_weight * terms["mask_focal"]
    )
    if num_samples is None:
        num_samples = _total(sample_weights)
    conf_loss = torch.zeros_like(seg_loss)
    if slot_logits is not None:
        conf_loss = confidence_loss(slot_logits, assignments, sample_weights / num_samples)
    return SegmentationLossOutput(
        loss=seg_loss_weight * seg_loss + conf_loss_weight * conf_loss,
        segmentation_loss=seg_loss,
        confidence_loss=conf_loss,
        assignments=assignments,
        **{name: value.detach() for name, value in terms.items()},
    )


def _total(weights: torch.Tensor) -> torch.Tensor:
    """Sum of the weights to divide by; 1 where there are none."""
    total = weights.sum()
    return total + (total == 0)


def confidence_loss(
    slot_logits: torch.Tensor, assignments: SlotAssignments, sample_weights: torch.Tensor
) -> torch.Tensor:
    """L_conf: binary cross-entropy of "slot k is matched", mean over slots, sum over samples with their weights.

    Args:
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)`): Confidences, logits.
        assignments (`SlotAssignments`): The matched pairs.
        sample_weights (`torch.Tensor` of shape `(batch_size,)`): 1 over the number of samples, for their mean.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    matched = torch.zeros_like(slot_logits, dtype=torch.float32)
    matched[assignments.pairs] = 1.0
    per_slot = F.binary_cross_entropy_with_logits(slot_logits.float(), matched, reduction="none")
    return (per_slot.mean(1) * sample_weights).sum()


def _bce_sums(logits: torch.Tensor, targets: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy summed over the valid pixels of each map, `(num_pairs,)`."""
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * area).sum((1, 2))


def _focal_sums(logits: torch.Tensor, targets: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Focal loss (alpha 0.25, gamma 2) summed over the valid pixels of each map, `(num_pairs,)`."""
    probabilities = logits.sigmoid()
    correct = probabilities * targets + (1 - probabilities) * (1 - targets)
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (alpha * (1 - correct) ** FOCAL_GAMMA * entropy * area).sum((1, 2))


def _dice(logits: torch.Tensor, targets: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """`1 - 2 sum(p g) / (sum(p) + sum(g))` over the valid pixels of each map, `(num_pairs,)`."""
    probabilities, targets = logits.sigmoid() * area, targets * area
    overlap = 2 * (probabilities * targets).sum((1, 2)) + DICE_EPSILON
    return 1 - overlap / (probabilities.sum((1, 2)) + targets.sum((1, 2)) + DICE_EPSILON)


def _check_targets(heatmap_logits: torch.Tensor, mask_labels: torch.Tensor, num_objects: torch.Tensor) -> None:
    batch_size, _, *map_size = heatmap_logits.shape
    if mask_labels.ndim != 4 or mask_labels.shape[0] != batch_size or list(mask_labels.shape[2:]) != map_size:
        raise ValueError(
            f"mask_labels has shape {tuple(mask_labels.shape)}, expected ({batch_size}, num_masks, {map_size[0]}, "
            f"{map_size[1]}) to go with the heatmaps; let the processor of this model make them."
        )
    if num_objects.shape != (batch_size,):
        raise ValueError(
            f"num_objects has shape {tuple(num_objects.shape)}, expected ({batch_size},): pass one count per sample."
        )
