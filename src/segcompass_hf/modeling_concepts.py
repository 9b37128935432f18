# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Concepts: sparse feature activations of every token, interventions on them, and the codebook that embeds them."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .modeling_sae import SegCompassSae

# Bound on tokens x d_sae per chunk: 64 MiB in float32, 256 tokens at d_sae 65,536.
MAX_CHUNK_ELEMENTS = 2**24

InterventionTokens = Literal["all", "image", "text"]
InterventionPlace = Literal["concepts", "residual"]


@dataclass
class SparseConcepts(ModelOutput):
    """Active concepts of a batch as (token, feature, value) triples, sorted by token and feature.

    Args:
        features (`torch.LongTensor` of shape `(num_active,)`): SAE feature ids in `[0, d_sae)`.
        values (`torch.Tensor` of shape `(num_active,)`): Activations, never 0. May require gradients (attribution).
        token_index (`torch.LongTensor` of shape `(num_active,)`): `row * sequence_length + position`.
        batch_size (`int`): Rows B.
        sequence_length (`int`): Tokens T per row, padding included (it has no concepts).
    """

    features: torch.Tensor | None = None
    values: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    batch_size: int | None = None
    sequence_length: int | None = None

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


@dataclass(frozen=True)
class ConceptIntervention:
    """Replace the activation `h` of one feature by `scale * h + add`.

    `ConceptIntervention(7)` ablates feature 7, `scale=2.0` doubles it, `add=3.0` adds 3 (also where it is inactive),
    and `scale=0.0, add=3.0` sets it to 3.

    Args:
        feature (`int`): SAE feature id.
        scale (`float`, *optional*): Factor; 0 (ablate) when neither it nor `add` is given, 1 when only `add` is.
        add (`float`, *optional*): Summand, in units of activation; 0 when left out.
        tokens (`str`, defaults to `"all"`): `all`, `image` or `text` tokens; padding never.
        where (`str`, defaults to `"concepts"`): On the `concepts`, after the threshold, or on the VLM's `residual`
            stream, along the feature's decoder direction.
    """

    feature: int
    scale: float | None = None
    add: float | None = None
    tokens: InterventionTokens = "all"
    where: InterventionPlace = "concepts"

    def __post_init__(self):
        try:
            feature = operator.index(self.feature)
        except TypeError:
            feature = -1
        if isinstance(self.feature, bool) or feature < 0:
            raise ValueError(f"an intervention names a feature by its id, an int of 0 or more, got {self.feature!r}.")
        default_scale = 0.0 if self.add is None else 1.0
        object.__setattr__(self, "feature", feature)
        object.__setattr__(self, "scale", self._number("scale", default_scale))
        object.__setattr__(self, "add", self._number("add", 0.0))
        for name, choices in (("tokens", InterventionTokens), ("where", InterventionPlace)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"intervention on feature {feature}: {name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}."
                )

    def _number(self, name: str, default: float) -> float:
        value = getattr(self, name)
        try:
            number = default if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"intervention on feature {self.feature}: {name} must be a finite number, got {value!r}.")
        return number


Interventions = ConceptIntervention | Mapping | list | tuple | None


def normalize_interventions(interventions: Interventions, d_sae: int | None = None) -> list[ConceptIntervention]:
    """Bring every accepted form to a list of [`ConceptIntervention`].

    Args:
        interventions: `None`, the shorthand `{feature: scale}` (0 = ablate), one [`ConceptIntervention`] or dict of
            its fields, or a list of these.
        d_sae (`int`, *optional*): Number of features; ids are checked against it when given.

    Raises:
        ValueError: Of another form, an unknown field, or a feature that the SAE does not have.

    ```python
    >>> [i.scale for i in normalize_interventions({7: 0.0, 9: 2.0})]
    [0.0, 2.0]
    ```
    """
    if interventions is None:
        return []
    if isinstance(interventions, Mapping) and "feature" not in interventions:
        items = [ConceptIntervention(feature, scale=scale) for feature, scale in interventions.items()]
    elif isinstance(interventions, list | tuple):
        items = [_intervention(item) for item in interventions]
    else:
        items = [_intervention(interventions)]
    for item in items:
        if d_sae is not None and item.feature >= d_sae:
            raise ValueError(
                f"intervention on feature {item.feature}, but the SAE has d_sae={d_sae} features: ids run from 0 to "
                f"{d_sae - 1}."
            )
    return items


def _intervention(item: ConceptIntervention | Mapping) -> ConceptIntervention:
    if isinstance(item, ConceptIntervention):
        return item
    names = [field.name for field in fields(ConceptIntervention)]
    if not isinstance(item, Mapping) or "feature" not in item:
        raise ValueError(
            "interventions are {feature: scale}, or a list of ConceptIntervention or of dicts with a 'feature', "
            f"got {item!r} of type {type(item).__name__}."
        )
    unknown = sorted(set(item) - set(names))
    if unknown:
        raise ValueError(f"intervention {dict(item)!r} has unknown fields {unknown}; known are {names}.")
    return ConceptIntervention(**item)


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
        _check_token_shape(name, ids, batch_size, sequence_length)
    flat_states = hidden_states.flatten(0, 1)  # (batch_size * sequence_length, d_in)
    tokens = torch.arange(batch_size * sequence_length, device=hidden_states.device)
    if attention_mask is not None:
        tokens = tokens[attention_mask.bool().flatten()]
    features, values, token_index = [], [], []
    for chunk in tokens.split(max(1, min(chunk_size, MAX_CHUNK_ELEMENTS // sae.config.d_sae))):
        modalities = None if modality_ids is None else modality_ids.flatten()[chunk]
        feature_acts = sae.encode(flat_states[chunk], modalities)  # (chunk, d_sae)
        position, feature = _reaches(feature_acts, threshold).nonzero(as_tuple=True)
        features.append(feature)
        values.append(feature_acts[position, feature])
        token_index.append(chunk[position])
        del feature_acts  # before the next chunk is encoded, so that one is alive at a time
    values = torch.cat(values)
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


def apply_interventions(
    concepts: SparseConcepts,
    interventions: Interventions,
    attention_mask: torch.Tensor | None = None,
    modality_ids: torch.Tensor | None = None,
    d_sae: int | None = None,
) -> SparseConcepts:
    """Change concepts after the threshold; those with `where="residual"` are left to [`steer_hidden_states`].

    Interventions act in the order given. What becomes 0 is dropped. Gradients flow through the values.

    Args:
        concepts ([`SparseConcepts`]): What the model found; not changed.
        interventions: See [`normalize_interventions`].
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 where not padding.
        modality_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 text, 1 image;
            needed by interventions on image or text tokens.
        d_sae (`int`, *optional*): Checks the feature ids when given.
    """
    shape = (concepts.batch_size, concepts.sequence_length)
    for intervention in normalize_interventions(interventions, d_sae):
        if intervention.where == "concepts":
            selected = _selected_tokens(intervention, shape, attention_mask, modality_ids, concepts.features.device)
            concepts = _intervene(concepts, intervention, selected.flatten())
    return concepts


def _intervene(concepts: SparseConcepts, intervention: ConceptIntervention, selected: torch.Tensor) -> SparseConcepts:
    """Apply one intervention to the tokens where `selected` `(batch_size * sequence_length,)` is true."""
    features, values, token_index = concepts.features, concepts.values, concepts.token_index
    hit = (features == intervention.feature) & selected[token_index]
    if intervention.add == 0:
        values = torch.where(hit, values * intervention.scale, values)
    else:
        tokens = selected.nonzero().squeeze(1)  # (num_selected,)
        before = values.new_zeros(selected.shape).index_put((token_index[hit],), values[hit])
        features = torch.cat([features[~hit], features.new_full(tokens.shape, intervention.feature)])
        values = torch.cat([values[~hit], before[tokens] * intervention.scale + intervention.add])
        token_index = torch.cat([token_index[~hit], tokens])
        width = int(features.max()) + 1 if features.numel() else 1
        order = (token_index * width + features).argsort()
        features, values, token_index = features[order], values[order], token_index[order]
    keep = values != 0
    return replace(concepts, features=features[keep], values=values[keep], token_index=token_index[keep])


def steer_hidden_states(
    sae: SegCompassSae,
    hidden_states: torch.Tensor,
    interventions: Interventions,
    attention_mask: torch.Tensor | None = None,
    modality_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Change the residual stream so that features change: `z + ((scale - 1) h_j + add) W_dec,j`.

    Acts on interventions with `where="residual"` only; what the SAE does not explain of `z` stays as it is.

    Args:
        sae ([`SegCompassSae`]): The autoencoder.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, d_in)`): States of layer `sae_layer`.
        interventions: See [`normalize_interventions`].
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 where not padding.
        modality_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 text, 1 image.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, d_in)`, in the dtype of `hidden_states`.
    """
    items = [i for i in normalize_interventions(interventions, sae.config.d_sae) if i.where == "residual"]
    if not items:
        return hidden_states
    shape = hidden_states.shape[:2]
    names = torch.tensor([item.feature for item in items], device=hidden_states.device)  # (num_interventions,)
    _, normalization = sae.normalize(hidden_states, modality_ids)
    activations = _feature_columns(sae, hidden_states, modality_ids, names)  # (batch, sequence, num_interventions)
    deltas = []
    for index, item in enumerate(items):
        selected = _selected_tokens(item, shape, attention_mask, modality_ids, hidden_states.device)
        before = activations[..., index]
        for earlier in range(index):
            # An earlier one on the same feature has already moved this activation.
            before = before + deltas[earlier] if items[earlier].feature == item.feature else before
        deltas.append(((item.scale - 1) * before + item.add) * selected)
    directions = sae.W_dec[names]  # (num_interventions, d_in)
    if sae.config.finetuning_scaling_factor:
        directions = directions * sae.finetuning_scaling_factor[names, None]
    change = normalization.undo_direction(torch.stack(deltas, dim=-1) @ directions)
    return (hidden_states + change).to(hidden_states.dtype)


def _feature_columns(
    sae: SegCompassSae, hidden_states: torch.Tensor, modality_ids: torch.Tensor | None, names: torch.Tensor
) -> torch.Tensor:
    """Activations of a few features `(batch_size, sequence_length, len(names))`, encoded in chunks."""
    tokens = torch.arange(hidden_states.shape[:2].numel(), device=hidden_states.device)
    columns = []
    for chunk in tokens.split(max(1, MAX_CHUNK_ELEMENTS // sae.config.d_sae)):
        modalities = None if modality_ids is None else modality_ids.flatten()[chunk]
        columns.append(sae.encode(hidden_states.flatten(0, 1)[chunk], modalities)[:, names])
    return torch.cat(columns).view(*hidden_states.shape[:2], len(names))


def _selected_tokens(
    intervention: ConceptIntervention,
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    modality_ids: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Tokens `(batch_size, sequence_length)`, bool, that an intervention acts on."""
    for name, ids in (("attention_mask", attention_mask), ("modality_ids", modality_ids)):
        _check_token_shape(name, ids, *shape)
    selected = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None:
        selected = attention_mask.bool()
    if intervention.tokens == "all":
        return selected
    if modality_ids is None:
        raise ValueError(
            f"intervention on feature {intervention.feature} is for {intervention.tokens} tokens only and needs "
            f"modality_ids of shape {tuple(shape)} (0 text, 1 image), got None."
        )
    return selected & (modality_ids == (1 if intervention.tokens == "image" else 0))


def _check_token_shape(name: str, ids: torch.Tensor | None, batch_size: int, sequence_length: int):
    if ids is not None and tuple(ids.shape) != (batch_size, sequence_length):
        raise ValueError(
            f"{name} must have one entry per token, shape {(batch_size, sequence_length)}, got {tuple(ids.shape)}."
        )


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


__all__ = [
    "ConceptCodebook",
    "ConceptIntervention",
    "SparseConcepts",
    "apply_interventions",
    "encode_concepts",
    "normalize_interventions",
    "sparsify_concepts",
    "steer_hidden_states",
]
