# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which tokens name an object and which image tokens show it, in rows of the row schema.

Words of the instruction and of the reasoning name objects whose masks a row holds, targets and distractors alike. So
every row gives pairs of a word and patches that mean the same, which is all that one concept space needs to be trained
and measured.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ...data.schema import decode_masks
from ...patch_coverage_segcompass import PatchCoverage
from ...token_places import Name, target_names, word_occurrences

MIN_COVERAGE = 0.5  # of a patch by an object that it shows; of small objects the patch that shows most


class NamePlaces(NamedTuple):
    """Where a name stands in a sequence, and what it names.

    Args:
        words (`str`): The name.
        occurrences (`list[list[int]]`): Places of the tokens of every occurrence.
        patches (`torch.LongTensor` of shape `(patches,)`): Places of the image tokens.
    """

    words: str
    occurrences: list[list[int]]
    patches: torch.Tensor


@dataclass
class TokenPairs:
    """Marks the tokens of names and the patches of what they name; `extra` of a [`SegmentationCollator`].

    Args:
        processor (`SegCompassProcessor`): Tokenizer and image processor.
        names (`Callable`, defaults to [`target_names`]): Row -> its [`Name`]s. For your own data write a function like
            [`listed_names`], or take the words of captions or class names.
    """

    processor: Any
    names: Callable[[dict[str, Any]], list[Name]] = target_names

    def __post_init__(self):
        self._coverage = PatchCoverage(self.processor)

    def __call__(self, rows: Sequence[dict[str, Any]], images: list, batch: Any) -> dict[str, torch.Tensor]:
        """Marks of a batch.

        Args:
            rows (`Sequence[dict]`): In the row schema.
            images (`list[PIL.Image.Image]`): Theirs.
            batch (`dict`): With `input_ids` and `attention_mask` `(batch_size, sequence_length)`.

        Returns:
            `dict` of tensors `(batch_size, sequence_length, num_names)`, `num_names` the most that a row of the batch
            has and at least 1: `pair_words` (bool, tokens of the name) and `pair_patches` (bool, image tokens that
            show what it names). A name that has only one of the two in a row has neither.
        """
        ids = batch["input_ids"]
        found = [list(self.places(*row)) for row in zip(rows, images, ids, batch["attention_mask"], strict=True)]
        width = max(1, *(len(names) for names in found))
        words = torch.zeros(*ids.shape, width, dtype=torch.bool)
        patches = torch.zeros_like(words)
        for index, names in enumerate(found):
            for column, places in enumerate(names):
                words[index, list(itertools.chain.from_iterable(places.occurrences)), column] = True
                patches[index, places.patches, column] = True
        return {"pair_words": words, "pair_patches": patches}

    def places(
        self, row: dict[str, Any], image: Any, ids: torch.Tensor, attention: torch.Tensor
    ) -> Iterator[NamePlaces]:
        """Where every name of one row stands that has both words and patches. Tensors `(sequence_length,)`."""
        ids = ids.cpu()
        image_places = (ids == self.processor.image_token_id).nonzero()[:, 0]
        names = self.names(row)
        if not len(image_places) or not names:
            return
        size = (image.height, image.width)
        masks = [decode_masks(row.get(column) or [], size) for column in ("masks", "distractor_masks")]
        masks = np.concatenate([mask.reshape(-1, *size) for mask in masks])
        shown = self._shown(masks, len(image_places))  # (objects, patches)
        text_places = attention.cpu().bool().nonzero()[:, 0]
        text_places = text_places[text_places > image_places[-1]].tolist()
        tokens = ids[text_places].tolist()
        own_words = f"{row['instruction']} {row.get('reasoning') or ''}"
        for name in names:
            occurrences = word_occurrences(self.processor.tokenizer, tokens, name.words)
            said = len(re.findall(rf"(?<!\w){re.escape(name.words)}(?!\w)", own_words, flags=re.IGNORECASE))
            patches = image_places[shown[list(name.objects)].any(0)]
            # More of them than the row says: the template has the word too, and which is which is not known.
            if occurrences and len(occurrences) <= said and len(patches):
                yield NamePlaces(name.words, [text_places[i : i + n] for i, n in occurrences], patches)

    def _shown(self, masks: np.ndarray, num_patches: int) -> torch.Tensor:
        """Which patches show which object, `(objects, num_patches)` bool."""
        coverage = self._coverage(masks, num_patches)
        most = coverage.amax(1, keepdim=True) if len(coverage) else coverage
        return (coverage >= MIN_COVERAGE) | ((coverage == most) & (coverage > 0))


__all__ = ["NamePlaces", "TokenPairs"]
