# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels of concepts: the word that best predicts where a concept fires, and how well it does on held-out images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counts import _BIN_BITS, NUM_BINS, DictionaryCounts, Firing, threshold_of

# In the half that labels are derived from:
MIN_POSITIVES = 5  # units of a word
MIN_HITS = 3  # of them on which a feature fires
MIN_PRECISION = 0.5  # a label is right more often than not
NUM_COFIRING = 5
MIN_TOGETHER = 3  # units that two features share before they count as co-firing


class _Suffixes:
    """Sums of a [`PairCounts`] from a bin upwards: how often a pair occurred at a threshold."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray):
        self.keys, self.pairs = keys, keys >> _BIN_BITS
        self._from_here = np.append(np.cumsum(counts[::-1])[::-1], 0)
        self.starts = np.flatnonzero(np.diff(self.pairs, prepend=-1))
        sizes = np.diff(self.starts, append=len(keys))
        self._end = np.repeat(self.starts + sizes, sizes)
        self.sums = self._from_here[:-1] - self._from_here[self._end]

    def at(self, pairs: np.ndarray, bins: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.keys, (pairs << _BIN_BITS) | bins)
        found = place < len(self.keys)
        found[found] = self.pairs[place[found]] == pairs[found]
        sums = np.zeros(len(pairs), np.int64)
        sums[found] = self.sums[place[found]]
        return sums


class FiringRates:
    """Hits, firings and units of words for one [`Firing`], at any threshold."""

    def __init__(self, firing: Firing):
        self.d_sae, self.units = firing.d_sae, firing.units
        self.hits = _Suffixes(*firing.hits.arrays())
        self.fires = np.cumsum(firing.fires[:, ::-1], axis=1, dtype=np.int32)[:, ::-1]  # (d_sae, NUM_BINS)
        self.positives = np.zeros(max(firing.positives, default=-1) + 1, np.int64)
        for word, count in firing.positives.items():
            self.positives[word] = count

    def at(self, words: np.ndarray, features: np.ndarray, bins: np.ndarray) -> Scores:
        """Counts of (word, feature) pairs at thresholds, given as bins."""
        pairs = words * self.d_sae + features
        positives = np.zeros(len(words), np.int64)
        known = words < len(self.positives)
        positives[known] = self.positives[words[known]]
        return Scores(self.hits.at(pairs, bins), self.fires[features, bins], positives)

    def best(self, beta: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every (word, feature) pair with a hit, `word * d_sae + feature`: F1 and bin where F-beta is largest.

        F-beta can peak only where a hit is: between two hits a higher threshold loses misses alone.

        Args:
            beta (`float`, defaults to 1.0): How much recall weighs against precision.
        """
        pairs, bins = self.hits.pairs, self.hits.keys & (NUM_BINS - 1)
        words = pairs // self.d_sae
        scores = self.at(words, pairs % self.d_sae, bins)
        f1, f_beta = scores.f1, scores.f_beta(beta)
        rare = self.positives[words] < MIN_POSITIVES
        f1[rare], f_beta[rare] = 0.0, 0.0
        order = np.lexsort((bins, -f_beta, pairs))  # of equal ones the lowest threshold
        first = order[np.flatnonzero(np.diff(pairs[order], prepend=-1))]
        return pairs[first], f1[first], bins[first]


@dataclass
class Scores:
    """Hits (fired on the word), firings and units of the word: arrays `(num_pairs,)`."""

    hits: np.ndarray
    fires: np.ndarray
    positives: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """`2 hits / (firings + units of the word)`; NaN where the word does not occur."""
        return self.f_beta(1.0)

    def f_beta(self, beta: float) -> np.ndarray:
        """`(1 + beta^2) hits / (firings + beta^2 units of the word)`; NaN where the word does not occur."""
        weight = beta**2
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (1 + weight) * self.hits / (self.fires + weight * self.positives)
            return np.where(self.positives > 0, found, np.nan)

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.hits + other.hits, self.fires + other.fires, self.positives + other.positives)

    @property
    def precision(self) -> np.ndarray:
        """`hits / firings`; NaN where nothing fired."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.fires > 0, self.hits / self.fires, np.nan)


def derive_labels(counts: DictionaryCounts) -> dict[str, np.ndarray]:
    """The label of every feature, from the first half of the images, and its scores on the second.

    For a word w and a feature j, F1 of "j fires" against "this is w" is taken on words (w as it is written) and on
    patches (of objects that w names), each at the threshold that is best on the first half. The label is the word of
    the largest mean of the two (0 where w names no object). It is given where at least half of j's firings there are
    on w: of words and patches together where all objects are named, else on average over the two, since a patch may
    show what its row does not say (which also makes F1 on patches and purity lower bounds).

    Returns:
        `dict` of arrays `(d_sae,)`: `label` (word id, -1 for none), `threshold_words`, `threshold_patches`
        (activations), `derived_f1_words`, `derived_f1_patches` (first half), and of the second half `purity` (share
        of firings on the word), `f1_words`, `f1_patches`, `any_f1_words`, `any_f1_patches` (whatever the activation);
        NaN where not defined.
    """
    derive = [FiringRates(firing[0]) for firing in (counts.words, counts.patches)]
    score = [FiringRates(firing[1]) for firing in (counts.words, counts.patches)]
    best = _best_words(counts, derive)
    features, words, bins = best["features"], best["words"], best["bins"]  # bins: (2, features)
    seen = [rates.at(words, features, b) for rates, b in zip(derive, bins, strict=True)]
    pooled = seen[0] + seen[1]
    precision = np.nan_to_num(pooled.precision)
    if not counts.all_objects_named:
        both = np.stack([modality.precision for modality in seen])
        fired = np.maximum((~np.isnan(both)).sum(0), 1)
        precision = np.nansum(both, axis=0) / fired
    kept = (precision >= MIN_PRECISION) & (pooled.hits >= MIN_HITS)
    features, words, bins = features[kept], words[kept], bins[:, kept]
    held_out = [rates.at(words, features, b) for rates, b in zip(score, bins, strict=True)]
    anything = [rates.at(words, features, np.zeros_like(words)) for rates in score]
    columns = {
        "threshold_words": threshold_of(bins[0]),
        "threshold_patches": threshold_of(bins[1]),
        "derived_f1_words": best["f1"][0, kept],
        "derived_f1_patches": best["f1"][1, kept],
        "purity": (held_out[0] + held_out[1]).precision,
        "f1_words": held_out[0].f1,
        "f1_patches": held_out[1].f1,
        "any_f1_words": anything[0].f1,
        "any_f1_patches": anything[1].f1,
    }
    labels = {name: np.full(counts.d_sae, np.nan) for name in columns}
    for name, column in columns.items():
        labels[name][features] = column
    labels["label"] = np.full(counts.d_sae, -1)
    labels["label"][features] = words
    return labels


def best_thresholds(derive: list[FiringRates], beta: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every (property, feature) pair with a hit, `property * d_sae + feature`: F1 on words and on patches, and the
    bins, where F-beta is largest, both `(2, pairs)`."""
    found = [rates.best(beta) for rates in derive]
    pairs = np.union1d(found[0][0], found[1][0])
    f1, bins = np.zeros((2, len(pairs))), np.full((2, len(pairs)), -1)
    for modality, (own, own_f1, own_bins) in enumerate(found):
        place = np.searchsorted(pairs, own)
        f1[modality, place], bins[modality, place] = own_f1, own_bins
    # Where a word was never hit in one modality, the other's threshold stands for both.
    return pairs, f1, np.where(bins < 0, bins[::-1], bins)


def _best_words(counts: DictionaryCounts, derive: list[FiringRates]) -> dict[str, np.ndarray]:
    """The best word of every feature that has one, with F1 and bins on words and on patches `(2, features)`."""
    pairs, f1, bins = best_thresholds(derive)
    is_word = np.array([property_.family == "word" for property_ in counts.vocabulary], bool)
    pairs, f1, bins = (array[..., is_word[pairs // counts.d_sae]] for array in (pairs, f1, bins))
    words, features = pairs // counts.d_sae, pairs % counts.d_sae
    order = np.lexsort((words, -f1.mean(0), features))
    first = order[np.flatnonzero(np.diff(features[order], prepend=-1))]
    first = first[f1[:, first].max(0) > 0]
    return {"features": features[first], "words": words[first], "f1": f1[:, first], "bins": bins[:, first]}


def firing_words(counts: DictionaryCounts, top: int = 5) -> list[list[tuple[str, float]]]:
    """Per feature the words it fires on most, with their share of its firings on words."""
    properties = list(counts.vocabulary)
    is_word = np.array([property_.family == "word" for property_ in properties], bool)
    hits = [firing.hits.arrays() for firing in counts.words]
    pairs, totals = (
        np.concatenate(parts) for parts in zip(*((keys >> _BIN_BITS, n) for keys, n in hits), strict=True)
    )
    pairs, totals = (array[is_word[pairs // counts.d_sae]] for array in (pairs, totals))
    pairs, place = np.unique(pairs, return_inverse=True)
    totals = np.bincount(place, weights=totals, minlength=len(pairs))
    words, features = pairs // counts.d_sae, pairs % counts.d_sae
    found: list[list[tuple[str, float]]] = [[] for _ in range(counts.d_sae)]
    for index in np.lexsort((words, -totals, features)):
        feature = features[index]
        if len(found[feature]) < top:
            found[feature].append((properties[words[index]].text, float(totals[index] / counts.density[0, feature])))
    return found


def cofiring(counts: DictionaryCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The features that fire together with each, by Jaccard index (units of both over units of either).

    Returns:
        `tuple` of arrays `(d_sae, 5)`: features (-1 for none), Jaccard index, and pointwise mutual information in
        bits, `log2(p(i, j) / (p(i) p(j)))`.
    """
    keys, together = counts.pairs.arrays()
    frequent = together >= MIN_TOGETHER
    pairs, together = (keys >> _BIN_BITS)[frequent], together[frequent]
    first = np.concatenate([pairs // counts.d_sae, pairs % counts.d_sae])
    second = np.concatenate([pairs % counts.d_sae, pairs // counts.d_sae])
    together = np.concatenate([together, together])
    jaccard = together / (counts.singles[first] + counts.singles[second] - together)
    order = np.lexsort((second, -jaccard, first))
    first, second, together, jaccard = first[order], second[order], together[order], jaccard[order]
    starts = np.flatnonzero(np.diff(first, prepend=-1))
    rank = np.arange(len(first)) - np.repeat(starts, np.diff(starts, append=len(first)))
    kept = rank < NUM_COFIRING
    place = first[kept], rank[kept]
    features = np.full((counts.d_sae, NUM_COFIRING), -1, np.int32)
    scores = np.full((2, counts.d_sae, NUM_COFIRING), np.nan, np.float32)
    features[place], scores[0][place] = second[kept], jaccard[kept]
    expected = counts.singles[first[kept]] * counts.singles[second[kept]] / max(counts.sampled_units, 1)
    scores[1][place] = np.log2(together[kept] / expected)
    return features, scores[0], scores[1]


def number(value: float) -> float | None:
    """A number in the precision it is stored with, `None` for NaN."""
    return None if np.isnan(value) else float(np.float32(value))


__all__ = ["FiringRates", "Scores", "cofiring", "derive_labels", "firing_words", "number"]
