# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A SegCompass model whose VLM runs in vLLM. Experimental: never run on a GPU; see `docs/how-to/vllm.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...data.sequence_states import states_for_masks
from ...data.vllm_states import VllmStates
from ...images_segcompass import to_rgb_image
from ...scoring_segcompass import mean_surprisal
from .model import ModelPredictor

KNOWN_SETTINGS = ("max_new_tokens", "output_concepts")
_NOTHING = -1  # no token


class VllmPredictor(ModelPredictor):
    """A [`ModelPredictor`] whose answers vLLM writes, and whose masks are read from the states that vLLM gives.

    Each answer is two requests: one writes it, one passes it whole for the states of all its tokens. The model of this
    process reads masks from them; its VLM does not run. Answers are written freely (`constrain_format=False`).

    Args:
        model (`SegCompassForReasoningSegmentation`): Has the weights that the engine runs.
        processor (`SegCompassProcessor`): Its processor.
        states ([`VllmStates`]): Opened with the model's `sae_layer` and the number of its decoder layers.
        kwargs: As of the parent; of `segment_kwargs` `max_new_tokens` and `output_concepts` are known.

    Raises:
        ValueError: Another setting for `segment`, or a VLM that vLLM's states are not enough for.
    """

    def __init__(self, model: Any, processor: Any, states: VllmStates, **kwargs):
        super().__init__(model, processor, **kwargs)
        self.states = states
        unknown = sorted(set(self.segment_kwargs) - set(KNOWN_SETTINGS))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: vLLM writes freely and greedily, and {' and '.join(KNOWN_SETTINGS)} are all "
                "it is told; leave the rest out, or use ModelPredictor."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """As the parent's, with what wrote the answers."""
        return super().settings | {"engine": self.states.origin, "constrain_format": False}

    def _answers(self, inputs: Mapping[str, Any], images: Sequence[list], decode_above: float | None) -> Any:
        model, prompt_mask = self.model, inputs["attention_mask"]
        images = [[to_rgb_image(image) for image in of_row] for of_row in images]
        features = model.image_embeddings_of(
            inputs.get("sam_pixel_values"), inputs.get("image_embeddings"), len(prompt_mask)
        )
        completions, surprisals = self._write(inputs, images)
        written = (completions != _NOTHING).to(prompt_mask)
        completions = completions.masked_fill(completions == _NOTHING, self.processor.tokenizer.pad_token_id)
        sequences = {
            "input_ids": torch.cat([inputs["input_ids"], completions], dim=1),
            "attention_mask": torch.cat([prompt_mask, written], dim=1),
        }
        completion_mask = torch.cat([torch.zeros_like(prompt_mask), written], dim=1)
        grids, sizes = inputs.get("image_token_grids"), inputs["reshaped_input_sizes"]
        states = states_for_masks(self.states, model, sequences, images, completion_mask, grids)
        with_concepts = bool(self.segment_kwargs.get("output_concepts"))
        settings = {"output_concepts": with_concepts, "decode_above": decode_above}
        output = model.read_finite_masks(states, features, sizes, **settings)
        is_reasoning = written.bool() & ~model._is_format(completions, model._end_token_ids({}))
        return model.answers_of(states, output, mean_surprisal(surprisals, is_reasoning), sizes)

    def _write(self, inputs: Mapping[str, Any], images: list[list]) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions, `_NOTHING` behind them, and the surprisal of each token in nats: both `(rows, length)`."""
        model, device = self.model, inputs["input_ids"].device
        outputs = self.states.write(
            inputs,
            images,
            max_tokens=model._max_new_tokens(self.segment_kwargs.get("max_new_tokens"), {}),
            stop_token_ids=model._end_token_ids({}),
            # vLLM knows no logit_bias beside the extraction of states.
            bad_words=self.processor.tokenizer.convert_ids_to_tokens(model.vision_token_ids),
        )
        length = max(len(output.token_ids) for output in outputs)
        completions = torch.full((len(outputs), length), _NOTHING, device=device)
        surprisals = torch.zeros(len(outputs), length, device=device)
        for row, output in enumerate(outputs):
            count = len(output.token_ids)
            completions[row, :count] = torch.tensor(output.token_ids, device=device)
            chosen = zip(output.logprobs, output.token_ids, strict=True)
            surprisals[row, :count] = torch.tensor([-of_token[token].logprob for of_token, token in chosen])
        return completions, surprisals


__all__ = ["VllmPredictor"]
