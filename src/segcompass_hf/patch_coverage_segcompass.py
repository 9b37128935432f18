# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How much of every image token a mask covers, whatever the VLM's image processor does to an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from .token_grids_segcompass import TRIAL_SIZE, UnknownPlacesError, measure_token_grid, picture_inputs

KEPT_SIZES = 256  # of images, whose geometry is remembered


class PatchCoverage:
    """Coverage of image tokens by masks: `R M C^T`, with `R` and `C` the shares of a token's rows and columns.

    Where a token lies in the image is asked of the VLM's own processor, once per image size; see
    [`measure_token_grid`].

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
                grid = measure_token_grid(self.processor, height, width, num_patches)
            except UnknownPlacesError as error:
                raise UnknownPlacesError(
                    f"{error} Leave out what needs these places (alignment_weight=0, slot_pull_weight=0)."
                ) from error
            rows = _shares(grid.top, grid.bottom, height, grid.rows)
            self._known[key] = rows, _shares(grid.left, grid.right, width, grid.columns)
        return self._known[key]


def _shares(first: float, last: float, size: int, tokens: int) -> torch.Tensor:
    """Share of every pixel row in every token row, of tokens that lie evenly between two edges (shares of the side).

    Returns `(tokens, size)`, rows that sum to 1 where the token lies in the image.
    """
    edges = size * np.linspace(first, last, tokens + 1)  # of the tokens, in pixels
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return torch.from_numpy(overlap.clip(min=0) / np.diff(edges)[:, None]).float()


__all__ = ["PatchCoverage"]
