# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Guardrails: concepts that no mask of an answer may show, and concepts that every mask has to show."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .concept_names_segcompass import NamedConcept, find_concepts, names_of
from .modeling_concepts import SparseConcepts

Concepts = str | NamedConcept | Iterable[str | NamedConcept] | None


@dataclass(frozen=True)
class Guardrail:
    """One rule for the masks of an answer.

    Args:
        rule (`str`): `forbid`: no mask may show the concept; `require`: every mask has to.
        concept ([`NamedConcept`]): Which.
    """

    rule: Literal["forbid", "require"]
    concept: NamedConcept


def guardrails_of(model: Any, forbid: Concepts = None, require: Concepts = None) -> tuple[Guardrail, ...]:
    """Rules from names of concepts, as the dictionary beside the model's checkpoint knows them.

    Args:
        model (`SegCompassForReasoningSegmentation`): Whose concepts they are.
        forbid, require (`str`, [`NamedConcept`] or several, *optional*): What no mask may show, what each has to.

    Raises:
        ValueError: A name is not known (near ones are listed) or stands in both, a feature does not exist, or there is
            no dictionary to look names up in.
    """
    asked = {"forbid": _several(forbid), "require": _several(require)}
    named = any(not isinstance(concept, NamedConcept) for concepts in asked.values() for concept in concepts)
    known = names_of(model) if named else {}
    rules = []
    for rule, concepts in asked.items():
        rules += [Guardrail(rule, concept) for concept in dict.fromkeys(find_concepts(concepts, known))]
    both = {rail.concept.name for rail in rules if rail.rule == "forbid"}
    both &= {rail.concept.name for rail in rules if rail.rule == "require"}
    if both:
        raise ValueError(f"{', '.join(sorted(both))} cannot be both forbidden and required.")
    if rules and model.config.concept_input == "duplicated":
        raise ValueError(
            'guardrails read one set of concepts per token; set model.config.concept_input = "once" to use them.'
        )
    d_sae = model.config.sae_config.d_sae
    for rail in rules:
        if not all(0 <= feature < d_sae for feature in rail.concept.features):
            raise ValueError(
                f"the concept {rail.concept.name!r} has features {rail.concept.features}; this SAE has features 0 to "
                f"{d_sae - 1}."
            )
    return tuple(rules)


def _several(concepts: Concepts) -> list:
    if concepts is None:
        return []
    return [concepts] if isinstance(concepts, (str, NamedConcept)) else list(concepts)


def guardrail_firing(concepts: SparseConcepts, rules: Sequence[Guardrail]) -> torch.Tensor:
    """On which tokens the concept of each rule fires.

    Args:
        concepts ([`SparseConcepts`]): Of a batch.
        rules (`Sequence[Guardrail]`): R of them.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, R, sequence_length)`.
    """
    shape = (concepts.batch_size, concepts.sequence_length)
    firing = torch.zeros(len(rules), shape[0] * shape[1], dtype=torch.bool, device=concepts.features.device)
    for row, rail in zip(firing, rules, strict=True):
        for feature, threshold in zip(rail.concept.features, rail.concept.thresholds, strict=True):
            row[concepts.token_index[(concepts.features == feature) & (concepts.values >= threshold)]] = True
    return firing.view(len(rules), *shape).transpose(0, 1)


__all__ = ["Guardrail", "guardrail_firing", "guardrails_of"]
