# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What every token of an answer is: word of the question or the reasoning, image patch (and where), or neither."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

TokenKind = Literal["special", "question", "image", "reasoning", "reference"]
Box = tuple[int, int, int, int]

_MARK = "\u2603"  # stands for the instruction when the prompt is looked through


class TokenKinds(NamedTuple):
    """One entry per position of a sequence.

    Args:
        kinds (`list[str | None]`): `"image"`, `"question"` (the user's own words), `"reasoning"` (what the model wrote
            between the think tags), `"reference"` (`<REF_POS>` in the answer), `"special"` (control tokens, and the
            fixed words that the prompt puts around the question); `None` on padding.
        patches (`list[tuple[int, int, int, int] | None]`): `(x0, y0, x1, y1)` of image tokens, pixels of the original
            image, ends not included; `None` elsewhere, where the patch shows padding only, and without a size.
    """

    kinds: list[TokenKind | None]
    patches: list[Box | None]

    def positions(self, kind: TokenKind) -> list[int]:
        """Positions of a kind, in order."""
        return [position for position, found in enumerate(self.kinds) if found == kind]


def token_kinds(
    processor: Any, output: Any, instruction: str, row: int = 0, image_size: tuple[int, int] | None = None
) -> TokenKinds:
    """Tell the tokens of one row of `segment`'s output apart.

    Args:
        processor (`SegCompassProcessor`): That made the inputs.
        output (`SegCompassSegmentationOutput`): `sequences`, `attention_mask` and `completion_mask` are read.
        instruction (`str`): The row's.
        row (`int`, defaults to 0): Which row.
        image_size (`tuple[int, int]`, *optional*): (height, width) of the row's image in pixels, for `patches`.

    Returns:
        [`TokenKinds`], an entry per position of the sequence, padding included.

    Raises:
        ValueError: the sequence was not made from this instruction by this processor, the tokenizer knows no places in
            the text, or the image processor cuts images into tokens in a way that is not known here.
    """
    ids = output.sequences[row].tolist()
    present, written = output.attention_mask[row].bool().tolist(), output.completion_mask[row].bool().tolist()
    control = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    control |= {processor.think_start_token_id, processor.think_end_token_id, processor.end_of_turn_token_id}
    kinds: list[TokenKind | None] = [None] * len(ids)
    prompt = [position for position in range(len(ids)) if present[position] and not written[position]]
    for position, token in enumerate(ids):
        if not present[position]:
            continue
        if token == processor.image_token_id:
            kinds[position] = "image"
        elif not written[position] or token in control:
            kinds[position] = "special"
        else:
            kinds[position] = "reference" if token == processor.ref_token_id else "reasoning"
    for index in _question_places(processor, [ids[position] for position in prompt], instruction):
        kinds[prompt[index]] = "question"
    patches: list[Box | None] = [None] * len(ids)
    places = [position for position in prompt if kinds[position] == "image"]
    if image_size is not None and places:
        boxes = patch_boxes(processor.image_processor, image_size, len(places))
        for position, box in zip(places, boxes, strict=True):
            patches[position] = box
    return TokenKinds(kinds, patches)


def _question_places(processor: Any, ids: list[int], instruction: str) -> list[int]:
    """Which tokens of a prompt `ids` (image placeholders expanded) are words of the instruction."""
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens stand; load the fast tokenizer "
            "(use_fast=True)."
        )
    text = processor.build_prompt(instruction)
    around = processor.build_prompt(_MARK).split(_MARK)  # the texts around each mention of the instruction
    length = (len(text) - sum(map(len, around))) // (len(around) - 1)
    spans, start = [], 0
    for piece in around[:-1]:
        start += len(piece)
        spans.append((start, start + length))
        start += length
    has_start = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_start)
    bare = encoding["input_ids"]  # as the prompt, but with one placeholder for the image
    head, tail = _common_prefix(bare, ids), _common_prefix(bare[::-1], ids[::-1])
    places = []
    for index, (left, right) in enumerate(encoding["offset_mapping"]):
        if not any(left < end and begin < right for begin, end in spans):
            continue
        if index >= len(bare) - tail:
            places.append(index + len(ids) - len(bare))
        elif index < head:
            places.append(index)
        else:
            raise ValueError(
                f"the sequence does not hold the instruction {instruction!r} as this processor writes it; pass the "
                "instruction and the processor that its inputs were made with."
            )
    return places


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def patch_boxes(image_processor: Any, image_size: tuple[int, int], num_patches: int) -> list[Box | None]:
    """Which pixels of the original image each image token shows, whatever the image processor does to an image.

    Pictures that hold their own coordinates go through the processor (nearest neighbour), so resizing, cropping,
    padding and the order of tokens are the family's own; half a resized pixel is added at each side.

    Args:
        image_processor (`BaseImageProcessor`): The VLM's.
        image_size (`tuple[int, int]`): (height, width) of the image in pixels.
        num_patches (`int`): Image tokens of the image.

    Returns:
        `list` of `(x0, y0, x1, y1)`: in the order of the tokens, ends not included; `None` for padding only.

    Raises:
        ValueError: the processor cuts the image into tokens in a way that is not known here.
    """
    height, width = image_size
    columns = np.broadcast_to(np.arange(width), (height, width))
    rows = np.broadcast_to(np.arange(height)[:, None], (height, width))
    inside = _values_of_tokens(image_processor, np.full((height, width), 255), num_patches)
    sides = [_coordinates(image_processor, values, num_patches) for values in (columns, rows)]
    boxes: list[Box | None] = []
    for seen, x, y in zip(inside, *sides, strict=True):
        seen = seen == 255
        if not seen.any():
            boxes.append(None)
            continue
        (x0, x1), (y0, y1) = _extent(x[seen], width), _extent(y[seen], height)
        boxes.append((x0, y0, x1, y1))
    return boxes


def _coordinates(image_processor: Any, values: np.ndarray, num_patches: int) -> list[np.ndarray]:
    """What each token sees of `values` `(H, W)`, which may be larger than a pixel of 8 bits can hold."""
    low = _values_of_tokens(image_processor, values % 256, num_patches)
    if values.max() < 256:
        return low
    high = _values_of_tokens(image_processor, values // 256, num_patches)
    return [256 * most + least for most, least in zip(high, low, strict=True)]


def _values_of_tokens(image_processor: Any, values: np.ndarray, num_patches: int) -> list[np.ndarray]:
    """Pixel values 0..255 that each token sees of a grey picture `values` `(H, W)`; one flat array per token."""
    picture = Image.fromarray(values.astype(np.uint8)).convert("RGB")
    nearest = {"do_normalize": False, "resample": Image.Resampling.NEAREST, "return_tensors": "pt"}
    pixels = image_processor(images=picture, **nearest)["pixel_values"]
    seen = torch.round(pixels.float() * 255).int().numpy()
    merged = getattr(image_processor, "merge_size", 1) ** 2  # the Qwens: so many patches in a row make a token
    if seen.ndim == 2 and len(seen) == num_patches * merged:
        return list(seen.reshape(num_patches, -1))
    if seen.ndim == 4 and len(seen) == 1:  # a grid, row by row
        grid = seen[0, 0]
        height, width = grid.shape
        rows = round(math.sqrt(num_patches * height / width))
        if rows and num_patches % rows == 0:
            cells = [np.array_split(line, num_patches // rows, axis=1) for line in np.array_split(grid, rows, axis=0)]
            return [cell.ravel() for line in cells for cell in line]
    raise ValueError(
        f"{type(image_processor).__name__} makes pixel_values of shape {tuple(seen.shape)} for an image of "
        f"{num_patches} tokens, a layout whose places in the image are not known here."
    )


def _extent(seen: np.ndarray, limit: int) -> tuple[int, int]:
    """First and last pixel (not included) along one side, of the coordinates that a patch was drawn from."""
    low, high = int(seen.min()), int(seen.max())
    steps = len(np.unique(seen)) - 1
    half = (high - low) / steps / 2 if steps else 0.5
    return max(0, round(low + 0.5 - half)), min(limit, round(high + 0.5 + half))


__all__ = ["TokenKind", "TokenKinds", "patch_boxes", "token_kinds"]
