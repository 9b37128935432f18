# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The grid that a VLM's image tokens lie on, and where in the image it lies, measured of the VLM's own processor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

EDGE_UNITS = 1_000_000  # of a side, in which edges are handed on: numbers with a fraction would be cast to bf16
TRIAL_SIZE = (320, 640)  # (height, width) of the picture tried at once: wide, so that families that tile do


class TokenGrid(NamedTuple):
    """Image tokens of one image, row by row.

    Args:
        rows, columns (`int`): Of the grid.
        top, bottom, left, right (`float`): Its edges, as shares of the image's height and width. Where the VLM sees
            padding they lie outside of [0, 1]; where the image is cropped, within.
    """

    rows: int
    columns: int
    top: float
    bottom: float
    left: float
    right: float

    def as_row(self) -> list[int]:
        """What the model gets of it, a row of `image_token_grids`: edges in millionths of the sides."""
        return [self.rows, self.columns, *(round(edge * EDGE_UNITS) for edge in self[2:])]


class UnknownPlacesError(ValueError):
    """A family cuts images into tokens in a way whose places in the image are not known here: overlapping tiles, rows
    that end in a token of their own, tokens that are asked for by queries."""


def measure_token_grid(processor: Any, height: int, width: int, num_patches: int) -> TokenGrid:
    """The grid of the tokens of images of one size, whatever the VLM's processor does to an image.

    The processor is shown two pictures, brighter from left to right and from top to bottom, and a white one. What
    comes out tells which place of the image every place of the processed one shows, so resizing, cropping and padding
    are the family's own. Known are pixels `(1, C, H, W)` (LLaVA, Gemma: a grid, row by row) and flat patches (the
    Qwens: `merge_size^2` patches in a row make a token).

    Args:
        processor (`SegCompassProcessor`): Or a VLM's own.
        height, width (`int`): Of the images, in pixels.
        num_patches (`int`): Image tokens of such an image.

    Raises:
        UnknownPlacesError: The processor cuts the image into tokens in a way that is not known here.
    """
    size, edges = (height, width), []
    inside, grid = _seen(processor, np.broadcast_to(np.uint8(255), size), num_patches)  # (cell rows, cell columns)
    for axis, shades in enumerate((_shades(height)[:, None], _shades(width)[None])):
        seen, _ = _seen(processor, np.broadcast_to(shades, size), num_patches)
        whole = (inside > 0.99).any(1 - axis)  # cells without padding
        values = (seen * (inside > 0.99)).sum(1 - axis) / (inside > 0.99).sum(1 - axis).clip(min=1)
        edges += _edges(values, whole)
    return TokenGrid(*grid, *edges)


def picture_inputs(processor: Any, picture: Image.Image, **image_options) -> Any:
    """The VLM's inputs for a picture, of a `SegCompassProcessor` or a VLM's own processor."""
    if hasattr(processor, "picture_inputs"):
        return processor.picture_inputs(picture, **image_options)
    return processor(images=[[picture]], text=[processor.image_token], return_tensors="pt", **image_options)


def picture_as_seen(processor: Any, picture: Image.Image, num_patches: int, resample: Any) -> dict[str, torch.Tensor]:
    """What a VLM's processor makes of a picture, pixels not normalised.

    Returns:
        `dict` with `pixel_values` in [0, 1], and whatever else the family's image processor says of them.

    Raises:
        UnknownPlacesError: It makes no `pixel_values`, or another number of image tokens than `num_patches`.
    """
    try:
        made = picture_inputs(processor, picture, do_normalize=False, resample=resample)
    except Exception as error:  # whatever families make of options that they do not know
        raise UnknownPlacesError(f"{_family(processor)} shows no picture as it is: {error!r:.300}") from error
    tokens = made["input_ids"].tolist()[0].count(processor.image_token_id)
    if tokens != num_patches or "pixel_values" not in made:
        raise UnknownPlacesError(
            f"{_family(processor)} makes {tokens} tokens and {', '.join(made)} of a picture of {picture.width} x "
            f"{picture.height} pixels, not `pixel_values` for an image of {num_patches} tokens."
        )
    return made


def unknown_layout(processor: Any, pixels: torch.Tensor, num_patches: int) -> UnknownPlacesError:
    return UnknownPlacesError(
        f"{_family(processor)} makes pixel_values of shape {tuple(pixels.shape)} for an image of {num_patches} "
        "tokens, a layout whose places in the image are not known here."
    )


def _family(processor: Any) -> str:
    return getattr(processor, "vlm_processor_class", type(processor).__name__)


def _shades(length: int) -> np.ndarray:
    """Of pixels along one side, from dark to bright: `(length,)`, uint8."""
    return np.rint((np.arange(length) + 0.5) / length * 255).astype(np.uint8)


def _seen(processor: Any, picture: np.ndarray, num_patches: int) -> tuple[np.ndarray, tuple[int, int]]:
    """What the processor makes of a grey picture `(H, W)`, in [0, 1], and the grid of its tokens, (rows, columns)."""
    shown = Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")
    made = picture_as_seen(processor, shown, num_patches, Image.Resampling.BILINEAR)
    pixels = made["pixel_values"].float()
    if pixels.ndim == 2 and "image_grid_thw" in made:
        _, high, wide = made["image_grid_thw"][0].tolist()
        merge = math.isqrt(high * wide // num_patches)
        if len(pixels) == high * wide == num_patches * merge**2:
            cells = pixels.mean(1).view(high // merge, wide // merge, merge, merge).transpose(1, 2)
            return cells.reshape(high, wide).numpy(), (high // merge, wide // merge)
    if pixels.ndim == 4 and len(pixels) == 1:
        rows = round(math.sqrt(num_patches * pixels.shape[2] / pixels.shape[3]))
        if rows and num_patches % rows == 0:
            return pixels[0].mean(0).numpy(), (rows, num_patches // rows)
    raise unknown_layout(processor, pixels, num_patches)


def _edges(values: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Where the processed image begins and ends in the image along one side, as shares of it.

    Cell i of the processed image shows the image at `a + b i`, a line fitted to `values` of the cells that are
    `whole`, without padding.
    """
    cells = np.arange(len(values))
    slope, start = np.polyfit(cells[whole], values[whole], 1) if whole.sum() > 1 else (1.0, 0.5)
    return float(start - slope / 2), float(start + slope * (len(values) - 0.5))


__all__ = ["EDGE_UNITS", "TRIAL_SIZE", "TokenGrid", "UnknownPlacesError", "measure_token_grid"]
