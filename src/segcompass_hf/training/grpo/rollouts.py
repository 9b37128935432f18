# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks of sampled completions, for rewards, metrics and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...data.sequence_states import StateSource, states_for_masks
from ...image_features_segcompass import join_rows
from ...modeling_masks import valid_area
from ...reading_segcompass import SequenceStates
from ...segmenters_segcompass import geometry_of
from ..rewards.rewards import is_well_formed
from .chosen_groups import ChosenGroups
from .targets import SegmentationTargets

MASK_FIELDS = ("heatmap_logits", "slot_logits", "pred_masks")


class RolloutMasks:
    """States of a batch of sampled completions, and the masks read from them.

    Args:
        targets ([`SegmentationTargets`]): Of the same rows.

    Attributes:
        copies (`int`): Completions that every prompt has, one after another; they are sampled behind one pass of it.
        states ([`SequenceStates`], *optional*): What was captured while the completions were sampled.
        beginnings (`list[list[int]]`, *optional*): Token ids that the completions begin with, see [`begun_answers`].
        chosen ([`ChosenGroups`], *optional*): Completions that are there already, with their rewards.
        rewards (`torch.Tensor` of shape `(num_completions, num_reward_functions)`, *optional*): Of all processes.
    """

    def __init__(self, targets: SegmentationTargets, chosen: ChosenGroups | None = None):
        self.targets, self.chosen, self.copies = targets, chosen, 1
        self.states: SequenceStates | None = None
        self.beginnings: list[list[int]] | None = None
        self.rewards: torch.Tensor | None = None

    @torch.no_grad()
    def segment(self, model: Any, batch_size: int) -> dict[str, torch.Tensor]:
        """Heatmaps, slot logits and masks of all completions, `batch_size` at a time.

        Not for `concept_input="duplicated"`, whose second pass needs the images: [`masks_of_rollouts`].
        """
        parts = []
        for start in range(0, len(self.states.input_ids), batch_size):
            rows = slice(start, start + batch_size)
            images = join_rows(self.targets.image_embeddings[rows])
            output = model.read_finite_masks(self.states[rows], images, self.targets.reshaped_input_sizes[rows])
            parts.append({name: output[name] for name in MASK_FIELDS})
        return {name: torch.cat([part[name] for part in parts]) for name in MASK_FIELDS}

    def columns(self, outputs: dict[str, torch.Tensor], config: Any) -> list[dict[str, Any]]:
        """What reward functions get, one dict per completion."""
        targets, canvas = self.targets, geometry_of(config.sam_config).canvas
        areas = valid_area(targets.reshaped_input_sizes, outputs["pred_masks"].shape[-1], canvas)[:, 0]
        counts = targets.num_objects.tolist()
        return [
            {
                **{name: outputs[name][row] for name in MASK_FIELDS},
                "mask_labels": targets.mask_labels[row],
                "num_objects": counts[row],
                "valid_area": areas[row],
                "slot_logit_threshold": float(config.slot_logit_threshold),
                "mask_logit_threshold": float(config.mask_logit_threshold),
                "num_slots": config.num_slots,
            }
            for row in range(len(counts))
        ]


@torch.no_grad()
def masks_of_rollouts(
    model: Callable,
    processor: Any,
    prompts: Sequence[list[dict]],
    completion_ids: Sequence[list[int]],
    targets: SegmentationTargets,
    batch_size: int,
    state_source: StateSource | None = None,
) -> dict[str, torch.Tensor]:
    """As [`RolloutMasks.segment`], by a forward over the completions, or from the states of another source.

    For completions that were sampled elsewhere (vLLM, sharded models), and for `concept_input="duplicated"`.

    Args:
        model (`Callable`): The model as training calls it, wrapped or not.
        processor ([`SegCompassProcessor`]): Makes the prompts' inputs.
        prompts (`Sequence[list[dict]]`): Conversations with their images.
        completion_ids (`Sequence[list[int]]`): Token ids of the completions.
        targets ([`SegmentationTargets`]): Of the same rows.
        batch_size (`int`): Rows at a time.
        state_source ([`StateSource`], *optional*): Gives the states in place of a forward of the VLM; `model` is then
            not wrapped. It has to run the weights that the model has now.

    Returns:
        `dict[str, torch.Tensor]`
    """
    device, pad = targets.num_objects.device, processor.tokenizer.pad_token_id
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        images = [_images(prompt) for prompt in prompts[rows]]
        text = [processor.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts[rows]]
        inputs = processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt").to(device)
        length = max(map(len, completion_ids[rows]))
        ids = [torch.tensor([*one, *[pad] * (length - len(one))]) for one in completion_ids[rows]]
        mask = [torch.tensor([*[1] * len(one), *[0] * (length - len(one))]) for one in completion_ids[rows]]
        ids, mask = torch.stack(ids).to(device), torch.stack(mask).to(device)
        prompt_mask = inputs["attention_mask"]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([prompt_mask, mask], dim=1)
        completion_mask = torch.cat([torch.zeros_like(prompt_mask), mask], dim=1)
        embeddings, sizes = join_rows(targets.image_embeddings[rows]), targets.reshaped_input_sizes[rows]
        grids = None if targets.image_token_grids is None else targets.image_token_grids[rows]
        if state_source is None:
            output = model(
                **inputs,
                completion_mask=completion_mask,
                image_embeddings=embeddings,
                reshaped_input_sizes=sizes,
                image_token_grids=grids,
            )
        else:
            states = states_for_masks(state_source, model, inputs, images, completion_mask, grids)
            output = model.read_finite_masks(states, embeddings, sizes)
        parts.append({name: output[name] for name in MASK_FIELDS})
    return {name: torch.cat([part[name] for part in parts]) for name in MASK_FIELDS}


def _images(prompt: list[dict]) -> list:
    return [part["image"] for message in prompt for part in message["content"] if part["type"] == "image"]


def rollout_metrics(
    columns: Sequence[dict[str, Any]], completions: Sequence[Any], targets: SegmentationTargets
) -> dict[str, tuple[float, int]]:
    """`name -> (sum, count)` of what is worth a curve: gIoU on the low-resolution maps, kept slots, format.

    gIoU is that of the union of the kept slots' masks with the union of the objects; an empty prediction for no object
    counts 1.
    """
    ious, kept_slots = [], 0
    for column in columns:
        kept = column["slot_logits"] > column["slot_logit_threshold"]
        kept_slots += int(kept.sum())
        predicted = (column["pred_masks"][kept] > column["mask_logit_threshold"]).any(0)
        predicted &= column["valid_area"]
        wanted = (column["mask_labels"][: column["num_objects"]] > 0.5).any(0) & column["valid_area"]
        union = int((predicted | wanted).sum())
        ious.append(int((predicted & wanted).sum()) / union if union else 1.0)
    formed = sum(is_well_formed(text, column["num_slots"]) for text, column in zip(completions, columns, strict=True))
    return {
        "segmentation/giou": (sum(ious), len(ious)),
        "segmentation/kept_slots": (float(kept_slots), len(ious)),
        "segmentation/dropped_objects": (float(sum(targets.num_dropped)), len(ious)),
        "format_share": (float(formed), len(columns)),
    }
