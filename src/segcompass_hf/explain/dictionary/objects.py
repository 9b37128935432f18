# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which words of a row name which region: what a concept dictionary learns its labels from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...data.schema import decode_mask


class NamedObject(NamedTuple):
    """An object that a row names.

    Args:
        words (`list[str]`): That name it.
        mask (`np.ndarray` of shape `(H, W)`): bool.
        roles (`tuple[str, ...]`): What it is to the instruction, in words: `answer` for those asked for; a data set
            that knows more says it (`ruled out`, `anchor`).
    """

    words: list[str]
    mask: np.ndarray
    roles: tuple[str, ...] = ()


# A row -> its named objects; plain pairs of words and mask do.
NamedObjects = Callable[[dict[str, Any]], list[NamedObject]]

_PLURALS = ("ches", "shes", "sses", "xes", "zes")


def normalize_word(word: str) -> str:
    """Lower case, English plurals as their singular; other languages and control tokens are left as they are.

    ```python
    >>> [normalize_word(word) for word in ("Circles", "crosses", "this", "c6")]
    ['circle', 'cross', 'this', 'c6']
    ```
    """
    if not word[:1].isalnum():
        return word
    word = word.lower()
    if len(word) > 3 and word.endswith(_PLURALS):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def target_objects(row: dict[str, Any]) -> list[NamedObject]:
    """The content words of the instruction name the union of the target's masks; nothing else is known.

    Works for every row with masks (RefCOCO and its like). A row without target names nothing. Words for other objects
    ("left of the red one") count too: nothing tells them apart.
    """
    from ...token_places import instruction_words

    if not row.get("masks"):
        return []
    masks = np.any([decode_mask(mask) for mask in row["masks"]], axis=0)
    return [NamedObject(instruction_words(row), masks, ("answer",))]


__all__ = ["NamedObject", "NamedObjects", "normalize_word", "target_objects"]
