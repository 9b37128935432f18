# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Streaming counts of what every concept fires on, in bounded memory: nothing of size d_sae x d_sae or d_sae x words.

Activations are counted in bins of a fixed logarithmic grid, so that one pass over the data is enough to find the best
firing threshold of every concept.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from .properties import Family, Property, patch_properties, word_properties
from .reading import Active, RowReading

NUM_BINS = 128  # bin b holds activations from 2^((b - 64) / 4): four bins per doubling, 2^-16 to 2^16
_BIN_BITS = 7
MAX_PROPERTIES = 50_000  # distinct words that can become labels, and properties of each other family; the first seen
COFIRING_UNITS, COFIRING_FEATURES = 64, 24  # of a row the units, of a unit the strongest features that pairs are of


def bin_of(values: np.ndarray) -> np.ndarray:
    """Bins of activations above 0."""
    return np.clip(np.floor(4 * np.log2(values)).astype(np.int64) + 64, 0, NUM_BINS - 1)


def threshold_of(bins: np.ndarray) -> np.ndarray:
    """The smallest activation of each bin; 0 for bin 0, which holds all that is smaller too."""
    return np.where(bins > 0, 2.0 ** ((bins - 64) / 4), 0.0)


class PairCounts:
    """How often keys occurred, sorted by key; of too many, those of the rarest pairs are forgotten.

    A key is `pair * NUM_BINS + bin`.

    Args:
        max_entries (`int`): Kept at most, 16 bytes each.
        max_buffer (`int`): Keys that wait to be merged.
    """

    def __init__(self, max_entries: int = 4_000_000, max_buffer: int = 1_000_000):
        self.max_entries, self.max_buffer = max_entries, max_buffer
        self.forgotten = 0  # occurrences
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, keys: np.ndarray) -> None:
        """Count keys, each once per mention."""
        self._waiting.append(keys)
        self._num_waiting += len(keys)
        if self._num_waiting >= self.max_buffer:
            self._merge()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys, ascending, and their counts: int64 `(entries,)`."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys = np.concatenate([self._keys, *self._waiting])
        counts = np.concatenate([self._counts, np.ones(self._num_waiting, np.int64)])
        self._waiting, self._num_waiting = [], 0
        order = keys.argsort(kind="stable")
        keys, counts = keys[order], counts[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        self._keys = keys[starts]
        self._counts = np.add.reduceat(counts, starts) if len(starts) else counts
        if len(self._keys) > self.max_entries:
            self._forget()

    def _forget(self) -> None:
        """Keep the pairs that occurred most, half of the entries allowed."""
        pairs = self._keys >> _BIN_BITS
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        totals, sizes = np.add.reduceat(self._counts, starts), np.diff(starts, append=len(pairs))
        order = np.lexsort((pairs[starts], -totals))
        kept = np.zeros(len(starts), dtype=bool)
        kept[order[np.cumsum(sizes[order]) <= self.max_entries // 2]] = True
        keep = np.repeat(kept, sizes)
        self.forgotten += int(self._counts[~keep].sum())
        self._keys, self._counts = self._keys[keep], self._counts[keep]


class Firing:
    """Where concepts fired on the units of one modality (words or patches), of one half of the rows.

    `fires` counts all firings of a feature by bin, `hits` those on the units of a property, such as being a word.
    """

    def __init__(self, d_sae: int, max_entries: int):
        self.d_sae = d_sae
        self.units = 0
        self.positives: dict[int, int] = defaultdict(int)  # property -> units that have it
        self.fires = np.zeros((d_sae, NUM_BINS), np.int32)
        self.hits = PairCounts(max_entries)

    def add_units(self, active: Active, num_units: int) -> None:
        """Units of which it is known what they are."""
        self.units += num_units
        np.add.at(self.fires, (active.features, bin_of(active.values)), 1)

    def add_hits(self, properties: np.ndarray, units: np.ndarray, active: Active) -> None:
        """What the units are: arrays `(n,)` of properties and the unit that has each."""
        for property_, count in zip(*np.unique(properties, return_counts=True), strict=True):
            self.positives[int(property_)] += int(count)
        starts = np.searchsorted(active.units, units)
        sizes = np.searchsorted(active.units, units, side="right") - starts
        fired = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        pairs = np.repeat(properties, sizes) * self.d_sae + active.features[fired]
        self.hits.add((pairs << _BIN_BITS) | bin_of(active.values[fired]))


class TopExamples:
    """The strongest firings of every feature, at most one of a row; ties go to the row that came first."""

    def __init__(self, d_sae: int, top_k: int):
        self.values = np.zeros((d_sae, top_k), np.float32)
        self.places = np.full((d_sae, top_k, 2), -1, np.int32)  # row, unit

    def add(self, row: int, active: Active) -> None:
        order = np.lexsort((active.units, -active.values, active.features))
        features, first = np.unique(active.features[order], return_index=True)
        best = order[first]
        enters = active.values[best] > self.values[features, -1]
        features, best = features[enters], best[enters]
        values = np.concatenate([self.values[features], active.values[best, None]], axis=1)
        new = np.stack([np.full(len(best), row), active.units[best]], axis=1)[:, None]  # (features, 1, 2)
        places = np.concatenate([self.places[features], new.astype(np.int32)], axis=1)
        ranking = np.argsort(-values, axis=1, kind="stable")[:, : self.values.shape[1]]
        self.values[features] = np.take_along_axis(values, ranking, axis=1)
        self.places[features] = np.take_along_axis(places, ranking[..., None], axis=1)

    def rows(self) -> set[int]:
        """Rows that hold an example."""
        return set(np.unique(self.places[..., 0]).tolist()) - {-1}


class DictionaryCounts:
    """All counts of a dictionary; rows are split by image: half 0 for labels, half 1 to score them.

    Args:
        d_sae (`int`): Features.
        top_k (`int`): Examples per feature and modality.
        all_objects_named (`bool`): The named objects of a row are all there are, so that patches off them are of no
            word. Otherwise those patches are not counted: what they show is not known.
        max_entries (`int`): Bound of every sparse table, 16 bytes an entry.
    """

    def __init__(self, d_sae: int, top_k: int = 8, all_objects_named: bool = False, max_entries: int = 4_000_000):
        self.d_sae, self.all_objects_named = d_sae, all_objects_named
        self.vocabulary: dict[Property, int] = {}
        self._sizes: dict[Family, int] = defaultdict(int)
        self.words = [Firing(d_sae, max_entries) for _ in range(2)]
        self.patches = [Firing(d_sae, max_entries) for _ in range(2)]
        self.units, self.rows = [0, 0], [0, 0]  # of words and patches; of each half
        self.density = np.zeros((2, d_sae), np.int64)  # units of words and patches on which a feature fired
        self.sums, self.largest = np.zeros(d_sae), np.zeros(d_sae, np.float32)
        self.top_words, self.top_patches = TopExamples(d_sae, top_k), TopExamples(d_sae, top_k)
        self.pairs, self.singles = PairCounts(max_entries), np.zeros(d_sae, np.int64)
        self.sampled_units = 0

    @property
    def forgotten(self) -> int:
        """Occurrences of rare pairs that did not fit into the bound."""
        return self.pairs.forgotten + sum(firing.hits.forgotten for firing in (*self.words, *self.patches))

    def add(self, reading: RowReading, half: int | None = None) -> None:
        """Count one row.

        Args:
            reading ([`RowReading`]): The row.
            half (`int`, *optional*): 0 to derive labels from it, 1 to score them on it; by its image when left out.
        """
        half = half_of(reading.image_id) if half is None else half
        self.rows[half] += 1
        for modality, (active, units, top) in enumerate(
            (
                (reading.on_words, len(reading.words), self.top_words),
                (reading.on_patches, len(reading.patches), self.top_patches),
            )
        ):
            self.units[modality] += units
            self.density[modality] += np.bincount(active.features, minlength=self.d_sae)
            np.add.at(self.sums, active.features, active.values)
            np.maximum.at(self.largest, active.features, active.values)
            top.add(reading.index, active)
        self._add_words(reading, self.words[half])
        self._add_patches(reading, self.patches[half])
        self._add_pairs(reading)

    def _add_words(self, reading: RowReading, firing: Firing) -> None:
        firing.add_units(reading.on_words, len(reading.words))
        firing.add_hits(*self._of_units(word_properties(reading)), reading.on_words)

    def _add_patches(self, reading: RowReading, firing: Firing) -> None:
        active, known = reading.on_patches, np.ones(len(reading.patches), dtype=bool)
        if not self.all_objects_named:
            known = np.any([np.zeros_like(known), *(shown.patches for shown in reading.objects)], axis=0)
            active = Active(*(array[known[active.units]] for array in active))
        firing.add_units(active, int(known.sum()))
        properties, units = self._of_units(patch_properties(reading))
        firing.add_hits(properties[known[units]], units[known[units]], active)

    def _of_units(self, found: Iterable[tuple[Property, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of properties and the units that have them, one by one: arrays `(n,)`."""
        pairs = [(self._property_id(property_), units) for property_, units in found]
        pairs = [(number, units) for number, units in pairs if number >= 0]
        if not pairs:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.repeat([number for number, _ in pairs], [len(units) for _, units in pairs]), np.concatenate(
            [units for _, units in pairs]
        )

    def _add_pairs(self, reading: RowReading) -> None:
        """Features of the same unit, of units spread evenly over words and patches."""
        total = len(reading.words) + len(reading.patches)
        chosen = set(np.linspace(0, total - 1, min(COFIRING_UNITS, total)).round().astype(int).tolist())
        for active, shift in ((reading.on_words, 0), (reading.on_patches, len(reading.words))):
            starts = np.flatnonzero(np.diff(active.units, prepend=-1))
            for start, end in zip(starts, np.append(starts, len(active.units))[1:], strict=True):
                if active.units[start] + shift not in chosen:
                    continue
                strongest = np.argsort(-active.values[start:end], kind="stable")[:COFIRING_FEATURES]
                features = np.sort(active.features[start:end][strongest])
                self.singles[features] += 1
                first, second = np.triu_indices(len(features), 1)
                self.pairs.add((features[first] * self.d_sae + features[second]) << _BIN_BITS)
        self.sampled_units += len(chosen)

    def _property_id(self, property_: Property) -> int:
        if property_ not in self.vocabulary and self._sizes[property_.family] < MAX_PROPERTIES:
            self.vocabulary[property_] = len(self.vocabulary)
            self._sizes[property_.family] += 1
        return self.vocabulary.get(property_, -1)


def half_of(image_id: str) -> int:
    """0 for images that labels are derived from, 1 for those that score them; the same for every row of an image."""
    return zlib.crc32(image_id.encode()) & 1


__all__ = ["DictionaryCounts", "Firing", "PairCounts", "TopExamples", "bin_of", "half_of", "threshold_of"]
