# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One step of joint training on tensors without values: what its activations occupy at the fullest moment."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ...concept_grids_segcompass import ConceptGrid
from ...image_features_segcompass import ImageFeatures
from ...losses_segcompass import SlotAssignments
from ...modeling_concepts import MAX_CHUNK_ELEMENTS
from ...reading_segcompass import MaskTargets
from ...sparse_features_segcompass import FeaturePattern, largest_of_rows
from ...text_stack_segcompass import decoder_layers, text_stack
from .meter import MemoryMeter

if TYPE_CHECKING:
    from .setup import TrainingSetup

# Tiles of TRL's fused head: tokens and words of the vocabulary that are projected at a time.
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


def training_bytes(model: nn.Module, setup: TrainingSetup) -> tuple[float, float]:
    """Activations kept by the forward pass, and what comes on top at the fullest moment of the step.

    Args:
        model (`SegCompassForReasoningSegmentation`): From `memory.fake_model`, in the dtypes of training.
        setup ([`TrainingSetup`]): Batch size and tokens.

    Returns:
        `tuple[float, float]`: Bytes.
    """
    if setup.gradient_checkpointing:
        _checkpoint(model)
    with MemoryMeter(_held(model)) as meter:
        with _autocast(setup):
            tokens = setup.prompt_tokens + setup.completion_tokens
            # GRPO cuts the graph off where the SAE reads, below which nothing trains.
            states = _language_pass(model, setup.batch_size, tokens, from_embeddings=setup.stage != "grpo")
            if setup.stage == "grpo":
                loss = _log_probs(model, setup, states).sum()
                if setup.reference:
                    with torch.no_grad():  # the reference policy repeats the upper layers
                        _log_probs(model, setup, _language_pass(model, *states.shape[:2]))
            elif setup.trainable == "masks":
                loss = 0.0  # no language loss
            else:
                loss = _language_loss(model, setup, states)
            if setup.stage != "warmup":
                loss = loss + _segmentation(model, setup, states)
        kept = meter.live
        loss.backward()
    return kept, meter.peak - kept


def sae_bytes(model: nn.Module, setup: TrainingSetup) -> tuple[float, float]:
    """The same for SAE pre-training: a step on `batch_size` tokens, a pass of `rows_per_batch` rows to get them.

    The pass runs beside the step, in a thread, unless a cache is filled before. The tokens wait in the host's memory.
    """
    sae = model.sae
    tokens = setup.prompt_tokens + setup.completion_tokens
    with torch.no_grad(), MemoryMeter(_held(model)) as harvest:
        _language_pass(model, setup.rows_per_batch, tokens)
    buffer = 0 if setup.gpus else setup.buffer_tokens * sae.config.d_in * setup.dtype.itemsize
    with MemoryMeter(_held(model)) as meter:
        with _autocast(setup):
            states = sae.normalize(torch.empty(setup.batch_size, sae.config.d_in))[0].clone()  # tokens that count
            sparsity, feature_acts = 0.0, None
            if sae.computes_with_few("cuda" if setup.gpus else "cpu"):
                reconstruction = _rebuilt_from_few(sae, states)
            else:
                feature_acts = sae.encode(states)
                reconstruction = sae.decode(feature_acts)  # returned, so that it lives as long as the activations
                sparsity = (feature_acts * sae.W_dec.norm(dim=-1)).sum(-1).mean()
            loss = (reconstruction - states).pow(2).sum(-1).mean() + sparsity
        kept = meter.live
        loss.backward()
    beside = 0 if setup.cached else harvest.peak
    return kept + buffer, max(meter.peak + beside, harvest.peak) - kept


def _rebuilt_from_few(sae: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """States `(tokens, d_in)` rebuilt from `k` features of each; which these are depends on values, and is given."""
    config, active = sae.config, len(states) * sae.config.k
    with torch.no_grad():
        tokens, places = torch.zeros(active, dtype=torch.long), torch.zeros(active, dtype=torch.long)
        if config.architecture == "batchtopk":
            values = sae._project(states)
            _ = (values >= sae.topk_threshold) & (values > 0)
            features = places
        else:
            values, features = largest_of_rows(sae._project, states, config.k, config.d_sae)
            features = features[tokens, places]
        pattern = FeaturePattern.sorted_by_token(tokens, features, len(states), config.d_sae)
        found = values[tokens, places]
    return sae._decode_active(sae._encode_active(found, states, pattern), pattern)


def sampling_bytes(model: nn.Module, setup: TrainingSetup) -> tuple[float, float]:
    """Keys, values and captured states of all rollouts, and the pass over their prompts or SAM's over an image."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = next(decoder_layers(model.vlm).parameters()).dtype.itemsize
    tokens = setup.rollouts * (setup.prompt_tokens + setup.completion_tokens)
    cache = tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head_dim * size
    captured = tokens * 2 * text.hidden_size * size
    peaks = []
    if setup.sharding != "none":  # the masks of the rollouts come from another pass, which computes all logits
        peaks.append(setup.batch_size * tokens / setup.rollouts * text.vocab_size * size)
    canvas = model.mask_stage.canvas
    with torch.no_grad():  # generation runs outside autocast
        with MemoryMeter([*model.parameters(), *model.buffers()]) as meter:
            _language_pass(model, setup.rollouts, setup.prompt_tokens)
        peaks.append(meter.peak)
        with MemoryMeter([*model.parameters(), *model.buffers()]) as meter:
            model.encode_image(torch.empty(1, 3, canvas, canvas))  # one image at a time
        peaks.append(meter.peak)
    return cache + captured, max(peaks)


def _held(model: nn.Module) -> list[torch.Tensor]:
    """Weights, buffers, and gradients as after an earlier micro-batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    return [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]


def _language_pass(model: nn.Module, batch_size: int, tokens: int, from_embeddings: bool = True) -> torch.Tensor:
    """Last states `(batch_size, tokens, hidden)`; the padding mask is passed in full, as with padded batches."""
    text_model, _ = text_stack(model.vlm)
    # Through the module, whose hooks decide whether a gradient runs down to here: of tied rows, and checkpointing's.
    embeddings = model.get_input_embeddings()(torch.zeros(batch_size, tokens, dtype=torch.long))
    if not from_embeddings:
        embeddings = embeddings.detach()
    mask = torch.ones(batch_size, 1, tokens, tokens, dtype=torch.bool)
    return text_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state


def _segmentation(model: nn.Module, setup: TrainingSetup, states: torch.Tensor) -> torch.Tensor:
    """Loss of the segmentation path, with `objects` of every sample matched and decoded.

    The steps of `read_masks`; how many concepts are active depends on values, and so is given here.
    """
    batch_size, tokens, config = *states.shape[:2], model.config
    with torch.no_grad():
        chunk = max(1, min(config.concept_chunk_size, MAX_CHUNK_ELEMENTS // config.sae_config.d_sae))
        feature_acts = model.sae.encode(states.flatten(0, 1)[:chunk])
        _ = feature_acts < config.concept_threshold
        del feature_acts, _
    concepts = _EvenConcepts(batch_size, tokens, setup.active_concepts, states.dtype)
    concept_embeddings = model.codebook(concepts)  # (batch_size, tokens, d_slot)
    slots = model.slot_encoder(concept_embeddings, torch.ones(batch_size, tokens)).slots
    canvas, map_size = model.mask_stage.canvas, model.mask_stage.map_size
    if setup.stage == "grpo":  # encoded one by one before the step
        shapes, dtype = model.mask_stage.feature_shapes, model.sam.dtype
        embeddings, *extra = (torch.empty(batch_size, *shape, dtype=dtype) for shape in shapes)
        embeddings = ImageFeatures(embeddings, tuple(extra)) if extra else embeddings
    else:
        embeddings = model.encode_image(torch.empty(batch_size, 3, canvas, canvas))
    objects = min(setup.objects, config.num_slots)
    samples = torch.arange(batch_size).repeat_interleave(objects)
    order = torch.arange(objects).repeat(batch_size)
    targets = MaskTargets(
        torch.empty(batch_size, config.num_slots, map_size, map_size),
        torch.full((batch_size,), objects),
        assignments=SlotAssignments(samples, order, order, pairs_per_sample=[objects] * batch_size),
    )
    sizes = torch.full((batch_size, 2), canvas)
    grid = _concept_grid(concept_embeddings, model.mask_stage.embedding_size) if config.heatmap_concepts else None
    references = states[:, -config.num_slots :]
    return model.predict_masks(references, slots, embeddings, sizes, targets, concept_grid=grid).loss


def _concept_grid(concept_embeddings: torch.Tensor, side: int) -> ConceptGrid:
    """Of as many image tokens as there are tokens, but for what is left over by a square."""
    tokens = math.isqrt(concept_embeddings.shape[1])  # along a side
    laid = concept_embeddings[:, : tokens**2].unflatten(1, (tokens, tokens)).clone()
    weights = torch.empty(len(laid), side, tokens)
    return ConceptGrid(laid, weights, weights)


class _EvenConcepts:
    """Sparse concepts of which every token has the same number; how many there are cannot depend on values here."""

    def __init__(self, batch_size: int, sequence_length: int, per_token: int, dtype: torch.dtype):
        self.batch_size, self.sequence_length, self.per_token = batch_size, sequence_length, per_token
        number = batch_size * sequence_length * per_token
        self.features = torch.zeros(number, dtype=torch.long)
        self.token_index = torch.zeros(number, dtype=torch.long)
        self.values = torch.empty(number, dtype=dtype)

    def counts(self) -> torch.Tensor:
        return torch.full((self.batch_size, self.sequence_length), self.per_token)


class _FusedHead(torch.autograd.Function):
    """Makes the tensors that TRL's fused head makes on a GPU; on a CPU its kernel would make others."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        _tile(states, weight)
        return states.new_empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        states, weight = ctx.saved_tensors
        sums = [torch.zeros_like(states, dtype=torch.float32)]  # gradients are summed over tiles in float32
        if ctx.needs_input_grad[1]:
            sums.append(torch.zeros_like(weight, dtype=torch.float32))
        _tile(states, weight)
        return sums[0].to(states.dtype), sums[1].to(weight.dtype) if len(sums) > 1 else None


def _language_loss(model: nn.Module, setup: TrainingSetup, states: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the reference answers, as `language_loss.language_loss_sums` computes it."""
    logits = model.get_output_embeddings()(states[:, -setup.completion_tokens - 1 :])
    targets = torch.zeros(setup.batch_size * setup.completion_tokens, dtype=torch.long)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).clone().float(), targets, reduction="sum")


def _tile(states: torch.Tensor, weight: torch.Tensor) -> None:
    logits = states.new_empty(min(len(states), HEAD_TOKENS), HEAD_WORDS)
    words = weight[:HEAD_WORDS].to(states.dtype)
    del logits, words


def _log_probs(model: nn.Module, setup: TrainingSetup, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the completions, from states `(batch_size, tokens, hidden)`."""
    scored = states[:, -setup.completion_tokens :].flatten(0, 1)
    dtype = torch.bfloat16 if setup.autocast else states.dtype
    return _FusedHead.apply(scored.to(dtype), model.get_output_embeddings().weight)


def _checkpoint(model: nn.Module) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23 renamed it
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def _autocast(setup: TrainingSetup):
    # Sharded training computes in bfloat16 weights; elsewhere every use of a float32 weight makes a copy.
    if not setup.autocast or setup.sharding != "none":
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)
