# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches of the training-step benchmark, in the original's layout and in ours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from train_step_formulations import StepInputs, loss_weights
from train_step_models import (
    PAD,
    Preset,
    drawing,
    in_one_width,
    mask_targets,
    token_kinds,
    token_rows,
    vlm_pictures,
)

from segcompass_hf.original_inputs_segcompass import duplicate_completion
from segcompass_hf.reading_segcompass import MaskTargets
from segcompass_hf.training.grpo.forward import JointTargets
from segcompass_hf.training.grpo.passes import Prompts


def make_inputs(
    model: nn.Module, preset: Preset, workload: Literal["a", "b", "c"], layout: Literal["original", "ours"]
) -> StepInputs:
    """A micro-batch, the same tokens in both layouts.

    Workload `a`: rows of equal length, no padding. Workload `b`: rows of differing length; the original's layout pads
    prompts and completions to fixed widths and its second pass reads the completion twice, the second time with its
    padding as tokens; ours pads to the longest row and reads everything once. Workload `c`: one prompt with its
    picture and objects, and a group of completions.
    """
    rows = token_rows(preset, workload)
    widths = [max(len(row[part]) for row in rows) for part in (0, 1)]
    if workload == "b" and layout == "original":
        widths = [preset.padded_prompt, preset.padded_completion]
    ids, mask = in_one_width(rows, widths, model.device)
    draw = drawing(model, len(rows), pictures=1 if workload == "c" else None)
    pictures = vlm_pictures(preset, draw)
    second = {"input_ids": ids, "attention_mask": mask}
    if workload == "b" and layout == "original":
        names = ("input_ids", "attention_mask", "position_ids")
        second = dict(zip(names, duplicate_completion(ids, mask, ids[:, widths[0] :], PAD), strict=True))
    objects = torch.full((len(rows),), 2) if workload == "c" else torch.tensor([1, 2] * len(rows))[: len(rows)]
    targets = mask_targets(preset, model, draw)
    labels, weights = targets["mask_labels"], loss_weights(model)
    masks = MaskTargets(labels, objects.to(ids.device), loss_weights=weights, decode="matched")
    prompts = None
    if workload == "c":
        first = {"input_ids": ids[:1, : widths[0]], "attention_mask": mask[:1, : widths[0]]}
        first |= token_kinds(preset, first["input_ids"])
        first |= {name: value[: len(value) // len(rows)] for name, value in pictures.items()}
        prompts = Prompts(torch.zeros(len(rows), dtype=torch.long, device=ids.device), first)
    embeddings, sizes = targets["image_embeddings"], targets["reshaped_input_sizes"]
    return StepInputs(
        vlm=model.vlm_inputs(ids, attention_mask=mask, **pictures, **token_kinds(preset, ids)),
        second=model.vlm_inputs(**second, **pictures, **token_kinds(preset, second["input_ids"])),
        completion_mask=mask[:, widths[0] :],
        advantages=torch.tensor([1.0, -0.5, 0.5, -1.0] * len(rows))[: len(rows)].to(ids.device),
        targets=JointTargets(mask[:, widths[0] :], embeddings, sizes, masks, prompts=prompts),
    )
