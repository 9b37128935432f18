# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Concepts: sparse feature activations of every token, interventions on them, and the codebook that embeds them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_sae import SegCompassSae
from .offloading_segcompass import weights_at_hand

# Bound on tokens x d_sae per chunk: 64 MiB in float32, 256 tokens at d_sae 65,536.
MAX_CHUNK_ELEMENTS = 2**24


@dataclass
class SparseConcepts:
    """Active concepts of a batch as (token, feature, value) triples, sorted by token and feature.

    No `ModelOutput`: as a mapping it would owe `values()` to all who look for tensors in what a module is given.

    Args:
        features (`torch.LongTensor` of shape `(num_active,)`): SAE feature ids in `[0, d_sae)`.
        values (`torch.Tensor` of shape `(num_active,)`): Activations, never 0. May require gradients (attribution).
        token_index (`torch.LongTensor` of shape `(num_active,)`): `row * sequence_length + position`.
        batch_size (`int`): Rows B.
        sequence_length (`int`): Tokens T per row, padding included (it has no concepts).
    """

    features: torch.Tensor
    values: torch.Tensor
    token_index: torch.Tensor
    batch_size: int
    sequence_length: int

    def counts(self) -> torch.Tensor:
        """Active concepts per token (L0): `torch.LongTensor` of shape `(batch_size, sequence_length)`."""
        counts = torch.bincount(self.token_index, minlength=self.batch_size * self.sequence_length)
        return counts.view(self.batch_size, self.sequence_length)

    def dense(self, d_sae: int) -> torch.Tensor:
        """The same as a dense tensor `(batch_size, sequence_length, d_sae)`; for tests and small models."""
        dense = self.values.new_zeros(self.batch_size * self.sequence_length, d_sae)
        dense = dense.index_put((self.token_index, self.features), self.values)
        return dense.view(self.batch_size, self.sequence_length, d_sae)

    def for_row(self, row: int) -> "SparseConcepts":
        """Concepts of one row of the batch, as a batch of one."""
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row {row} of a batch of {self.batch_size} was asked for; rows count from 0.")
        first = row * self.sequence_length
        inside = (self.token_index >= first) & (self.token_index < first + self.sequence_length)
        return SparseConcepts(
            features=self.features[inside],
            values=self.values[inside],
            token_index=self.token_index[inside] - first,
            batch_size=1,
            sequence_length=self.sequence_length,
        )


def sparsify_concepts(
    feature_acts: torch.Tensor, threshold: float, attention_mask: torch.Tensor | None = None
) -> SparseConcepts:
    """Sparse form of dense activations: entries with `|h| >= threshold` and `h != 0` of unmasked tokens.

    Args:
        feature_acts (`torch.Tensor` of shape `(batch_size, sequence_length, d_sae)`): Feature activations.
        threshold (`float`): `concept_threshold`, 0 or more.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 where not padding.
    """
    batch_size, sequence_length = feature_acts.shape[:2]
    keep = _reaches(feature_acts, threshold)
    if attention_mask is not None:
        keep = keep & attention_mask.bool().unsqueeze(-1)
    token_index, features = keep.flatten(0, 1).nonzero(as_tuple=True)
    values = feature_acts.flatten(0, 1)[token_index, features]
    return SparseConcepts(features, values, token_index, batch_size, sequence_length)


@torch.no_grad()
def encode_concepts(
    sae: SegCompassSae,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    threshold: float,
    modality_ids: torch.Tensor | None = None,
    chunk_size: int = 4096,
) -> SparseConcepts:
    """Encode hidden states and keep the active concepts only (section 3 of the paper: `|h_j| >= tau`).

    The SAE and the layers below it are frozen, so nothing is kept for a backward pass. Tokens are encoded in chunks of
    at most `chunk_size` and at most `MAX_CHUNK_ELEMENTS / d_sae`; padding is never encoded.

    Args:
        sae ([`SegCompassSae`]): The autoencoder.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, d_in)`): States of layer `sae_layer`.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 where not padding.
        threshold (`float`): `concept_threshold`, 0 or more.
        modality_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 text, 1 image.
        chunk_size (`int`, defaults to 4096): Tokens per chunk at most.

    Raises:
        ValueError: Shapes disagree, or activations are not finite (broken weights).
    """
    if hidden_states.ndim != 3:
        raise ValueError(
            f"hidden_states must be (batch_size, sequence_length, d_in), got shape {tuple(hidden_states.shape)}."
        )
    batch_size, sequence_length = hidden_states.shape[:2]
    for name, ids in (("attention_mask", attention_mask), ("modality_ids", modality_ids)):
        check_token_shape(name, ids, batch_size, sequence_length)
    flat_states = hidden_states.flatten(0, 1)  # (batch_size * sequence_length, d_in)
    tokens = torch.arange(batch_size * sequence_length, device=hidden_states.device)
    if attention_mask is not None:
        tokens = tokens[attention_mask.bool().flatten()]
    features, found, token_index = [], [], []
    with weights_at_hand(sae):
        for chunk in tokens.split(max(1, min(chunk_size, MAX_CHUNK_ELEMENTS // sae.config.d_sae))):
            modalities = None if modality_ids is None else modality_ids.flatten()[chunk]
            feature_acts = sae.encode(flat_states[chunk], modalities)  # (chunk, d_sae)
            position, feature = _reaches(feature_acts, threshold).nonzero(as_tuple=True)
            features.append(feature)
            found.append(feature_acts[position, feature])
            token_index.append(chunk[position])
            del feature_acts  # before the next chunk is encoded, so that one is alive at a time
    values = torch.cat(found)
    if not values.isfinite().all():
        raise ValueError(
            f"{int((~values.isfinite()).sum())} of {values.numel()} concept activations are not finite, and so are "
            f"{int((~flat_states[tokens].isfinite()).sum())} of the hidden states they come from; the weights of the "
            f"{'VLM' if not flat_states[tokens].isfinite().all() else 'SAE'} hold NaN or overflow in their dtype."
        )
    return SparseConcepts(torch.cat(features), values, torch.cat(token_index), batch_size, sequence_length)


def _reaches(feature_acts: torch.Tensor, threshold: float) -> torch.Tensor:
    """Whether `|h| >= threshold` and `h != 0`; true for NaN, which must not vanish silently."""
    if threshold < 0:
        raise ValueError(f"concept_threshold is a magnitude and cannot be negative, got {threshold}.")
    if threshold == 0:
        return feature_acts != 0
    return (feature_acts < threshold).logical_and_(feature_acts > -threshold).logical_not_()


class ConceptCodebook(nn.Embedding):
    """One vector per concept; a token's embedding is `sum_j h_j C_j` over its active concepts (section 3).

    `weight` has shape `(d_sae, d_slot)`: the transpose of the original's bias-free linear layer.
    """

    def __init__(self, d_sae: int, d_slot: int):
        super().__init__(d_sae, d_slot)

    def forward(self, concepts: SparseConcepts) -> torch.Tensor:
        """Embed sparse concepts; gradients reach `weight` and `concepts.values`.

        Args:
            concepts ([`SparseConcepts`]): Active concepts.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, d_slot)`: zero for tokens without concepts.
        """
        counts = concepts.counts().flatten()
        embeddings = F.embedding_bag(
            concepts.features,
            self.weight,
            offsets=counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=concepts.values.to(self.weight.dtype),
        )
        return embeddings.view(concepts.batch_size, concepts.sequence_length, self.embedding_dim)

    def dense(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """The same from dense activations `(..., d_sae)`, thresholded by the caller; for tests and benchmarks."""
        return feature_acts.to(self.weight.dtype) @ self.weight


def check_token_shape(name: str, ids: torch.Tensor | None, batch_size: int, sequence_length: int) -> None:
    if ids is not None and tuple(ids.shape) != (batch_size, sequence_length):
        raise ValueError(
            f"{name} must have one entry per token, shape {(batch_size, sequence_length)}, got {tuple(ids.shape)}."
        )


__all__ = [
    "ConceptCodebook",
    "SparseConcepts",
    "encode_concepts",
    "sparsify_concepts",
]
