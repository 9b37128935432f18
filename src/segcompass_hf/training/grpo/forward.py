# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward of joint training: log-probabilities, the reference's, and segmentation losses from one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from ...generation_segcompass import HiddenStateCapture
from ...losses_segcompass import segmentation_loss
from .reference import FusedHead, LayerTrace

LOSS_TERMS = ("segmentation_loss", "confidence_loss", "heatmap_bce", "heatmap_dice", "mask_dice", "mask_focal")


@dataclass
class JointOutput(FusedCausalLMOutput):
    """What TRL reads of a pass with a fused head, and what comes beside it.

    Args:
        segmentation (`torch.Tensor` of shape `()`): Weighted sum of L_seg and L_conf.
        ref_log_probs (`torch.Tensor` of shape `(batch_size, num_completion_tokens)`, *optional*): Of the reference.
        terms (`dict[str, torch.Tensor]`): Unweighted losses, detached.
    """

    segmentation: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] | None = None


def add_joint_forward(
    model: nn.Module, temperature: float, cast_to_fp32: bool, reference: Callable | None = None
) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)` return a [`JointOutput`]; other calls stay as they were.

    With `segmentation=` (targets, see `SegCompassGRPOTrainer._compute_loss`) it holds the segmentation losses and the
    reference's log-probabilities; without, the policy's log-probabilities alone.

    Call it after TRL's `add_fused_lm_head`. The outputs are returned, not kept on the module: DistributedDataParallel
    finds the parameters in use by walking from what is returned.

    Args:
        model (`SegCompassForReasoningSegmentation`): Patched in place.
        temperature, cast_to_fp32: Of the log-probabilities, see [`FusedHead`].
        reference (`Callable`, *optional*): [`ReferencePolicy`] or [`AdapterFreeReference`].
    """
    other_forward = model.forward
    head = FusedHead(model, model.get_output_embeddings, temperature, cast_to_fp32, ("log_probs", "entropy"))

    # Keeps the signature: `generate` and PEFT look at it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head: bool = False, segmentation: dict | None = None, **kwargs):
        if not fused_lm_head:
            return other_forward(*args, **kwargs)
        return _joint_forward(self, head, reference, segmentation, **kwargs)

    model.forward = MethodType(forward, model)


def _joint_forward(
    model: nn.Module,
    head: FusedHead,
    reference: Callable | None,
    segmentation: dict[str, Any] | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **vlm_inputs,
) -> JointOutput:
    # Only the completion is scored: its labels, and the token before them.
    if segmentation is None:
        reference = None
        labels = labels[:, max(int((labels != -100).any(0).long().argmax()) - 1, 0) :]
    else:
        labels = labels[:, -segmentation["completion_mask"].shape[1] - 1 :]
    vlm_inputs = model._with_positions({"attention_mask": attention_mask, **vlm_inputs})
    layer = model.config.sae_layer
    trace = LayerTrace(model.base_model, layer) if reference is not None else nullcontext()
    # Nothing below the SAE's layer trains; cut off, gradient checkpointing and PEFT's input gradients cost nothing.
    with HiddenStateCapture(model.base_model, layer, lambda states, _: states.detach()) as capture, trace:
        model.base_model(input_ids=input_ids, use_cache=False, **vlm_inputs)
    layer_states, last_states = capture.states()
    scored = head(last_states[:, -labels.shape[1] :], labels)
    output = JointOutput(loss=scored.loss, log_probs=scored.log_probs, entropy=scored.entropy)
    if segmentation is None:
        return output
    if reference is not None:
        output.ref_log_probs = reference(trace, labels)
    losses = _segmentation(model, layer_states, last_states, input_ids, attention_mask, segmentation, vlm_inputs)
    output.segmentation = losses.loss
    output.terms = {name: getattr(losses, name).detach() for name in LOSS_TERMS}
    return output


def _segmentation(
    model: nn.Module,
    layer_states: torch.Tensor,
    last_states: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    targets: dict[str, Any],
    vlm_inputs: dict[str, Any],
) -> Any:
    """Segmentation losses of states `(batch_size, tokens, hidden)`; only matched slots are decoded to masks."""
    completion = targets["completion_mask"]
    prompt = torch.zeros_like(attention_mask[:, : -completion.shape[1]])
    completion_mask = torch.cat([prompt, completion.to(prompt.dtype)], dim=1)
    concept_inputs = layer_states, attention_mask, model.modality_ids(input_ids)
    if model.config.concept_input == "duplicated":
        concept_inputs = model._duplicated_states(input_ids, completion_mask, [], vlm_inputs)
    slots = model.encode_slots(model.encode_concepts(*concept_inputs), concept_inputs[1]).slots
    references = model.find_reference_states(last_states, input_ids, attention_mask, completion_mask)
    embeddings = targets["image_embeddings"]
    mapped = model.slot_mapper(references, slots, embeddings)
    area = model.mask_stage.valid_area(targets["reshaped_input_sizes"])
    decode = partial(model.mask_stage.decode, embeddings, mapped.heatmap_logits, area)
    return segmentation_loss(
        mapped.heatmap_logits,
        lambda assignments: decode(pairs=assignments.pairs),
        mapped.slot_logits,
        targets["mask_labels"],
        targets["num_objects"],
        area,
        match_valid_area_only=model.config.valid_area_only,
        empty_samples=model.config.empty_samples,
        num_items=targets.get("num_segmentation_items"),
        num_samples=targets.get("num_samples"),
        sample_weights=targets.get("segmentation_weights"),
        **targets["loss_weights"],
    )


class JointCall:
    """Stands in for the model where TRL computes log-probabilities: adds the targets, keeps what comes back.

    Args:
        model (`Callable`): The (wrapped) model.
        inputs (`dict`): TRL's inputs of the micro-batch; the reference's log-probabilities are put there.
        segmentation (`dict`): See [`add_joint_forward`].
    """

    def __init__(self, model: Callable, inputs: dict[str, Any], segmentation: dict[str, Any]):
        self.model, self.inputs, self.segmentation = model, inputs, segmentation
        self.output: JointOutput | None = None

    def __call__(self, **kwargs) -> JointOutput:
        if self.output is not None:
            raise RuntimeError("the micro-batch was split; its segmentation targets belong to all of it.")
        self.output = self.model(**kwargs, segmentation=self.segmentation)
        if self.output.ref_log_probs is not None:
            self.inputs["ref_per_token_logps"] = self.output.ref_log_probs
        return self.output
