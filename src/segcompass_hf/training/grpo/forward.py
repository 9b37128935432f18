# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward of joint training: log-probabilities, the reference's, and segmentation losses from one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from ...image_features_segcompass import ImageFeatures
from ...reading_segcompass import MaskTargets, SequenceStates
from .passes import PolicyPass, Prompts, SharedPass, whole_pass
from .reference import FusedHead
from .sharing import PromptSharing

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
        prompts ([`Prompts`], *optional*): The different prompts, where some completions have the same one.
    """

    completion_mask: torch.Tensor
    image_embeddings: torch.Tensor | ImageFeatures
    reshaped_input_sizes: torch.Tensor
    masks: MaskTargets
    image_token_grids: torch.Tensor | None = None
    prompts: Prompts | None = None


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
    sharing = PromptSharing()

    # Keeps the signature: `generate` and PEFT look at it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head: bool = False, segmentation: JointTargets | None = None, **kwargs):
        if not fused_lm_head:
            return other_forward(*args, **kwargs)
        return _joint_forward(self, head, reference, sharing, segmentation, **kwargs)

    model.forward = MethodType(forward, model)


def _joint_forward(
    model: nn.Module,
    head: FusedHead,
    reference: Callable | None,
    sharing: PromptSharing,
    segmentation: JointTargets | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **vlm_inputs,
) -> JointOutput:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **vlm_inputs}
    if segmentation is None:
        # Only the completion is scored: its labels, and the token before them.
        labels = labels[:, max(int((labels != -100).any(0).long().argmax()) - 1, 0) :]
        scored = head(whole_pass(model, inputs).last(labels.shape[1]), labels)
        return JointOutput(loss=scored.loss, log_probs=scored.log_probs, entropy=scored.entropy)
    labels = labels[:, -segmentation.completion_mask.shape[1] - 1 :]
    policy = sharing(model, inputs, segmentation.prompts, traced=reference is not None)
    last_states = policy.last(labels.shape[1])
    scored = head(last_states, labels)
    output = JointOutput(loss=scored.loss, log_probs=scored.log_probs, entropy=scored.entropy)
    if reference is not None:
        output.ref_log_probs = reference(policy.trace, labels)
    states = _sequence_states(model, policy, segmentation, last_states, input_ids, attention_mask)
    states = model.with_concept_states(states, **vlm_inputs)
    image = segmentation.image_embeddings, segmentation.reshaped_input_sizes
    losses = model.read_masks(states, *image, segmentation.masks).losses
    output.segmentation = losses.loss
    output.terms = {name: getattr(losses, name).detach() for name in LOSS_TERMS}
    return output


def _sequence_states(
    model: nn.Module,
    policy: PolicyPass | SharedPass,
    segmentation: JointTargets,
    last_states: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> SequenceStates:
    """What masks are read from: all tokens for the concepts, and last states where `<REF_POS>` may stand."""
    config = model.config
    if config.reference_search == "sequence" or config.concept_input == "duplicated":
        last_states = policy.last(input_ids.shape[1])
    num_tokens, written = last_states.shape[1], segmentation.completion_mask
    completion_mask = torch.zeros_like(attention_mask)
    completion_mask[:, -written.shape[1] :] = written
    return SequenceStates(
        policy.layer_states,
        last_states,
        *(tokens[:, -num_tokens:] for tokens in (input_ids, attention_mask, completion_mask)),
        concept_ids=input_ids,
        concept_mask=attention_mask,
        image_token_grids=segmentation.image_token_grids,
        prompt_copies=policy.copies,
    )


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
