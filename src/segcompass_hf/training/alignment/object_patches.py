# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which image tokens show which target object, in rows of the row schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...data.schema import decode_masks
from ...images_segcompass import fit_objects_to_slots
from ...patch_coverage_segcompass import PatchCoverage


@dataclass
class ObjectPatches:
    """Says how much of every image token each target object covers; `extra` of a [`SegmentationCollator`].

    Args:
        processor (`SegCompassProcessor`): Image processor, and the number of slots.
        overflow (`str`, defaults to `"drop"`): More objects than slots, as of the collator: `"drop"`, `"merge"` or
            `"error"`.
    """

    processor: Any
    overflow: Literal["drop", "merge", "error"] = "drop"

    def __post_init__(self):
        self._coverage = PatchCoverage(self.processor)

    def __call__(self, rows: Sequence[dict[str, Any]], images: list, batch: Any) -> dict[str, torch.Tensor]:
        """Coverage of a batch.

        Args:
            rows (`Sequence[dict]`): In the row schema.
            images (`list[PIL.Image.Image]`): Theirs.
            batch (`dict`): With `input_ids` `(batch_size, sequence_length)`.

        Returns:
            `dict` with float tensors: `object_patches` `(batch_size, num_slots, sequence_length)`: of object j of a
            row, in the order of `mask_labels`, the share of every image token that it covers, in [0, 1]; 0 on text,
            padding, and where a row has fewer objects. And `patch_places` `(batch_size, sequence_length, 2)`: (y, x)
            of the middle of every image token, in [0, 1] of the image's sides; 0 elsewhere.
        """
        is_image = batch["input_ids"] == self.processor.image_token_id
        num_slots = self.processor.num_slots
        coverage = torch.zeros(len(rows), num_slots, is_image.shape[1])
        middles = torch.zeros(*is_image.shape, 2)
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            places = is_image[index].nonzero()[:, 0]
            masks = torch.from_numpy(decode_masks(row["masks"], (image.height, image.width)))
            masks = fit_objects_to_slots(masks, num_slots, self.overflow, f"sample {row.get('sample_id')!r}")
            if not len(places):
                continue
            middles[index, places] = self._coverage.places(image.height, image.width, len(places))
            if len(masks):
                coverage[index, : len(masks), places] = self._coverage(masks.numpy(), len(places))
        return {"object_patches": coverage, "patch_places": middles}


__all__ = ["ObjectPatches"]
