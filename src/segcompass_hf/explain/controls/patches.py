# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Causal patches: which parts of the picture switch a concept off when painted over, beside where it fires.

A VLM's patches see each other, so where a concept fires need not be what made it fire. Blocks of patches are painted
over with the picture's mean colour, one at a time and several at once, and the concept's activation on all image
tokens is read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ...token_places import Box, patch_boxes

MAX_BLOCKS = 64  # painted over one at a time; finer grids are joined to squares
FIRING_SHARE = 0.8  # of a concept's activation; it fires on the fewest blocks that hold this much
BATCH_SIZE = 16  # pictures of one pass


@dataclass(frozen=True)
class PatchTest:
    """Where one concept fires, and what makes it.

    Args:
        feature (`int`): SAE feature id.
        blocks (`int`): Blocks of patches in the picture.
        firing (`int`): Blocks that it fires on.
        effect_inside (`float`): Of what single blocks take from it, the share of those that it fires on, in [0, 1].
        without_firing, without_causal, without_random (`float`): What is left of its activation, 1 being all, without
            the blocks it fires on, without as many that take most from it, and without as many others at random.
    """

    feature: int
    blocks: int
    firing: int
    effect_inside: float
    without_firing: float
    without_causal: float
    without_random: float


@torch.no_grad()
def causal_patches(
    model: Any, processor: Any, image: Image.Image, instruction: str, feature: int, seed: int = 0
) -> PatchTest | None:
    """Paint blocks of the picture over and see what becomes of a concept.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): In evaluation mode.
        processor ([`SegCompassProcessor`]): Its processor.
        image (`PIL.Image.Image`): RGB.
        instruction (`str`): What to look for.
        feature (`int`): SAE feature id.
        seed (`int`, defaults to 0): Of the blocks drawn at random.

    Returns:
        [`PatchTest`]; `None` where the concept fires on no image token.

    Raises:
        UnknownPlacesError: Where image tokens lie in the picture is not known for this family.
    """
    activations = _activations(model, processor, [image], instruction, feature)[0]  # (image tokens,)
    if not activations.sum() > 0:
        return None
    boxes = patch_boxes(processor, (image.height, image.width), len(activations))
    blocks = _blocks(boxes, image.size)
    where = np.array([activations[block].sum() for block in blocks])
    order = (-where).argsort(kind="stable")
    firing = order[: 1 + int(np.searchsorted(where[order].cumsum(), FIRING_SHARE * where.sum()))]
    left = _left(model, processor, image, instruction, feature, boxes, [[*block] for block in blocks])
    effects = np.clip(1 - left, 0, None)
    causal = (-effects).argsort(kind="stable")[: len(firing)]
    rest = np.setdiff1d(np.arange(len(blocks)), firing)
    random = np.random.default_rng(seed).permutation(rest)[: len(firing)]
    together = [sum((blocks[place] for place in places), []) for places in (firing, causal, random)]
    without = _left(model, processor, image, instruction, feature, boxes, together)
    inside = effects[firing].sum() / effects.sum() if effects.sum() > 0 else 0.0
    return PatchTest(feature, len(blocks), len(firing), float(inside), *without.tolist())


def _blocks(boxes: list[Box | None], size: tuple[int, int]) -> list[list[int]]:
    """Image tokens by block: each its own, or by the square of a grid its centre lies in; size (width, height)."""
    placed = {place: box for place, box in enumerate(boxes) if box is not None}
    if len(placed) <= MAX_BLOCKS:
        return [[place] for place in placed]
    side = int(MAX_BLOCKS**0.5)
    squares: dict[tuple[int, int], list[int]] = {}
    for place, (x0, y0, x1, y1) in placed.items():
        square = (int((y0 + y1) / 2 / size[1] * side), int((x0 + x1) / 2 / size[0] * side))
        squares.setdefault(square, []).append(place)
    return [squares[square] for square in sorted(squares)]


def _left(
    model: Any,
    processor: Any,
    image: Image.Image,
    instruction: str,
    feature: int,
    boxes: list[Box | None],
    painted: list[list[int]],
) -> np.ndarray:
    """What is left of a concept's activation, over what it was, when some image tokens' pixels are painted over."""
    pixels = np.asarray(image)
    mean = pixels.reshape(-1, pixels.shape[-1]).mean(0).round().astype(pixels.dtype)
    pictures = [image]
    for tokens in painted:
        changed = pixels.copy()
        for x0, y0, x1, y1 in (cast(Box, boxes[token]) for token in tokens):  # only tokens with a place are painted
            changed[y0:y1, x0:x1] = mean
        pictures.append(Image.fromarray(changed))
    sums = _activations(model, processor, pictures, instruction, feature).sum(1)
    return sums[1:] / sums[0]


def _activations(
    model: Any, processor: Any, pictures: list[Image.Image], instruction: str, feature: int
) -> np.ndarray:
    """Activation of a concept on the image tokens of each picture, `(pictures, image tokens)`; nothing is written."""
    found = []
    for start in range(0, len(pictures), BATCH_SIZE):
        inputs = processor(images=pictures[start : start + BATCH_SIZE], instruction=instruction, return_tensors="pt")
        inputs = {name: value for name, value in inputs.to(model.device).items() if name != "sam_pixel_values"}
        concepts = model(**inputs, slots_alone=True, output_concepts=True).concepts
        values = concepts.values * (concepts.features == feature)
        dense = values.new_zeros(inputs["input_ids"].numel()).index_add(0, concepts.token_index, values)
        is_image = model.modality_ids(inputs["input_ids"]).bool()
        shape = (len(is_image), int(is_image.sum()) // len(is_image))  # of one size, pictures have as many tokens each
        found.append(dense.view(is_image.shape)[is_image].view(shape).float().cpu().numpy())
    return np.concatenate(found)


__all__ = ["PatchTest", "causal_patches"]
