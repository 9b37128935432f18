# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A SegCompass model as a predictor, as a user would run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from ...data.collator import SegmentationCollator
from ...data.vlm_texts import RowTextCheck
from ..prediction import Prediction


class ModelPredictor:
    """A SegCompass model as a user would run it: its own reasoning, greedy, slots chosen by their confidence only.

    It does not see the rows' masks.

    Args:
        model (`SegCompassForReasoningSegmentation`): Is left in the mode (training or not) it is in.
        processor (`SegCompassProcessor`): Its processor.
        name (`str`, *optional*, defaults to `"model"`): What reports call it.
        slot_logit_threshold (`float`, *optional*): Slots with a logit above it are kept; the model's own by default.
        mask_logit_threshold (`float`, *optional*): Pixels with a logit above it belong to a mask; the model's own by
            default.
        segment_kwargs: For `model.segment`, such as `max_new_tokens` or `reasoning`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "model",
        slot_logit_threshold: float | None = None,
        mask_logit_threshold: float | None = None,
        **segment_kwargs,
    ):
        if segment_kwargs.get("do_sample"):
            raise ValueError("evaluation decodes greedily: what is sampled cannot be repeated; leave do_sample out.")
        self.model, self.processor, self.name = model, processor, name
        self.slot_logit_threshold, self.mask_logit_threshold = slot_logit_threshold, mask_logit_threshold
        self.segment_kwargs = segment_kwargs
        self._collate = SegmentationCollator.for_evaluation(processor)
        self.check_row = RowTextCheck(processor, with_reasoning=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers; of weights, processor and generation settings a digest."""
        return {
            "weights": weights_digest(self.model),
            "configuration": _digest_of_configs(self.model.config, self.model.generation_config),
            "processor": _digest(self.processor.to_json_string(), str(sorted(self.processor.tokenizer.get_vocab()))),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "slot_logit_threshold": self.slot_logit_threshold,
            "mask_logit_threshold": self.mask_logit_threshold,
            "decoding": "greedy",
            "slots": "by confidence",
            **self.segment_kwargs,
        }

    @torch.no_grad()
    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        """Segment a batch of rows.

        Args:
            rows (`Sequence[dict]`): In the row schema; `image` and `instruction` are read.

        Returns:
            `list[Prediction]`: in the order of the rows, masks at the images' own sizes.
        """
        batch = self._collate([row | {"masks": None, "ignore": None} for row in rows])
        batch.pop("references")
        inputs = {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        output = self.model.segment(**{"do_sample": False, **inputs, **self.segment_kwargs})
        results = self.processor.post_process_segmentation(
            output,
            batch["original_sizes"],
            batch["reshaped_input_sizes"],
            slot_logit_threshold=self.slot_logit_threshold,
            mask_logit_threshold=self.mask_logit_threshold,
        )
        return [
            Prediction(result["masks"].numpy(), result["scores"].tolist(), result["reasoning"], result["text"])
            for result in results
        ]


def weights_digest(model: torch.nn.Module) -> str:
    """Changes with any weight or buffer; the same on every device.

    Bits are added as integers, which is exact in any order, so that a GPU may do it.
    """
    parts = []
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        bits = tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)
        parts.append((name, list(tensor.shape), str(tensor.dtype), int(bits)))
    return _digest(json.dumps(parts))


def _digest_of_configs(*configs: Any) -> str:
    """Of what they say, but not of where they came from."""
    dicts = [config.to_dict() for config in configs]
    for entries in dicts:
        for name in ("_name_or_path", "transformers_version"):
            entries.pop(name, None)
    return _digest(json.dumps(dicts, sort_keys=True, default=str))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
