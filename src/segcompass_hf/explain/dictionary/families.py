# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Families of concepts: features of one name, shown as one concept with its members."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .names import ConceptName


@dataclass(frozen=True)
class ConceptFamily:
    """Features that are told by the same name.

    Args:
        name (`str`): Theirs.
        features (`tuple[int, ...]`): SAE feature ids, the one whose name has the largest F1 first.
    """

    name: str
    features: tuple[int, ...]


@dataclass(frozen=True)
class FamilyShare:
    """A family's part in one mask.

    Args:
        name (`str`, *optional*): `None` for a feature without a name, which stands alone.
        share, contribution (`float`): Sums over the members, see [`ConceptAttribution`].
        concepts (`tuple[ConceptAttribution, ...]`): The members, largest |contribution| first.
    """

    name: str | None
    share: float
    contribution: float
    concepts: tuple[Any, ...]


def families_of(names: Sequence[ConceptName | None]) -> list[ConceptFamily]:
    """Families of the features 0, 1, ... of these names; largest first, then by name."""
    members: dict[str, list[tuple[float, int]]] = {}
    for feature, name in enumerate(names):
        if name is not None:
            members.setdefault(name.text, []).append((-(name.f1 or 0.0), feature))
    families = [ConceptFamily(text, tuple(feature for _, feature in sorted(own))) for text, own in members.items()]
    return sorted(families, key=lambda family: (-len(family.features), family.name))


def group_concepts(concepts: Iterable[Any]) -> list[FamilyShare]:
    """The ranked concepts of a mask, those of one label as one, by |contribution| of the whole family.

    Args:
        concepts (`Iterable[ConceptAttribution]`): Of `MaskExplanation.concepts`.
    """
    members: dict[Any, list[Any]] = {}
    for concept in concepts:
        members.setdefault(("feature", concept.feature) if concept.label is None else concept.label, []).append(
            concept
        )
    found = []
    for own in members.values():
        own.sort(key=lambda concept: -abs(concept.contribution))
        sums = sum(concept.share for concept in own), sum(concept.contribution for concept in own)
        found.append(FamilyShare(own[0].label, *sums, tuple(own)))
    return sorted(found, key=lambda family: -abs(family.contribution))


__all__ = ["ConceptFamily", "FamilyShare", "families_of", "group_concepts"]
