# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which words of a row name which region: what a concept dictionary learns its labels from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...data.schema import decode_mask

# A row -> (words that name an object, its mask (H, W) bool), one pair per object.
NamedObjects = Callable[[dict[str, Any]], list[tuple[list[str], np.ndarray]]]

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


def target_objects(row: dict[str, Any]) -> list[tuple[list[str], np.ndarray]]:
    """The content words of the instruction name the union of the target's masks; nothing else is known.

    Works for every row with masks (RefCOCO and its like). A row without target names nothing. Words for other objects
    ("left of the red one") count too: nothing tells them apart.
    """
    from ...token_places import instruction_words

    if not row.get("masks"):
        return []
    return [(instruction_words(row), np.any([decode_mask(mask) for mask in row["masks"]], axis=0))]


__all__ = ["NamedObjects", "normalize_word", "target_objects"]
