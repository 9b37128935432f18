# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A SegCompass model asked several times: answers sampled as reinforcement samples them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ..prediction import Prediction
from .model import ModelPredictor

SAMPLES_AT_ONCE = 8  # of each prompt of a batch


class SamplingPredictor(ModelPredictor):
    """As [`ModelPredictor`], but every row is answered `num_samples` times, from the whole distribution of tokens.

    The format is not imposed, as in reinforcement: an answer that misses it is likely to be wrong there too. What is
    sampled follows from `seed` and the rows of a batch alone, so that runs can be repeated and continued.

    Args:
        num_samples (`int`): Answers of every row.
        temperature (`float`, *optional*, defaults to 1.0): Of the tokens' distribution; no top-k, no top-p.
        seed (`int`, *optional*, defaults to 0): Of the samples.
        model, processor, name, kwargs: As of [`ModelPredictor`].

    Raises:
        ValueError: No samples, or no positive temperature.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "model",
        num_samples: int = 16,
        temperature: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(model, processor, name, **{"constrain_format": False, **kwargs})
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected 1 or more answers per row.")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number: 0 would be greedy.")
        self.num_samples, self.temperature, self.seed = num_samples, temperature, seed

    @property
    def settings(self) -> dict[str, Any]:
        sampling = {name: getattr(self, name) for name in ("num_samples", "temperature", "seed")}
        return super().settings | {"decoding": "sampled"} | sampling

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[list[Prediction]]:
        """Answer a batch of rows: `num_samples` predictions for each, in the order in which they were sampled."""
        batch = self._collate([row | {"masks": None, "ignore": None} for row in rows])
        batch.pop("references")
        answers: list[list[Prediction]] = [[] for _ in rows]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(zlib.crc32(f"{self.seed} {[row.get('sample_id') for row in rows]}".encode()))
            for start in range(0, self.num_samples, SAMPLES_AT_ONCE):
                number = min(SAMPLES_AT_ONCE, self.num_samples - start)
                for place, answer in enumerate(self._answers(batch, number)):
                    answers[place // number].append(answer)
        return answers

    @torch.no_grad()
    def _answers(self, batch: dict[str, Any], number: int) -> list[Prediction]:
        """So many answers of each row, those of a row together."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        sampling["decode_above"] = self._shown_above
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        output = self.model.segment(**inputs, **sampling, num_return_sequences=number, **self.segment_kwargs)
        sizes = (batch[name].repeat_interleave(number, 0) for name in ("original_sizes", "reshaped_input_sizes"))
        thresholds = {name: getattr(self, name) for name in ("slot_logit_threshold", "mask_logit_threshold")}
        results = self.processor.post_process_segmentation(output, *sizes, **thresholds, output_heatmaps=False)
        return [
            Prediction(result["masks"].numpy(), result["scores"].tolist(), result["reasoning"], result["text"])
            for result in results
        ]


__all__ = ["SamplingPredictor"]
