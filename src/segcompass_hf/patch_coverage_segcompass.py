# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How much of every image token a mask covers, whatever the VLM's image processor does to an image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

KEPT_SIZES = 256  # of images, whose geometry is remembered
TRIAL_SIZE = (320, 640)  # (height, width) of the picture tried at once: wide, so that families that tile do


class UnknownPlacesError(ValueError):
    """A family cuts images into tokens in a way whose places in the image are not known here: overlapping tiles, rows
    that end in a token of their own, tokens that are asked for by queries."""


class PatchCoverage:
    """Coverage of image tokens by masks: `R M C^T`, with `R` and `C` the shares of a token's rows and columns.

    Where a token lies in the image is asked of the VLM's own processor, once per image size: it is shown two
    pictures, brighter from left to right and from top to bottom, and a white one. What comes out tells which place of
    the image every place of the processed one shows, so resizing, cropping and padding are the family's own. Known are
    pixels `(1, C, H, W)` (LLaVA, Gemma: a grid, row by row) and flat patches (the Qwens: `merge_size^2` patches in a
    row make a token).

    Args:
        processor (`SegCompassProcessor`): Or a VLM's own.

    Raises:
        UnknownPlacesError: already for a trial picture the places of the family's image tokens are not known.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self._known: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        trial = picture_inputs(processor, Image.new("RGB", TRIAL_SIZE[::-1]))
        self.geometry(*TRIAL_SIZE, trial["input_ids"].tolist()[0].count(processor.image_token_id))

    def __call__(self, masks: np.ndarray, num_patches: int) -> torch.Tensor:
        """Coverage of all masks of an image.

        Args:
            masks (`np.ndarray` of shape `(num_masks, H, W)`): Bool, at the image's size.
            num_patches (`int`): Image tokens of the image.

        Returns:
            `torch.Tensor` of shape `(num_masks, num_patches)`: in [0, 1].

        Raises:
            UnknownPlacesError: the processor cuts the image into tokens in a way that is not known here.
        """
        rows, columns = self.geometry(*masks.shape[1:], num_patches)
        masks = torch.from_numpy(np.ascontiguousarray(masks)).to(rows.dtype)
        return (rows @ masks @ columns.T).flatten(1).clamp(0, 1)

    def places(self, height: int, width: int, num_patches: int) -> torch.Tensor:
        """(y, x) of the middle of every image token `(num_patches, 2)`, in [0, 1] of the image's sides."""
        middles = []
        for shares in self.geometry(height, width, num_patches):
            pixels = (torch.arange(shares.shape[1]) + 0.5) / shares.shape[1]
            middles.append(shares @ pixels / shares.sum(1).clamp(min=1e-6))
        return torch.cartesian_prod(*middles)

    def geometry(self, height: int, width: int, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares of the pixel rows in the token rows `(rows, height)` and of the columns `(columns, width)`."""
        key = (height, width, num_patches)
        if key not in self._known:
            if len(self._known) >= KEPT_SIZES:
                self._known.clear()
            try:
                self._known[key] = self._measure(height, width, num_patches)
            except UnknownPlacesError as error:
                raise UnknownPlacesError(
                    f"{error} Leave out what needs these places (alignment_weight=0, slot_pull_weight=0)."
                ) from error
        return self._known[key]

    def _measure(self, height: int, width: int, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
        along_y = np.repeat((np.arange(height) + 0.5)[:, None] / height, width, axis=1)
        along_x = np.repeat((np.arange(width) + 0.5)[None] / width, height, axis=0)
        inside, grid = self._seen(np.ones((height, width)), num_patches)  # (cell rows, cell columns)
        places = []
        for picture, size, axis, tokens in ((along_y, height, 0, grid[0]), (along_x, width, 1, grid[1])):
            seen, _ = self._seen(picture, num_patches)
            whole = (inside > 0.99).any(1 - axis)  # cells without padding
            values = (seen * (inside > 0.99)).sum(1 - axis) / (inside > 0.99).sum(1 - axis).clip(min=1)
            places.append(_shares(values * size, whole, size, tokens))
        return places[0], places[1]

    def _seen(self, picture: np.ndarray, num_patches: int) -> tuple[np.ndarray, tuple[int, int]]:
        """What the processor makes of a picture in [0, 1], and the grid of its tokens, (rows, columns)."""
        shown = Image.fromarray(np.rint(picture * 255).astype(np.uint8)).convert("RGB")
        made = picture_as_seen(self.processor, shown, num_patches, Image.Resampling.BILINEAR)
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
        raise unknown_layout(self.processor, pixels, num_patches)


def _shares(values: np.ndarray, whole: np.ndarray, size: int, tokens: int) -> torch.Tensor:
    """Share of every pixel row in every token row, from where the cells of the processed image come from.

    Cell i shows the image at `a + b i`, a line fitted to `values` (pixels) of cells without padding; a token takes an
    equal part of the cells. Returns `(tokens, size)`, rows that sum to 1 where the token lies in the image.
    """
    cells = np.arange(len(values))
    if whole.sum() > 1:
        slope, start = np.polyfit(cells[whole], values[whole], 1)
    else:
        slope, start = size, size / 2
    edges = start + slope * (np.linspace(0, len(values), tokens + 1) - 0.5)  # of the tokens, in pixels
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return torch.from_numpy(overlap.clip(min=0) / np.diff(edges)[:, None]).float()


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


__all__ = ["PatchCoverage", "UnknownPlacesError"]
