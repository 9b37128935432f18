# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward of joint training as the original formulates it, as this package does, and every step between the two.

`NAIVE` follows the original: a reference model of its own reads the whole sequence; the policy's pass yields logits of
every token; a second pass of the policy, within autograd and with logits that nobody reads, yields the states of layer
L; the SAE encodes and decodes, its dense activations go through the codebook and stay for the backward pass; all slots
are decoded to masks. Where the original leaves room, the cheaper reading is taken: entropy costs no graph, and nothing
is recomputed. `OURS` calls the model as `SegCompassGRPOTrainer` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from segcompass_hf.training.grpo.forward import JointTargets, add_joint_forward
from segcompass_hf.training.grpo.reference import FusedHead, LayerTrace, ReferencePolicy
from segcompass_hf.training.objective import SEGMENTATION_LOSS_WEIGHTS

BETA, CLIP = 0.2, 0.2  # KL coefficient and clipping of the policy's ratio


@dataclass(frozen=True)
class Formulation:
    """One way to compute the same losses.

    Args:
        name (`str`): For tables.
        second_pass (`str`): Whether layer L is read from a second pass, and whether that keeps a graph.
        reference (`str`): A whole model, the layers above L fed from the policy's pass, or no KL term.
        head (`str`): Logits of all tokens, or log-probabilities of the completion in tiles.
        concepts (`str`): Dense activations with decode, or the active ones alone.
        decode (`str`): Which slots SAM's decoder sees.
        prompts (`str`): Whether a prompt that several completions have is computed for each of them, or shared.
        through_package (`bool`): Call the model as the trainer does; the other fields say what that amounts to.
    """

    name: str
    second_pass: Literal["graph", "no graph", "none"] = "graph"
    reference: Literal["whole", "shared", "none"] = "whole"
    head: Literal["full", "completion"] = "full"
    concepts: Literal["dense", "sparse"] = "dense"
    decode: Literal["all", "matched"] = "all"
    prompts: Literal["each", "shared"] = "each"
    through_package: bool = False


NAIVE = Formulation("naive")
LADDER = [NAIVE]
for _name, _change in (
    ("second pass without a graph", {"second_pass": "no graph"}),
    ("one pass", {"second_pass": "none"}),
    ("frozen layers shared with the reference", {"reference": "shared"}),
    ("log-probabilities of the completion alone", {"head": "completion"}),
    ("sparse concepts, no SAE decode", {"concepts": "sparse"}),
    ("matched slots decoded", {"decode": "matched"}),
):
    LADDER.append(replace(LADDER[-1], name=f"+ {_name}", **_change))
OURS = replace(LADDER[-1], name="ours", prompts="shared", through_package=True)
UNSHARED = replace(OURS, name="ours without sharing", prompts="each")  # differs from ours where prompts are shared
WITHOUT_KL = [replace(NAIVE, name="naive without KL", reference="none")]
WITHOUT_KL.append(replace(OURS, name="ours without KL", reference="none"))


@dataclass
class StepInputs:
    """A micro-batch as one formulation gets it: `[padding | prompt | completion | padding]`.

    Args:
        vlm (`dict`): `input_ids`, `attention_mask`, `pixel_values`, `position_ids` of the policy's pass.
        second (`dict`): The same of the pass that yields layer L.
        completion_mask (`torch.Tensor` of shape `(batch_size, completion_width)`): 1 on completion tokens.
        advantages (`torch.Tensor` of shape `(batch_size,)`): Of the completions.
        targets ([`JointTargets`]): Of the segmentation losses, as the trainer passes them.
    """

    vlm: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    completion_mask: torch.Tensor
    advantages: torch.Tensor
    targets: JointTargets


@dataclass
class StepOutput:
    """Log-probabilities `(batch_size, completion_width)` of both policies, and the segmentation losses."""

    log_probs: torch.Tensor
    ref_log_probs: torch.Tensor | None
    segmentation: torch.Tensor

    def loss(self, inputs: StepInputs) -> torch.Tensor:
        """Joint objective, `()`: TRL's `bnpo` loss with the KL estimator of its GRPO, and the segmentation losses."""
        ratio = (self.log_probs - self.log_probs.detach()).exp()
        advantages = inputs.advantages[:, None]
        per_token = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        if self.ref_log_probs is not None:
            difference = self.ref_log_probs - self.log_probs
            per_token = per_token + BETA * (difference.exp() - difference - 1)
        mask = inputs.completion_mask
        return (per_token * mask).sum() / mask.sum().clamp(min=1) + self.segmentation


class References:
    """Reference policies of a model as it is now, built when first asked for.

    `whole` is a copy of the VLM that shares nothing, `shared` the package's own.
    """

    def __init__(self, model: nn.Module):
        self.model, self.built, self.forwards = model, {}, {}

    def build(self, kind: str) -> nn.Module | None:
        if kind not in self.built and kind != "none":
            if kind == "whole":
                self.built[kind] = copy.deepcopy(self.model.vlm).requires_grad_(False).eval()
            else:
                self.built[kind] = ReferencePolicy(self.model, temperature=1.0)
        return self.built.get(kind)

    def joint_forward(self, kind: str) -> Callable:
        """The package's forward with this reference, which tries once whether prompts can be shared."""
        if kind not in self.forwards:
            self.model.__dict__.pop("forward", None)  # with another reference
            add_joint_forward(self.model, temperature=1.0, cast_to_fp32=False, reference=self.build(kind))
            self.forwards[kind] = self.model.forward
        return self.forwards[kind]

    def bytes(self, kind: str) -> int:
        """What a reference policy occupies beyond the policy itself."""
        own = {parameter.data_ptr() for parameter in self.model.parameters()}
        reference = self.build(kind)
        tensors = [] if reference is None else [*reference.parameters(), *reference.buffers()]
        return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in own)


def run_forward(model: nn.Module, references: References, formulation: Formulation, inputs: StepInputs) -> StepOutput:
    """Policy, reference and segmentation of one micro-batch."""
    if formulation.through_package:
        return package_forward(references.joint_forward(formulation.reference), inputs)
    return composed_forward(model, references.build(formulation.reference), formulation, inputs)


def package_forward(joint_forward: Callable, inputs: StepInputs) -> StepOutput:
    """As `SegCompassGRPOTrainer` calls the model."""
    output = joint_forward(**inputs.vlm, labels=_labels(inputs), fused_lm_head=True, segmentation=inputs.targets)
    return StepOutput(output.log_probs, output.ref_log_probs, output.segmentation)


def composed_forward(
    model: nn.Module, reference: nn.Module | None, formulation: Formulation, inputs: StepInputs
) -> StepOutput:
    """The same losses with the savings of `formulation` alone; tensors live as long as they do in the original."""
    layer, width = model.config.sae_layer, inputs.completion_mask.shape[1] + 1
    ref_log_probs = None
    if formulation.reference == "whole":
        with torch.no_grad():
            logits = reference(**inputs.vlm).logits  # (batch_size, tokens, vocab_size)
            ref_log_probs = _log_probs(logits, inputs)
            del logits
    shared = formulation.reference == "shared"
    with LayerTrace(model.base_model, layer) if shared else nullcontext() as trace:
        first = model.base_model(**inputs.vlm, output_hidden_states=True)
    last_states, head = first.last_hidden_state, model.get_output_embeddings()
    if formulation.head == "completion":
        fused = FusedHead(model, model.get_output_embeddings, 1.0, False, ("log_probs", "entropy"))
        log_probs = fused(last_states[:, -width:], _labels(inputs)[:, -width:]).log_probs
        ref_log_probs = reference(trace, _labels(inputs)[:, -width:]) if shared else ref_log_probs
    else:
        logits = head(last_states)  # (batch_size, tokens, vocab_size)
        if shared:
            with torch.no_grad():
                replayed = head if reference.lm_head is None else reference.lm_head
                ref_log_probs = _log_probs(replayed(trace.replay(reference.layers, reference.norm)), inputs)
    states, mask = first.hidden_states[layer], inputs.vlm["attention_mask"]
    if formulation.second_pass != "none":
        with torch.set_grad_enabled(formulation.second_pass == "graph"):
            second = model.vlm(**inputs.second, output_hidden_states=True)
        states, mask = second.hidden_states[layer], inputs.second["attention_mask"]
    references = _reference_states(model, last_states, inputs)
    if formulation.concepts == "dense":
        with torch.no_grad():
            feature_acts = model.sae.encode(states)  # (batch_size, tokens, d_sae)
            reconstruction = model.sae.decode(feature_acts)  # noqa: F841 - never read
        threshold = model.config.concept_threshold
        kept = feature_acts.masked_fill(feature_acts.abs() < threshold, 0.0)
        slots = model.slot_encoder(model.codebook.dense(kept), mask).slots
    else:
        concepts = model.encode_concepts(states.detach(), mask, model.modality_ids(inputs.vlm["input_ids"]))
        slots = model.encode_slots(concepts, mask).slots
    targets = inputs.targets
    masks = replace(targets.masks, decode=formulation.decode)
    output = model.predict_masks(references, slots, targets.image_embeddings, targets.reshaped_input_sizes, masks)
    second = feature_acts = reconstruction = None  # noqa: F841
    if formulation.head == "full":
        log_probs = _log_probs(logits, inputs, with_entropy=True)
    return StepOutput(log_probs, ref_log_probs, output.loss)


def _reference_states(model: nn.Module, last_states: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
    ids, mask = inputs.vlm["input_ids"], inputs.vlm["attention_mask"]
    completion_mask = torch.zeros_like(mask)
    completion_mask[:, -inputs.completion_mask.shape[1] :] = inputs.completion_mask
    return model.find_reference_states(last_states, ids, mask, completion_mask)


def _labels(inputs: StepInputs) -> torch.Tensor:
    """Ids where a completion token is to be scored, -100 elsewhere."""
    width = inputs.completion_mask.shape[1]
    labels = torch.full_like(inputs.vlm["input_ids"], -100)
    completion = inputs.vlm["input_ids"][:, -width:]
    labels[:, -width:] = completion.masked_fill(inputs.completion_mask == 0, -100)
    return labels


def _log_probs(logits: torch.Tensor, inputs: StepInputs, with_entropy: bool = False) -> torch.Tensor:
    """Log-probabilities of the completion from logits of all tokens; the entropy is computed, logged nowhere."""
    width = inputs.completion_mask.shape[1]
    all_log_probs = logits[:, -width - 1 : -1].log_softmax(-1, dtype=torch.float32)  # (batch_size, width, vocab_size)
    if with_entropy:
        with torch.no_grad():
            (all_log_probs.exp() * all_log_probs).sum(-1)
    return all_log_probs.gather(-1, inputs.vlm["input_ids"][:, -width:, None]).squeeze(-1) * inputs.completion_mask


def loss_weights(model: nn.Module) -> dict[str, float]:
    """The weights of the model's configuration, as arguments of `segmentation_loss`."""
    return {name: getattr(model.config, name) for name in SEGMENTATION_LOSS_WEIGHTS}
