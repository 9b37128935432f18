# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Interventions: concepts scaled, added or ablated, and hidden states steered along a concept's direction."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast, get_args

import torch

from .modeling_concepts import MAX_CHUNK_ELEMENTS, SparseConcepts, check_token_shape
from .modeling_sae import SegCompassSae
from .offloading_segcompass import weights_at_hand

InterventionTokens = Literal["all", "image", "text"]
InterventionPlace = Literal["concepts", "residual"]
MAX_NUMBER = torch.finfo(torch.float32).max


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

    def __post_init__(self) -> None:
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
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= MAX_NUMBER:  # also where it is NaN
            raise ValueError(
                f"intervention on feature {self.feature}: {name} must be a finite number, got {value!r:.60}."
            )
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
    with weights_at_hand(sae):
        return _steer(sae, hidden_states, items, attention_mask, modality_ids)


def _steer(
    sae: SegCompassSae,
    hidden_states: torch.Tensor,
    items: list[ConceptIntervention],
    attention_mask: torch.Tensor | None,
    modality_ids: torch.Tensor | None,
) -> torch.Tensor:
    shape = hidden_states.shape[:2]
    names = torch.tensor([item.feature for item in items], device=hidden_states.device)  # (num_interventions,)
    _, normalization = sae.normalize(hidden_states, modality_ids)
    activations = _feature_columns(sae, hidden_states, modality_ids, names)  # (batch, sequence, num_interventions)
    deltas: list[torch.Tensor] = []
    for index, item in enumerate(items):
        selected = _selected_tokens(item, shape, attention_mask, modality_ids, hidden_states.device)
        before = activations[..., index]
        for earlier in range(index):
            # An earlier one on the same feature has already moved this activation.
            before = before + deltas[earlier] if items[earlier].feature == item.feature else before
        scale, add = cast(float, item.scale), cast(float, item.add)  # set where they were left out
        deltas.append(((scale - 1) * before + add) * selected)
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
    shape: Sequence[int],
    attention_mask: torch.Tensor | None,
    modality_ids: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Tokens `(batch_size, sequence_length)`, bool, that an intervention acts on."""
    for name, ids in (("attention_mask", attention_mask), ("modality_ids", modality_ids)):
        check_token_shape(name, ids, *shape)
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


__all__ = ["ConceptIntervention", "apply_interventions", "normalize_interventions", "steer_hidden_states"]
