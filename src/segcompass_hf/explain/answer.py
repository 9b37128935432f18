# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One answer of the model, held so that its masks can be made again from changed concepts."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch

from ..images_segcompass import restore_map, to_rgb_image
from ..token_kinds import TokenKind, token_kinds
from .explanation import Token
from .replay import Replay, capture


class Answer:
    """What the model answered to one image and instruction; start of every explanation and causal test.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model; set to evaluation mode.
        processor ([`SegCompassProcessor`]): Its processor.
        image: What the processor takes as an image.
        instruction (`str`): What to look for.
        reasoning (`str`, defaults to `"full"`): As in `segment`.
        segment_kwargs: Anything else for `segment`.

    Attributes:
        captured ([`CapturedSegmentation`]): Concepts, states and logits.
        replay ([`Replay`]): Makes masks from other concepts.
        slots (`list[int]`): Slots the model answers with; the strongest alone where there are none (`kept` is then
            `False`).
        masks (`np.ndarray` of shape `(len(slots), H, W)`): bool, at the image's size.
        scores (`np.ndarray` of shape `(K,)`): Score of every slot, in [0, 1].
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        image: Any,
        instruction: str,
        reasoning: Literal["full", "short", "none"] = "full",
        **segment_kwargs: Any,
    ):
        if not isinstance(instruction, str):
            raise ValueError(
                f"an explanation is of one image and one instruction, got a {type(instruction).__name__} as "
                "instruction; explain them one by one."
            )
        self.model, self.processor = model.eval(), processor
        self.image, self.instruction = to_rgb_image(image), instruction
        self.inputs = processor(images=self.image, instruction=instruction, return_tensors="pt").to(model.device)
        self.segment_kwargs = {"reasoning": reasoning, **segment_kwargs}
        self.captured = capture(model, self.inputs, **self.segment_kwargs)[0]
        self.replay = Replay(model, self.captured)
        self._answer = processor.post_process_segmentation(
            self.captured,
            self.captured.original_sizes,
            self.captured.reshaped_input_sizes,
            output_heatmaps=False,
        )[0]
        self.slots, self.kept = self._answer["slots"].tolist(), True
        if not self.slots:
            self.slots, self.kept = [int(self.captured.slot_logits[0].argmax())], False
        self.masks = self.full_size(self.captured.pred_masks[0, self.slots]) > model.config.mask_logit_threshold
        self.scores = self.captured.slot_scores[0].cpu().numpy()

    @property
    def reasoning(self) -> str:
        """Inside the think block."""
        return self._answer["reasoning"]

    @property
    def text(self) -> str:
        """The whole answer."""
        return self._answer["text"]

    def full_size(self, maps: torch.Tensor) -> np.ndarray:
        """Low-resolution logits `(n, 4h, 4w)` at the image's size: float32 `(n, H, W)`."""
        place = (
            self.processor.canvas_size,
            self.captured.reshaped_input_sizes[0].tolist(),
            self.captured.original_sizes[0].tolist(),
        )
        return np.stack([restore_map(low.detach().cpu(), *place).numpy() for low in maps])

    def tokens(self) -> list[Token]:
        """Every token of prompt and answer: what it is, and which patch of the image it shows."""
        captured, tokenizer = self.captured, self.processor.tokenizer
        size = (self.image.height, self.image.width)
        kinds, patches = token_kinds(self.processor, captured, self.instruction, image_size=size)
        texts = [tokenizer.decode([token]) for token in captured.sequences[0].tolist()]
        described = enumerate(zip(texts, kinds, patches, strict=True))
        return [Token(i, text, cast(TokenKind, kind), patch) for i, (text, kind, patch) in described]  # no padding


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two bool masks of one shape, in [0, 1]; two empty masks agree (1)."""
    union = np.logical_or(first, second).sum()
    return float(np.logical_and(first, second).sum() / union) if union else 1.0
