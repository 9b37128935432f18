# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""SAM prompted with points and boxes, as the baselines and the box localizer use it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...files import weights_digest
from ...image_features_segcompass import ImageFeatures
from ...modeling_masks import MaskStage, check_segmenter
from ...segmenters_segcompass import check_canvas, geometry_of, to_sam_image_processor

PROMPTS_AT_ONCE = 32  # bounds the memory of the mask decoder


@dataclass(frozen=True)
class SamPrompt:
    """One object, in pixels of the image: `x` to the right, `y` down.

    Args:
        box (`tuple[float, float, float, float]`, *optional*): `(x1, y1, x2, y2)`.
        points (`tuple[tuple[float, float], ...]`): `(x, y)` of places on the object.
    """

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self):
        if self.box is None and not self.points:
            raise ValueError("a prompt for SAM is empty; it needs a box or at least one point.")


class PromptedSam:
    """A segmenter with its one-mask output (`multimask_output=False`): a prompt gives one mask.

    Args:
        sam (`PreTrainedModel`): A SAM or another of `SEGMENTERS`. Of other dtypes than float32 a copy is used, since
            they blur the places of prompts.
        processor (*optional*): Whatever `to_sam_image_processor` takes: what images are prepared with.

    Raises:
        ValueError: the processor is for another image size than the model, or this is no segmenter.
    """

    def __init__(self, sam: torch.nn.Module, processor: Any):
        if any(parameter.dtype != torch.float32 for parameter in sam.parameters()):
            sam = copy.deepcopy(sam).float()
        check_segmenter(sam)
        self.sam, self.stage, self.image_processor = sam, MaskStage(sam), to_sam_image_processor(processor)
        self.geometry = geometry_of(self.image_processor)
        check_canvas(self.geometry, self.stage.geometry)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the masks."""
        weights, canvas = weights_digest(self.sam), self.geometry.canvas
        return {"sam_weights": weights, "sam_canvas": canvas, "sam_output": "single mask"}

    @torch.no_grad()
    def segment(
        self, images: Sequence[Image.Image], prompts: Sequence[Sequence[SamPrompt]]
    ) -> list[tuple[np.ndarray, list[float]]]:
        """Masks for the prompts of each image.

        Args:
            images (`Sequence[Image.Image]`): RGB.
            prompts (`Sequence[Sequence[SamPrompt]]`): Of each image; may be empty.

        Returns:
            `list`: per image `(masks, scores)`: `(num_prompts, height, width)` bool at the image's size, and SAM's own
            estimate of each mask's IoU, in [0, 1].
        """
        asked = [index for index, own in enumerate(prompts) if own]
        features = self._encode([images[index] for index in asked]) if asked else None
        results = [(np.zeros((0, image.height, image.width), dtype=bool), []) for image in images]
        for row, index in enumerate(asked):
            results[index] = self._decode(features[row : row + 1], images[index], prompts[index])
        return results

    def _encode(self, images: list[Image.Image]) -> torch.Tensor | ImageFeatures:
        sizes = [self.geometry.resized_size((image.height, image.width)) for image in images]
        # SAM's processor rounds the short side of a very thin image to nothing
        images = [image.resize(s[::-1]) if 1 in s else image for image, s in zip(images, sizes, strict=True)]
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return self.stage.encode_image(pixels.to(self.sam.device))

    def _decode(
        self, features: torch.Tensor | ImageFeatures, image: Image.Image, prompts: Sequence[SamPrompt]
    ) -> tuple[np.ndarray, list[float]]:
        size = (image.height, image.width)
        masks, scores = np.zeros((len(prompts), *size), dtype=bool), [0.0] * len(prompts)
        alike: dict[tuple[bool, int], list[int]] = {}  # prompts of one form are decoded together
        for index, prompt in enumerate(prompts):
            alike.setdefault((prompt.box is not None, len(prompt.points)), []).append(index)
        for indices in alike.values():
            for start in range(0, len(indices), PROMPTS_AT_ONCE):
                group = indices[start : start + PROMPTS_AT_ONCE]
                inputs = self._inputs([prompts[index] for index in group], size)
                output = self.sam(multimask_output=False, **self.stage.as_inputs(features), **inputs)
                logits, quality = output.pred_masks[0, :, 0], output.iou_scores[0, :, 0]  # (n, h, w), (n,)
                if not (logits.isfinite().all() and quality.isfinite().all()):
                    raise ValueError("SAM's masks hold NaN or infinity: are its weights damaged?")
                for index, low, value in zip(group, logits.cpu(), quality.clamp(0, 1).tolist(), strict=True):
                    masks[index] = (self.geometry.restore_map(low, size) > 0).numpy()
                    scores[index] = value
        return masks, scores

    def _inputs(self, prompts: list[SamPrompt], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Prompts of one form, scaled to the canvas as SAM's processor does."""
        height, width = self.geometry.resized_size(size)
        scale = torch.tensor([width / size[1], height / size[0]])
        inputs = {}
        if prompts[0].points:
            points = torch.tensor([prompt.points for prompt in prompts], dtype=torch.float32)  # (n, num_points, 2)
            inputs["input_points"] = (points * scale)[None]
            inputs["input_labels"] = torch.ones(1, *points.shape[:2], dtype=torch.int)
        if prompts[0].box is not None:
            boxes = torch.tensor([prompt.box for prompt in prompts], dtype=torch.float32)  # (n, 4)
            inputs["input_boxes"] = (boxes * scale.repeat(2))[None]
        return {name: value.to(self.sam.device) for name, value in inputs.items()}
