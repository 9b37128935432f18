# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sampling of completions: prompts once for all of their completions, and states captured on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...prompt_copies_segcompass import PromptCopies
from ...reading_segcompass import SequenceStates
from ...text_stack_segcompass import HiddenStateCapture
from .groups import answers_in_a_row, shared_prompts, with_groups_together
from .passes import Prompts
from .rollouts import RolloutMasks
from .targets import SegmentationTargets

logger = logging.get_logger(__name__)


class SamplingMixin:
    """Of a [`trl.GRPOTrainer`], how it samples and what its micro-batches share.

    Its heir has the model itself, and keeps what is being sampled.
    """

    core: nn.Module
    _rollouts: RolloutMasks | None

    def _new_rollouts(self, rows: list[dict[str, Any]], targets: SegmentationTargets) -> RolloutMasks:
        """Where what is sampled for `rows` goes."""
        rollouts = RolloutMasks(targets)
        if self._captures_states:  # others sample for every row
            copies = self.num_generations if self.model.training else self.num_generations_eval
            rollouts.copies = answers_in_a_row(rows, targets.image_numbers, copies)
        return rollouts

    def _tokenize_prompts(self, prompts: list):
        """As in the parent, but the last of three, pictures and other inputs, is of every group's prompt once."""
        copies = self._rollouts.copies
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts[::copies])
        repeated = (rows and [each for each in rows for _ in range(copies)] for rows in (prompt_ids, images))
        return (*repeated, multimodal_fields)

    def _generate_single_turn(self, prompt_ids: list, images, multimodal_fields, num_generations, **kwargs):
        """As in the parent, which here gets every group's prompt once; states are captured for the masks."""
        copies = self._rollouts.copies
        if not self.use_vllm:  # which has settings of its own
            self.generation_config.num_return_sequences = copies
        prompts = prompt_ids[::copies], images and images[::copies], multimodal_fields
        if not self._captures_states:
            return super()._generate_single_turn(*prompts, num_generations, **kwargs)
        # `generate` runs the VLM inside, which accelerate's autocast of the whole model does not reach.
        precision, layer = self.accelerator.autocast(), self.core.config.sae_layer
        self.generation_config.feed_last_token = True
        with precision, HiddenStateCapture(self.core.vlm, layer) as capture:
            completion_ids, logprobs = super()._generate_single_turn(*prompts, num_generations, **kwargs)
        self._rollouts.states = self._sequence_states(prompt_ids, completion_ids, capture)
        return completion_ids, logprobs

    @property
    def _captures_states(self) -> bool:
        """Whether masks are read from states captured while sampling.

        They need a forward of their own where another model than this process's own whole one samples, and where
        concepts are read from a second pass over the sequence.
        """
        return self._samples_here and self.core.config.concept_input != "duplicated"

    @property
    def _samples_here(self) -> bool:
        """Whether this process's own whole model samples, token by token."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not (self.use_vllm or self.use_transformers_continuous_batching or sharded)

    def _prepare_inputs(self, generation_batch):
        """As in the parent, but a prompt's completions stay together, so that it is computed once for them."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or self._buffered_inputs is None:
            return inputs
        self._buffered_inputs = with_groups_together(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _shared_prompts(self, inputs: dict[str, Any]) -> Prompts | None:
        """Prompts that several completions of a micro-batch have.

        With weights spread over processes all of them have to make the same passes, whatever their micro-batch holds.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning_once("With FSDP or DeepSpeed prompts are computed anew for each of their completions.")
            return None
        return shared_prompts(inputs)

    def _sequence_states(self, prompt_ids: list, completion_ids: list, capture: HiddenStateCapture) -> SequenceStates:
        """What masks are read from: `[padding | prompt | completion | padding]` as in `generate`."""
        width, multiple = max(map(len, prompt_ids)), self.pad_to_multiple_of
        width = width if multiple is None else -(-width // multiple) * multiple
        length = max(map(len, completion_ids))
        sequences = torch.full((len(prompt_ids), width + length), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(sequences)
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            sequences[row, width - len(prompt) : width] = torch.tensor(prompt)
            sequences[row, width : width + len(completion)] = torch.tensor(completion)
            mask[row, width - len(prompt) : width + len(completion)] = 1
        sequences, mask = sequences.to(self.accelerator.device), mask.to(self.accelerator.device)
        copies = self._rollouts.copies
        numbers = torch.arange(len(sequences), device=sequences.device) // copies
        return SequenceStates.of_answers(
            capture.states(width + length),
            sequences,
            mask[:, :width],
            mask[:, width:],
            self._rollouts.targets.image_token_grids,
            PromptCopies(numbers, width) if copies > 1 else None,
        )
