# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of the objects of Scenes, read from the reference reasoning, which lists them all."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...token_places import Name
from ..schema import decode_mask


def listed_names(row: dict[str, Any]) -> list[Name]:
    """Names of the objects that a reasoning lists as Scenes does: `c6 large green cross no, e2 small red ring yes.`

    The i-th entry before the first period is object `i + 1` of `instance_ids`, its distractors the others in their
    order. Every word between the place and the verdict names all objects it is said of.
    """
    return _names(row, first=1)


def placed_names(row: dict[str, Any]) -> list[Name]:
    """[`listed_names`], and the place of every listed object: `c6` names the object at c6.

    With places the warm-up aligns their words with patches too, and learns to say them in half the steps.
    """
    return _names(row, first=0)


def _names(row: dict[str, Any], first: int) -> list[Name]:
    """Names by the words of every entry from the `first` to the one before the verdict."""
    entries = [entry.split()[first:-1] for entry in (row.get("reasoning") or "").split(".")[0].split(",")]
    ids = [*row["instance_ids"], *(i + 1 for i in range(len(entries)) if i + 1 not in row["instance_ids"])]
    objects: dict[str, list[int]] = {}
    for number, words in enumerate(entries, start=1):
        if number in ids:
            for word in words:
                objects.setdefault(word, []).append(ids.index(number))
    return [Name(word, tuple(sorted(found))) for word, found in objects.items()]


def scenes_objects(row: dict[str, Any]) -> list[tuple[list[str], np.ndarray, tuple[str, ...]]]:
    """Every object of a Scenes row by the words of its reference reasoning: place, size, colour and shape.

    The reasoning's first sentence lists all objects by instance id (`c6 large green cross no, ...`).
    Pass it with `all_objects_named=True`: what no mask covers is then known to be none of them.

    Returns:
        `list` of words, mask `(H, W)` and roles: `answer` for the targets, `ruled out` for the others, `anchor` and
        `candidate` by the verdict that the reasoning gives.

    Raises:
        ValueError: the row has no reasoning, or it lists another number of objects than the row has masks.
    """
    masks = [*row["masks"], *(row["distractor_masks"] or [])]
    listed = [part.split() for part in (row["reasoning"] or "").split(".")[0].split(",") if part.strip()]
    if len(listed) != len(masks):
        raise ValueError(
            f"sample {row.get('sample_id')!r} has {len(masks)} objects and its reasoning lists {len(listed)}; "
            "scenes_objects reads rows of Scenes with their reference reasoning (scenes.build without "
            "`without_reasoning`)."
        )
    targets = [number - 1 for number in row["instance_ids"]]
    order = targets + [place for place in range(len(masks)) if place not in targets]
    named = []
    for place, mask in zip(order, masks, strict=True):
        *words, verdict = listed[place][:5]
        roles = ["answer" if place in targets else "anchor" if verdict == "anchor" else "ruled out"]
        roles += ["candidate"] if verdict == "yes" else []
        named.append((words, decode_mask(mask), tuple(roles)))
    return named
