# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward of joint training: log-probabilities, the reference's, and segmentation losses from one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from ...image_features_segcompass import ImageFeatures
from ...reading_segcompass import MaskTargets, SequenceStates
from ...text_stack_segcompass import HiddenStateCapture
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


@dataclass
class JointTargets:
    """What a micro-batch of joint training is compared with, and the image that its masks are of.

    Args:
        completion_mask (`torch.Tensor` of shape `(batch_size, completion_length)`): 1 on tokens of the completions,
            which stand at the end of the sequences.
        image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)` or [`ImageFeatures`]): Of the images.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`): (height, width) on SAM's canvas.
        masks ([`MaskTargets`]): Of the segmentation losses.
        image_token_grids (`torch.LongTensor` of shape `(batch_size, 6)`, *optional*): See [`SequenceStates`].
    """

    completion_mask: torch.Tensor
    image_embeddings: torch.Tensor | ImageFeatures
    reshaped_input_sizes: torch.Tensor
    masks: MaskTargets
    image_token_grids: torch.Tensor | None = None


def add_joint_forward(
    model: nn.Module, temperature: float, cast_to_fp32: bool, reference: Callable | None = None
) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)` return a [`JointOutput`]; other calls stay as they were.

    With `segmentation=` ([`JointTargets`]) it holds the segmentation losses and the
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
    def forward(self, *args, fused_lm_head: bool = False, segmentation: JointTargets | None = None, **kwargs):
        if not fused_lm_head:
            return other_forward(*args, **kwargs)
        return _joint_forward(self, head, reference, segmentation, **kwargs)

    model.forward = MethodType(forward, model)


def _joint_forward(
    model: nn.Module,
    head: FusedHead,
    reference: Callable | None,
    segmentation: JointTargets | None,
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
        labels = labels[:, -segmentation.completion_mask.shape[1] - 1 :]
    inputs = model.vlm_inputs(input_ids, attention_mask=attention_mask, **vlm_inputs)
    layer = model.config.sae_layer
    trace = LayerTrace(model.vlm, layer) if reference is not None else nullcontext()
    # Nothing below the SAE's layer trains; cut off, gradient checkpointing and PEFT's input gradients cost nothing.
    with HiddenStateCapture(model.vlm, layer, lambda states, _: states.detach()) as capture, trace:
        model.base_model(**inputs)
    layer_states, last_states = capture.states()
    scored = head(last_states[:, -labels.shape[1] :], labels)
    output = JointOutput(loss=scored.loss, log_probs=scored.log_probs, entropy=scored.entropy)
    if segmentation is None:
        return output
    if reference is not None:
        output.ref_log_probs = reference(trace, labels)
    completion_mask = torch.zeros_like(attention_mask)
    completion_mask[:, -segmentation.completion_mask.shape[1] :] = segmentation.completion_mask
    grids = segmentation.image_token_grids
    ids_and_masks = input_ids, attention_mask, completion_mask
    states = SequenceStates(layer_states, last_states, *ids_and_masks, image_token_grids=grids)
    states = model.with_concept_states(states, **vlm_inputs)
    image = segmentation.image_embeddings, segmentation.reshaped_input_sizes
    losses = model.read_masks(states, *image, segmentation.masks).losses
    output.segmentation = losses.loss
    output.terms = {name: getattr(losses, name).detach() for name in LOSS_TERMS}
    return output


class JointCall:
    """Stands in for the model where TRL computes log-probabilities: adds the targets, keeps what comes back.

    Args:
        model (`Callable`): The (wrapped) model.
        inputs (`dict`): TRL's inputs of the micro-batch; the reference's log-probabilities are put there.
        segmentation ([`JointTargets`]): Of the micro-batch.
    """

    def __init__(self, model: Callable, inputs: dict[str, Any], segmentation: JointTargets):
        self.model, self.inputs, self.segmentation = model, inputs, segmentation
        self.output: JointOutput | None = None

    def __call__(self, **kwargs) -> JointOutput:
        if self.output is not None:
            raise RuntimeError("the micro-batch was split; its segmentation targets belong to all of it.")
        self.output = self.model(**kwargs, segmentation=self.segmentation)
        if self.output.ref_log_probs is not None:
            self.inputs["ref_per_token_logps"] = self.output.ref_log_probs
        return self.output
