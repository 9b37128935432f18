# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of concepts: of all that can be said of words and patches, what tells best where a concept fires.

A label is a single word. A name may also be a place, a role, a position in the text, the background and so on, see
[`Property`]. It is chosen on one half of the images and measured on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .counts import DictionaryCounts, threshold_of
from .labels import MIN_HITS, MIN_PRECISION, FiringRates, best_thresholds, number
from .properties import Family

Scope = Literal["words and patches", "words", "patches"]
SCOPES: tuple[Scope, ...] = ("words and patches", "words", "patches")

HOLDS = 0.8  # F1 or purity on held-out images from which a name holds
TELLING_CHANCE = 0.2  # purity tells something of a property that fewer of all units have
BETAS = (1.0, 0.5)  # thresholds where F1 is best, and where being right counts twice as much as being complete
NAMES_KEPT = 3  # per feature, of different families
# By how much of F1 a name of each family must be better than a word: what a reader takes in at once comes first.
HANDICAP: dict[Family, float] = {
    "word": 0.0,
    "role": 0.0,
    "pair": 0.03,
    "place": 0.03,
    "surface": 0.03,
    "after": 0.06,
    "position": 0.06,
    "instruction": 0.1,
}


@dataclass(frozen=True)
class ConceptName:
    """What a concept fires on, and how well that is known; scores are of held-out images.

    Args:
        text (`str`): As it reads: `red`, `red square`, `answer 1`, `place e4`.
        family (`str`): What kind of statement it is, see [`Property`].
        scope (`str`): Where it is said of: `words and patches`, `words` or `patches`.
        f1 (`float`, *optional*): Of firing against the property, in that scope; `None` where it does not occur.
        purity (`float`, *optional*): Share of all firings at the thresholds, on words and on patches, that are on it.
        chance (`float`, *optional*): Share of all words and patches that have the property: the purity of firing at
            random.
        threshold_words, threshold_patches (`float`): Activations from which the concept counts as firing.
    """

    text: str
    family: Family
    scope: Scope
    f1: float | None
    purity: float | None
    chance: float | None
    threshold_words: float | None
    threshold_patches: float | None

    @property
    def holds(self) -> bool:
        """Whether it does on held-out images: F1 of 0.8 or more and right more often than not, or purity of 0.8 or
        more of a property that at most a fifth of all units have."""
        f1, purity = self.f1 or 0.0, self.purity or 0.0
        return (f1 >= HOLDS and purity >= MIN_PRECISION) or (
            purity >= HOLDS and (self.chance or 0.0) <= TELLING_CHANCE
        )


def best_name(names: Sequence[ConceptName | dict[str, Any]] | None) -> ConceptName | None:
    """The first of a feature's names if it holds, of an entry or as they are stored.

    The second or third is not taken where it happens to hold instead: it would have been chosen on held-out images.
    """
    first = names[0] if names else None
    name = ConceptName(**first) if isinstance(first, dict) else first
    return name if name is not None and name.holds else None


def derive_names(counts: DictionaryCounts) -> list[list[ConceptName]]:
    """Up to three names of every feature, best first; none where nothing tells where it fires.

    For a property p and a feature j, F1 of "j fires" against p is taken on words, on patches and on both together; the
    scope is where that makes the best name. A scope of words (or patches) has one threshold, the best of F1 there, so
    that firings on patches (or words) from it on count against purity; both together have the best one of each. Of the
    properties with at least half of j's firings, those come first that hold on the first half of the images (see
    [`ConceptName.holds`]) by F1, then those that hold by purity alone, then the others; a family's handicap is taken
    off F1.

    Returns:
        `list[list[ConceptName]]`: of every feature.
    """
    derive, score = ([FiringRates(firing[half]) for firing in (counts.words, counts.patches)] for half in (0, 1))
    tried_bins = []
    for beta in BETAS:
        pairs, _, bins = best_thresholds(derive, beta)
        tried_bins += [bins, bins[[0, 0]], bins[[1, 1]]]  # as SCOPES, each (2, pairs)
    properties, features = pairs // counts.d_sae, pairs % counts.d_sae
    known = list(counts.vocabulary)
    handicap = np.array([HANDICAP[property_.family] for property_ in known] or [0.0])[properties]
    tried = [
        _measure(derive, properties, features, bins, place % len(SCOPES)) for place, bins in enumerate(tried_bins)
    ]
    ranks = np.stack([_rank(measured, handicap) for measured in tried])  # (tried, pairs)
    rank, best = ranks.max(0), ranks.argmax(0)
    order = np.lexsort((properties, -rank, features))
    order = order[rank[order] > 0]
    properties, features, best = properties[order], features[order], best[order]
    bins, scopes = np.stack(tried_bins, axis=1)[:, best, order], best % len(SCOPES)  # (2, names), (names,)
    held_out = _measure(score, properties, features, bins, scopes)
    names: list[list[ConceptName]] = [[] for _ in range(counts.d_sae)]
    for place, feature in enumerate(features.tolist()):
        property_ = known[properties[place]]
        if len(names[feature]) < NAMES_KEPT and all(name.family != property_.family for name in names[feature]):
            thresholds = threshold_of(bins[:, place]).astype(np.float32).tolist()
            numbers = [number(column[place]) for column in (held_out.f1, held_out.purity, held_out.chance)]
            scope = SCOPES[scopes[place]]
            names[feature].append(ConceptName(property_.text, property_.family, scope, *numbers, *thresholds))
    return names


class _Measured(NamedTuple):
    f1: np.ndarray  # in the scope; NaN where the property does not occur there
    purity: np.ndarray
    chance: np.ndarray
    hits: np.ndarray


def _measure(
    rates: list[FiringRates], properties: np.ndarray, features: np.ndarray, bins: np.ndarray, scopes: np.ndarray | int
) -> _Measured:
    """Scores of (property, feature) pairs in places of `SCOPES`; `bins` are `(2, pairs)`."""
    words, patches = (one.at(properties, features, own) for one, own in zip(rates, bins, strict=True))
    both = words + patches
    f1 = np.choose(scopes, [both.f1, words.f1, patches.f1])
    return _Measured(f1, both.precision, both.positives / max(sum(one.units for one in rates), 1), both.hits)


def _rank(measured: _Measured, handicap: np.ndarray) -> np.ndarray:
    """How good a name each pair makes, 0 for none: 2 and more where F1 holds, 1 and more where purity does."""
    f1, purity, chance = (np.nan_to_num(column) for column in measured[:3])
    own = np.clip(f1 - handicap, 1e-3, 1.0)
    rank = np.where((purity >= HOLDS) & (chance <= TELLING_CHANCE), 1 + own, own)
    rank = np.where(f1 >= HOLDS, 2 + own, rank)
    # Right more often than not, of a property that fewer than half of all units have, and at least half of the way
    # from chance to always.
    tells = (purity >= MIN_PRECISION) & (chance < 0.5) & (purity - chance >= 0.5 * (1 - chance))
    tells &= measured.hits >= MIN_HITS
    return np.where(tells, rank, 0.0)


__all__ = ["ConceptName", "best_name", "derive_names"]
