# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A SegCompass model as a predictor, as a user would run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...data.collator import SegmentationCollator
from ...data.vlm_texts import RowTextCheck
from ...files import weights_digest
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
        **segment_kwargs: Any,
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
            "processor": _digest_of_processor(self.processor, self.processor),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "slot_logit_threshold": self.slot_logit_threshold,
            "mask_logit_threshold": self.mask_logit_threshold,
            "decoding": "greedy",
            "slots": "by confidence",
            **self.segment_kwargs,
        }

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        """Segment a batch of rows.

        Args:
            rows (`Sequence[dict]`): In the row schema; `image` and `instruction` are read.

        Returns:
            `list[Prediction]`: in the order of the rows, masks at the images' own sizes.
        """
        _, _, results = self.segment(rows, all_slots=False)
        return [
            Prediction(
                result["masks"].numpy(),
                result["scores"].tolist(),
                result["reasoning"],
                result["text"],
                duplicates_dropped=len(result["duplicates"]),
            )
            for result in results
        ]

    def segment(
        self, rows: Sequence[dict[str, Any]], all_slots: bool = True
    ) -> tuple[Any, torch.Tensor, list[dict[str, Any]]]:
        """The model's output, the `reshaped_input_sizes` `(rows, 2)` of its images, and the post-processed answers.

        With `all_slots=False` the output holds no masks of slots that are not shown, which saves decoding them.
        """
        batch = self._collate([row | {"masks": None, "ignore": None} for row in rows])
        batch.pop("references")
        return self.segment_inputs(batch, [[row["image"]] for row in rows], all_slots)

    @property
    def _shown_above(self) -> float:
        """The logit above which slots may be shown; those that vote are chosen by the model's own."""
        own = float(self.model.config.slot_logit_threshold)
        return own if self.slot_logit_threshold is None else min(own, self.slot_logit_threshold)

    @torch.no_grad()
    def segment_inputs(
        self, batch: Mapping[str, Any], images: Sequence[list], all_slots: bool = True
    ) -> tuple[Any, torch.Tensor, list[dict[str, Any]]]:
        """As [`~ModelPredictor.segment`], of inputs as the processor makes them, and of the images of each row;
        `image_embeddings` may stand in place of `sam_pixel_values`."""
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        output = self._answers(inputs, images, None if all_slots else self._shown_above)
        results = self.processor.post_process_segmentation(
            output,
            batch["original_sizes"],
            batch["reshaped_input_sizes"],
            slot_logit_threshold=self.slot_logit_threshold,
            mask_logit_threshold=self.mask_logit_threshold,
            output_heatmaps=False,
        )
        return output, inputs["reshaped_input_sizes"], results

    def _answers(self, inputs: Mapping[str, Any], images: Sequence[list], decode_above: float | None) -> Any:
        """The model's output; the images are for heirs whose VLM is elsewhere."""
        settings = {"do_sample": False, "decode_above": decode_above, **self.segment_kwargs}
        return self.model.segment(**{**inputs, **settings})


def _digest_of_configs(*configs: Any) -> str:
    """Of what they say, but not of where they came from."""
    dicts = [config.to_dict() for config in configs]
    for entries in dicts:
        for name in ("_name_or_path", "transformers_version"):
            entries.pop(name, None)
    return _digest(json.dumps(dicts, sort_keys=True, default=str))


def _digest_of_processor(processor: Any, settings: Any) -> str:
    """Of its `settings` (whose json holds them), its chat template, and every token with its id."""
    vocabulary = json.dumps(processor.tokenizer.get_vocab(), sort_keys=True)
    return _digest(settings.to_json_string(), str(processor.chat_template), vocabulary)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
