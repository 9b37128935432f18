# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Where tokens lie: which pixels an image token shows, where a word stands, which words mean an object."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .patch_coverage_segcompass import picture_as_seen, unknown_layout

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, ends not included

# Function words and words of asking: they mean no object.
_NO_CONTENT = frozenset(
    "a an the this that these those it its they them all every each any one some of to in on at by from for with "
    "without and or not but is are was be been which who what where there here i we you me us my your please can "
    "could would show find segment point mark select outline locate give tell pick highlight image picture scene "
    "photo".split()
)


def instruction_words(row: dict[str, Any]) -> list[str]:
    """The content words of a row's instruction: all but function words and words of asking.

    Example:

    ```python
    >>> instruction_words({"instruction": "show me the second red square from the left"})
    ['second', 'red', 'square', 'left']
    ```
    """
    words = re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", row["instruction"])
    return [word for word in words if word.lower() not in _NO_CONTENT]


def word_occurrences(tokenizer: Any, tokens: list[int], word: str) -> list[tuple[int, int]]:
    """(start, length) of a word among token ids, written with or without a space before it."""
    found, spellings = set(), tokenizer([f" {word}", word], add_special_tokens=False)["input_ids"]
    for pattern in spellings if spellings[0] != spellings[1] else spellings[:1]:
        length = len(pattern)
        for start in range(len(tokens) - length + 1):
            if length and tokens[start] == pattern[0] and tokens[start : start + length] == pattern:
                found.add((start, length))
    return sorted(found)


def patch_boxes(processor: Any, image_size: tuple[int, int], num_patches: int) -> list[Box | None]:
    """Which pixels of the original image each image token shows, whatever the VLM's processor does to an image.

    Pictures that hold their own coordinates go through the processor (nearest neighbour), so resizing, cropping,
    padding and the order of tokens are the family's own; half a resized pixel is added at each side.

    Args:
        processor (`SegCompassProcessor`): Or a VLM's own.
        image_size (`tuple[int, int]`): (height, width) of the image in pixels.
        num_patches (`int`): Image tokens of the image.

    Returns:
        `list` of `(x0, y0, x1, y1)`: in the order of the tokens, ends not included; `None` for padding only.

    Raises:
        UnknownPlacesError: the processor cuts the image into tokens in a way that is not known here.
    """
    height, width = image_size
    columns = np.broadcast_to(np.arange(width), (height, width))
    rows = np.broadcast_to(np.arange(height)[:, None], (height, width))
    inside = _values_of_tokens(processor, np.full((height, width), 255), num_patches)
    sides = [_coordinates(processor, values, num_patches) for values in (columns, rows)]
    boxes: list[Box | None] = []
    for seen, x, y in zip(inside, *sides, strict=True):
        seen = seen == 255
        if not seen.any():
            boxes.append(None)
            continue
        (x0, x1), (y0, y1) = _extent(x[seen], width), _extent(y[seen], height)
        boxes.append((x0, y0, x1, y1))
    return boxes


def _coordinates(processor: Any, values: np.ndarray, num_patches: int) -> list[np.ndarray]:
    """What each token sees of `values` `(H, W)`, which may be larger than a pixel of 8 bits can hold."""
    low = _values_of_tokens(processor, values % 256, num_patches)
    if values.max() < 256:
        return low
    high = _values_of_tokens(processor, values // 256, num_patches)
    return [256 * most + least for most, least in zip(high, low, strict=True)]


def _values_of_tokens(processor: Any, values: np.ndarray, num_patches: int) -> list[np.ndarray]:
    """Pixel values 0..255 that each token sees of a grey picture `values` `(H, W)`; one flat array per token."""
    picture = Image.fromarray(values.astype(np.uint8)).convert("RGB")
    pixels = picture_as_seen(processor, picture, num_patches, Image.Resampling.NEAREST)["pixel_values"]
    seen = torch.round(pixels.float() * 255).int().numpy()
    merged = getattr(processor.image_processor, "merge_size", 1) ** 2  # the Qwens: so many in a row make a token
    if seen.ndim == 2 and len(seen) == num_patches * merged:
        return list(seen.reshape(num_patches, -1))
    if seen.ndim == 4 and len(seen) == 1:  # a grid, row by row
        grid = seen[0, 0]
        height, width = grid.shape
        rows = round(math.sqrt(num_patches * height / width))
        if rows and num_patches % rows == 0:
            cells = [np.array_split(line, num_patches // rows, axis=1) for line in np.array_split(grid, rows, axis=0)]
            return [cell.ravel() for line in cells for cell in line]
    raise unknown_layout(processor, pixels, num_patches)


def _extent(seen: np.ndarray, limit: int) -> tuple[int, int]:
    """First and last pixel (not included) along one side, of the coordinates that a patch was drawn from."""
    low, high = int(seen.min()), int(seen.max())
    steps = len(np.unique(seen)) - 1
    half = (high - low) / steps / 2 if steps else 0.5
    return max(0, round(low + 0.5 - half)), min(limit, round(high + 0.5 + half))


class Name(NamedTuple):
    """Words that mean objects of a row.

    Args:
        words (`str`): As they are spelled in the row's instruction or reasoning; every occurrence counts.
        objects (`tuple[int, ...]`): Places in `row["masks"]` followed by `row["distractor_masks"]`.
    """

    words: str
    objects: tuple[int, ...]


def target_names(row: dict[str, Any]) -> list[Name]:
    """Every content word of the instruction names all targets: what any referring data set knows."""
    targets = tuple(range(len(row["masks"])))
    return [Name(word, targets) for word in dict.fromkeys(instruction_words(row))] if targets else []
