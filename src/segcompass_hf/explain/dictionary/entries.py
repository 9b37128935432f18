# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Entries of a concept dictionary, and the examples that they show."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from ...token_places import Box
from .counts import DictionaryCounts, TopExamples
from .effects import ConceptEffect
from .labels import cofiring, firing_words, number
from .names import ConceptName
from .reading import RowReading

PICTURE_SIDE = 160  # pixels of the longer side
CONTEXT_WORDS = 6  # on each side of a word
_FORGET_EVERY = 256  # rows

# Numbers of an entry: of its label, and of its firing.
SCORES = ("purity", "f1_words", "f1_patches", "threshold_words", "threshold_patches")
MEASURES = ("density", "density_words", "density_patches", "mean_activation", "max_activation")

LabelPlace = Literal["words and patches", "words", "patches"]


@dataclass(frozen=True)
class WordExample:
    """A word that a feature fired on, with what stands around it."""

    word: str
    before: str
    after: str
    sample_id: str
    activation: float


@dataclass(frozen=True)
class PatchExample:
    """A patch that a feature fired on: pixels `(x0, y0, x1, y1)` of an image of `size` (width, height) pixels.

    `picture` is the place of the image in `ConceptDictionary.pictures`, -1 where it was not kept; `box` is `None` for
    a patch that shows padding only.
    """

    sample_id: str
    box: Box | None
    size: tuple[int, int]
    activation: float
    picture: int = -1


@dataclass(frozen=True)
class CoFiring:
    """A feature that fires on the same words and patches."""

    feature: int
    jaccard: float  # units of both over units of either
    information: float  # pointwise mutual information, bits
    label: str | None = None


@dataclass(frozen=True)
class ConceptEntry:
    """What is known of one feature. Scores are of held-out images; `None` where not defined.

    Args:
        feature (`int`): Its id.
        label (`str`, *optional*): Derived: the word that predicts its firing best.
        label_place (`str`, *optional*): Where that word predicts it: `words and patches`, `words` or `patches`.
        purity (`float`, *optional*): Share of its firings, on words and patches together, that are on the label.
        f1_words, f1_patches (`float`, *optional*): Of firing against the label, at `threshold_words` and
            `threshold_patches` (activations), which were chosen on the images that the label is derived from.
        cross_modal (`float`, *optional*): The smaller of the two: it fires on the word and on the region it names.
        density, density_words, density_patches (`float`): Share of all, of words and of patches that it fires on.
        mean_activation, max_activation (`float`): Where it fires.
        words (`list[tuple[str, float]]`): Words it fires on most, with their share of its firings on words.
        top_words, top_patches (`list`): Its strongest [`WordExample`] and [`PatchExample`], one of a row.
        cofiring (`list[CoFiring]`): By Jaccard index.
        names (`list[ConceptName]`): What tells best where it fires, a word or something else, best first.
        effect ([`ConceptEffect`], *optional*): What it does to masks, where that was measured.
        interpretation (`str`, *optional*): What a VLM says of the examples, see [`interpret`].
    """

    feature: int
    label: str | None = None
    label_place: LabelPlace | None = None
    purity: float | None = None
    f1_words: float | None = None
    f1_patches: float | None = None
    threshold_words: float | None = None
    threshold_patches: float | None = None
    cross_modal: float | None = None
    density: float = 0.0
    density_words: float = 0.0
    density_patches: float = 0.0
    mean_activation: float = 0.0
    max_activation: float = 0.0
    words: list[tuple[str, float]] = field(default_factory=list)
    top_words: list[WordExample] = field(default_factory=list, repr=False)
    top_patches: list[PatchExample] = field(default_factory=list, repr=False)
    cofiring: list[CoFiring] = field(default_factory=list, repr=False)
    names: list[ConceptName] = field(default_factory=list)
    effect: ConceptEffect | None = None
    interpretation: str | None = None


@dataclass
class _KeptRow:
    sample_id: str
    words: list[str]
    patches: list[Box | None]
    size: tuple[int, int]  # width, height
    picture: bytes | None


class ExampleStore:
    """Texts and small pictures of the rows that hold an example; the others are forgotten.

    Args:
        top_words, top_patches ([`TopExamples`]): Say which rows those are.
        with_pictures (`bool`): Keep pictures.
    """

    def __init__(self, top_words: TopExamples, top_patches: TopExamples, with_pictures: bool = True):
        self.top_words, self.top_patches, self.with_pictures = top_words, top_patches, with_pictures
        self.rows: dict[int, _KeptRow] = {}
        self._added = 0

    def add(self, reading: RowReading) -> None:
        """Keep a row, until it holds no example any more."""
        picture = _jpeg(reading.image) if self.with_pictures and reading.image is not None else None
        size = reading.image.size if reading.image is not None else (0, 0)
        self.rows[reading.index] = _KeptRow(reading.sample_id, reading.words, reading.patches, size, picture)
        self._added += 1
        if self._added % _FORGET_EVERY == 0:
            needed = self.top_words.rows() | self.top_patches.rows()
            self.rows = {index: row for index, row in self.rows.items() if index in needed}

    def pictures(self, limit: int) -> tuple[list[bytes], dict[int, int]]:
        """Pictures of the rows with the most examples of patches, and their places by row."""
        rows = self.top_patches.places[..., 0]
        uses = Counter(rows[rows >= 0].tolist())
        chosen = sorted(uses, key=lambda row: (-uses[row], row))
        chosen = [row for row in chosen if self.rows[row].picture is not None][:limit]
        return [self.rows[row].picture for row in chosen], {row: place for place, row in enumerate(chosen)}

    def word_examples(self, feature: int) -> list[WordExample]:
        """The strongest words of a feature."""
        examples = []
        for (index, unit), activation in self._of(self.top_words, feature):
            words = self.rows[index].words
            before = " ".join(words[max(0, unit - CONTEXT_WORDS) : unit])
            after = " ".join(words[unit + 1 : unit + 1 + CONTEXT_WORDS])
            examples.append(WordExample(words[unit], before, after, self.rows[index].sample_id, activation))
        return examples

    def patch_examples(self, feature: int, picture_of: dict[int, int]) -> list[PatchExample]:
        """The strongest patches of a feature."""
        return [
            PatchExample(
                self.rows[index].sample_id,
                self.rows[index].patches[unit],
                self.rows[index].size,
                activation,
                picture_of.get(index, -1),
            )
            for (index, unit), activation in self._of(self.top_patches, feature)
        ]

    def _of(self, top: TopExamples, feature: int) -> list[tuple[tuple[int, int], float]]:
        found = zip(top.places[feature].tolist(), top.values[feature].tolist(), strict=True)
        return [((row, unit), value) for (row, unit), value in found if row >= 0]


def label_place(derived_f1_words: float, derived_f1_patches: float) -> LabelPlace:
    """Where a label holds: on both where the smaller F1 is at least half of the larger."""
    smaller, larger = sorted((derived_f1_words, derived_f1_patches))
    if smaller >= 0.5 * larger:
        return "words and patches"
    return "words" if derived_f1_words == larger else "patches"


def _jpeg(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def make_entries(
    counts: DictionaryCounts,
    examples: ExampleStore,
    labels: dict[str, np.ndarray],
    names: list[list[ConceptName]],
    max_pictures: int,
) -> tuple[list[ConceptEntry], list[bytes]]:
    """Entries of all features, and the pictures that their patches count in.

    Args:
        counts ([`DictionaryCounts`]): Of all rows.
        examples ([`ExampleStore`]): Of the same rows.
        labels (`dict`): See `derive_labels`.
        names (`list`): See `derive_names`.
        max_pictures (`int`): Keep so many at most.
    """
    properties = list(counts.vocabulary)
    label_of = [properties[word].text if word >= 0 else None for word in labels["label"].tolist()]
    words = firing_words(counts)
    others, jaccard, information = cofiring(counts)
    pictures, picture_of = examples.pictures(max_pictures)
    fired = counts.density.sum(0)
    densities = [fired / max(sum(counts.units), 1), *(counts.density / np.maximum(counts.units, 1)[:, None])]
    entries = []
    for feature in range(counts.d_sae):
        scores = {name: number(labels[name][feature]) for name in SCORES}
        derived = [number(labels[f"derived_f1_{modality}"][feature]) for modality in ("words", "patches")]
        both = scores["f1_words"], scores["f1_patches"]
        entries.append(
            ConceptEntry(
                feature,
                label_of[feature],
                label_place(*derived) if label_of[feature] is not None else None,
                **scores,
                cross_modal=min(both) if None not in both else None,
                density=number(densities[0][feature]),
                density_words=number(densities[1][feature]),
                density_patches=number(densities[2][feature]),
                mean_activation=number(counts.sums[feature] / max(fired[feature], 1)),
                max_activation=float(counts.largest[feature]),
                words=[(word, number(share)) for word, share in words[feature]],
                top_words=examples.word_examples(feature),
                top_patches=examples.patch_examples(feature, picture_of),
                cofiring=[
                    CoFiring(other, float(jaccard[feature, rank]), float(information[feature, rank]), label_of[other])
                    for rank, other in enumerate(others[feature].tolist())
                    if other >= 0
                ],
                names=names[feature],
            )
        )
    return entries, pictures


def columns_of(entries: Sequence[ConceptEntry]) -> dict[str, list]:
    """Entries as the columns of a table, of plain values."""
    names = ("feature", "label", "label_place", *SCORES, "cross_modal", *MEASURES)
    columns = {name: [getattr(entry, name) for entry in entries] for name in names}
    columns["words"] = [[{"word": word, "share": share} for word, share in entry.words] for entry in entries]
    for name in ("top_words", "top_patches", "cofiring", "names"):
        columns[name] = [[asdict(example) for example in getattr(entry, name)] for entry in entries]
    columns["effect"] = [None if entry.effect is None else asdict(entry.effect) for entry in entries]
    columns["interpretation"] = [entry.interpretation for entry in entries]
    return columns


class StoredEntries(Sequence):
    """Entries of a stored table, each made when it is asked for: SAEs of large models have tens of thousands.

    Args:
        table (`pyarrow.Table`): Of the columns of [`columns_of`].
    """

    def __init__(self, table: Any):
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, feature: int) -> ConceptEntry:
        return _read_entry(self.table.slice(range(len(self))[feature], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[ConceptEntry]:
        return map(_read_entry, self.table.to_pylist())

    def column(self, name: str) -> list:
        """One plain value per feature; `None` of a column that an older file does not have."""
        return self.table.column(name).to_pylist() if name in self.table.column_names else [None] * len(self)


def _read_entry(row: dict[str, Any]) -> ConceptEntry:
    patches = [
        PatchExample(**(patch | {"box": patch["box"] and tuple(patch["box"]), "size": tuple(patch["size"])}))
        for patch in row["top_patches"]
    ]
    read = {
        "words": [(word["word"], word["share"]) for word in row["words"]],
        "top_words": [WordExample(**word) for word in row["top_words"]],
        "top_patches": patches,
        "cofiring": [CoFiring(**other) for other in row["cofiring"]],
        "names": [ConceptName(**name) for name in row.get("names") or []],
        "effect": ConceptEffect(**row["effect"]) if row.get("effect") else None,
    }
    return ConceptEntry(**(row | read))


__all__ = ["CoFiring", "ConceptEntry", "ExampleStore", "PatchExample", "StoredEntries", "WordExample", "columns_of"]
