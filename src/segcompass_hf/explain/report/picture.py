# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""An image with masks over it, for pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageFilter

PICTURE_SIDES = (640, 1024)  # pixels: smaller pictures are enlarged so that outlines are smooth, larger ones reduced


def paint(
    image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[str], before: Sequence[np.ndarray] = ()
) -> Image.Image:
    """Draw masks over an image.

    Args:
        image (`PIL.Image.Image`): RGB.
        masks (list of `np.ndarray` of shape `(H, W)`): bool, tinted and outlined; the rest of the image steps back.
        colours (`list[str]`): Of the masks, `#RRGGBB`.
        before (list of `np.ndarray` of shape `(H, W)`, *optional*): bool; what the masks were, as a thin white line.

    Returns:
        `PIL.Image.Image`: RGB, its longer side within `PICTURE_SIDES`.
    """
    least, most = PICTURE_SIDES
    scale = min(max(1.0, least / max(image.size)), most / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    grown = [_grow(mask, size) for mask in masks]
    if grown:
        outside = ~np.any(grown, axis=0)
        pixels = np.where(outside[..., None], 0.62 * pixels + 5, pixels)
    for mask, colour in zip(grown, colours, strict=False):
        tint = np.float32(ImageColor.getrgb(colour))
        pixels[mask] = 0.72 * pixels[mask] + 0.28 * tint
        pixels[_edge(mask, 7)] *= 0.45  # a dark rim keeps any colour visible on any picture
        pixels[_edge(mask, 5)] = tint
    for mask in before:
        pixels[_edge(_grow(mask, size), 3)] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _grow(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another (width, height), its steps smoothed."""
    soft = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(soft.filter(ImageFilter.GaussianBlur(0.6 * size[0] / mask.shape[1]))) > 127


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels within a line of odd `width` pixels along the border of a mask."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.filter(ImageFilter.MaxFilter(width))) != np.asarray(
        picture.filter(ImageFilter.MinFilter(width))
    )


__all__ = ["PICTURE_SIDES", "paint"]
