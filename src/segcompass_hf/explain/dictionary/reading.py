# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of a data set -> what every concept fired on: words as a person reads them, and patches of the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ...data.collator import language_inputs
from ...images_segcompass import to_rgb_image
from ...patch_coverage_segcompass import PatchCoverage
from ...token_grids_segcompass import UnknownPlacesError
from ...token_kinds import TokenKind, token_kinds
from ...token_places import Box, patch_boxes
from ...training.sae.activations import layer_states
from .objects import NamedObject, NamedObjects, normalize_word

logger = logging.get_logger(__name__)

MIN_COVERAGE = 0.05  # of an object's best patch: below it, no patch shows the object
_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*|[^\w\s]")  # a word, or one mark of punctuation
_NOT_FOR_THE_VLM = ("completion_mask", "labels")


class Active(NamedTuple):
    """Which feature fired on which unit (word or patch) and how strongly: arrays `(num_active,)`, sorted by unit."""

    units: np.ndarray
    features: np.ndarray
    values: np.ndarray


class ShownObject(NamedTuple):
    """An object of a row as its patches show it.

    Args:
        words (`tuple[str, ...]`): Normalised words that name it.
        patches (`np.ndarray` of shape `(num_patches,)`): bool; those it covers at least half as much as the patch it
            covers most.
        roles (`tuple[str, ...]`): What it is to the instruction: `answer`, `ruled out`, `anchor`.
        middle (`tuple[float, float]`, *optional*): x and y of its mask's middle, in [0, 1] of the image's sides.
    """

    words: tuple[str, ...]
    patches: np.ndarray
    roles: tuple[str, ...] = ()
    middle: tuple[float, float] | None = None


@dataclass
class RowReading:
    """One row as the concepts saw it.

    Args:
        index (`int`): Which row.
        sample_id, image_id (`str`): Of the row.
        words (`list[str]`): Words and punctuation of the whole text, and control tokens, each as it is written.
        patches (`list[Box | None]`): Pixels `(x0, y0, x1, y1)` of every image token.
        on_words, on_patches ([`Active`]): Concepts; of a word its strongest token counts.
        objects (`list[ShownObject]`): Those that the row names and its patches show.
        image (`PIL.Image.Image`): RGB.
        parts (`list[str]`): Of every word what part of the text it stands in, see [`TokenKind`].
        covered (`np.ndarray` of shape `(num_patches,)`, *optional*): Share of every patch that the objects cover.
        kind (`str`, *optional*): Of the row.
    """

    index: int
    sample_id: str
    image_id: str
    words: list[str]
    patches: list[Box | None]
    on_words: Active
    on_patches: Active
    objects: list[ShownObject]
    image: Image.Image | None = None
    parts: list[TokenKind] = field(default_factory=list)
    covered: np.ndarray | None = None
    kind: str | None = None


@dataclass
class ConceptReader:
    """Reads rows with a model.

    Args:
        model (`SegCompassForReasoningSegmentation`): Its VLM up to the SAE's layer, and its SAE, are run.
        processor (`SegCompassProcessor`): Of the model.
        named_objects (`Callable`): See [`NamedObjects`].
        use_reference_reasoning (`bool`): Read the rows' own `reasoning` (none where a row has none), or what the model
            writes.
    """

    model: Any
    processor: Any
    named_objects: NamedObjects
    use_reference_reasoning: bool = True

    def __post_init__(self):
        tokenizer, model = self.processor.tokenizer, self.model
        self._control = {*tokenizer.all_special_ids, self.processor.ref_token_id}
        self._control |= {self.processor.think_start_token_id, self.processor.think_end_token_id}
        self._boxes: dict[tuple, list[Box | None]] = {}
        self._coverage: PatchCoverage | None = None
        try:
            self._coverage = PatchCoverage(self.processor)
        except UnknownPlacesError as error:
            logger.warning(
                "%s The dictionary is made without them: labels from words alone, and examples of patches without "
                "their place.",
                error,
            )
        if not self.use_reference_reasoning and model.config.concept_input != "once":
            raise ValueError(
                f'use_reference_reasoning=False needs a model with concept_input="once", this one has '
                f"{model.config.concept_input!r}; read reference reasoning instead."
            )

    @property
    def places_known(self) -> bool:
        """Whether image tokens have places in the picture, so that objects and patches can be told to belong."""
        return self._coverage is not None

    @torch.no_grad()
    def read(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[RowReading]:
        """Read a batch of rows with their indices.

        Raises:
            ValueError: an image or mask of a row cannot be read; the message names the sample.
        """
        images = [to_rgb_image(row["image"], f"the image of sample {_name(i, row)!r}") for i, row in rows]
        ids, mask, written, concepts = self._encode(rows, images)
        is_image = self.model.modality_ids(ids).bool() & mask.bool()
        features, values = concepts.features.cpu().numpy(), concepts.values.float().cpu().numpy()
        tokens = concepts.token_index.cpu().numpy()
        length = ids.shape[1]
        starts = np.searchsorted(tokens, np.arange(len(rows) + 1) * length)
        for place, (index, row) in enumerate(rows):
            inside = slice(starts[place], starts[place + 1])
            active = Active(tokens[inside] - place * length, features[inside], values[inside])
            words, word_of = self._words(ids[place].tolist(), mask[place].tolist(), is_image[place].tolist())
            patch_of = np.full(length, -1)
            positions = is_image[place].nonzero()[:, 0].cpu().numpy()
            patch_of[positions] = np.arange(len(positions))
            image = images[place]
            try:
                objects, covered = self._objects(row, (image.height, image.width), len(positions))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"sample {_name(index, row)!r}: {error!s:.300}") from error
            yield RowReading(
                index=index,
                sample_id=_name(index, row),
                image_id=str(row.get("image_id") or _name(index, row)),
                words=words,
                patches=self._patch_boxes(image, len(positions)),
                on_words=_strongest(active, word_of),
                on_patches=_strongest(active, patch_of),
                objects=objects,
                image=image,
                parts=self._parts((ids, mask, written), place, row["instruction"], word_of, len(words)),
                covered=covered,
                kind=row.get("kind"),
            )

    def _parts(self, encoded: tuple, place: int, instruction: str, word_of: np.ndarray, count: int) -> list[TokenKind]:
        """Which part of the text every word is of, by its first token; empty for slow tokenizers."""
        output = SimpleNamespace(**dict(zip(("sequences", "attention_mask", "completion_mask"), encoded, strict=True)))
        if not getattr(self.processor.tokenizer, "is_fast", False):
            return []
        kinds = token_kinds(self.processor, output, instruction, place).kinds
        first = np.unique(word_of, return_index=True)[1][-count:] if count else []
        return [kinds[position] for position in first]

    def _encode(self, rows: Sequence[tuple[int, dict[str, Any]]], images: list) -> tuple:
        """Ids, attention mask and completion mask `(rows, length)`, and the sparse concepts of the tokens."""
        instructions = [row["instruction"] for _, row in rows]
        model = self.model
        if not self.use_reference_reasoning:
            inputs = self.processor(images=images, instruction=instructions).to(model.device)
            written = model.segment(**inputs, output_concepts=True)
            return written.sequences, written.attention_mask, written.completion_mask, written.concepts
        reasonings = [row.get("reasoning") or "" for _, row in rows]
        batch = language_inputs(self.processor, images, instructions, reasonings)
        inputs = {name: value.to(model.device) for name, value in batch.items() if name not in _NOT_FOR_THE_VLM}
        states = layer_states(model.vlm, model.config.sae_layer, inputs)
        modality_ids = model.modality_ids(inputs["input_ids"])
        concepts = model.encode_concepts(states, inputs["attention_mask"], modality_ids)
        return inputs["input_ids"], inputs["attention_mask"], batch["completion_mask"], concepts

    def _words(self, ids: list[int], present: list[int], is_image: list[bool]) -> tuple[list[str], np.ndarray]:
        """The words of a sequence, and which word every token is of: `(length,)`, -1 for none."""
        words: list[str] = []
        word_of = np.full(len(ids), -1)
        run: list[int] = []
        for position in range(len(ids) + 1):
            ends = position == len(ids)
            plain = not ends and present[position] and not is_image[position] and ids[position] not in self._control
            if plain:
                run.append(position)
                continue
            self._words_of_run(ids, run, words, word_of)
            run = []
            if not ends and present[position] and not is_image[position]:
                word_of[position] = len(words)
                words.append(str(self.processor.tokenizer.convert_ids_to_tokens(ids[position])))
        return words, word_of

    def _words_of_run(self, ids: list[int], run: list[int], words: list[str], word_of: np.ndarray) -> None:
        """Words of neighbouring tokens at the positions `run`; a token of several words counts for the first."""
        text, spans = "", []
        for count in range(1, len(run) + 1):
            longer = self.processor.tokenizer.decode([ids[position] for position in run[:count]])
            spans.append((_common_length(text, longer), len(longer)))
            text = longer
        found = [(match.start(), match.end(), match[0]) for match in _WORD.finditer(text)]
        place = 0
        for position, (start, end) in zip(run, spans, strict=True):
            while place < len(found) and found[place][1] <= start:
                place += 1
            if place < len(found) and found[place][0] < end:
                word_of[position] = len(words) + place
        words.extend(word for _, _, word in found)

    def _objects(
        self, row: dict[str, Any], size: tuple[int, int], num_patches: int
    ) -> tuple[list[ShownObject], np.ndarray | None]:
        """The objects that a row names, and the share `(num_patches,)` of every patch that they cover together."""
        if not num_patches or not self.places_known:
            return [], None
        objects, everything = [], np.zeros(size, dtype=bool)
        for named in self.named_objects(row):
            words, mask, *_ = named = NamedObject(*named)
            if mask.shape != size:
                raise ValueError(f"{' '.join(words)!r} has a mask of {mask.shape} pixels, the image has {size}.")
            everything |= mask
            coverage = self._coverage(mask[None], num_patches)[0].numpy()
            if coverage.max() >= MIN_COVERAGE:
                own = tuple(dict.fromkeys(map(normalize_word, words)))
                y, x = ((places.mean() + 0.5) / side for places, side in zip(mask.nonzero(), size, strict=True))
                objects.append(ShownObject(own, coverage >= 0.5 * coverage.max(), named.roles, (x, y)))
        return objects, self._coverage(everything[None], num_patches)[0].numpy()

    def _patch_boxes(self, image: Image.Image, num_patches: int) -> list[Box | None]:
        key = (image.size, num_patches)
        if key not in self._boxes:
            if len(self._boxes) > 256:  # a data set of many image sizes
                self._boxes.clear()
            size = (image.height, image.width)
            self._boxes[key] = [None] * num_patches
            if num_patches and self.places_known:
                self._boxes[key] = patch_boxes(self.processor, size, num_patches)
        return self._boxes[key]


def _name(index: int, row: dict[str, Any]) -> str:
    return str(row.get("sample_id") or index)


def _common_length(first: str, second: str) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def _strongest(active: Active, unit_of: np.ndarray) -> Active:
    """Concepts per unit: of several tokens of a unit the largest activation; tokens of no unit are left out."""
    units = unit_of[active.units]
    keep = units >= 0
    units, features, values = units[keep], active.features[keep], active.values[keep]
    order = np.lexsort((-values, features, units))
    units, features, values = units[order], features[order], values[order]
    first = np.ones(len(units), dtype=bool)
    first[1:] = (units[1:] != units[:-1]) | (features[1:] != features[:-1])
    return Active(units[first], features[first], values[first])


__all__ = ["Active", "ConceptReader", "RowReading", "ShownObject"]
