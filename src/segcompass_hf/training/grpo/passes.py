# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The policy's pass over a micro-batch: over whole sequences, or over prompts and over the completions behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...generation_segcompass import CACHE, positions_without_padding
from ...prompt_copies_segcompass import PromptCopies
from ...text_stack_segcompass import HiddenStateCapture, decoder_layers
from ...vlm_inputs_segcompass import sequence_inputs
from .prompt_cache import prompt_cache, shared_cache
from .reference import LayerTrace


@dataclass
class Prompts:
    """The different prompts of a micro-batch.

    Args:
        rows (`torch.LongTensor` of shape `(batch_size,)`): Each completion's prompt.
        inputs (`dict[str, torch.Tensor]`): The VLM's inputs of the prompts: `input_ids` and `attention_mask`
            `(num_prompts, prompt_length)`, pictures and what belongs to them.
    """

    rows: torch.Tensor
    inputs: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Tokens of the prompts, padding included."""
        return self.inputs["input_ids"].shape[1]


@dataclass
class PolicyPass:
    """States of `tokens` tokens of `rows` sequences. Those of the layer are cut off from the graph below it.

    Args:
        layer_states (`torch.Tensor` of shape `(rows, tokens, hidden_size)`): After `sae_layer` layers.
        last_states (`torch.Tensor` of shape `(rows, tokens, hidden_size)`): Last hidden states.
        trace ([`LayerTrace`], *optional*): To repeat the pass with other weights.
    """

    layer_states: torch.Tensor
    last_states: torch.Tensor
    trace: LayerTrace | None
    copies: PromptCopies | None = field(default=None, init=False)

    def last(self, num_tokens: int) -> torch.Tensor:
        """Last hidden states of the last `num_tokens` tokens."""
        return self.last_states[:, -num_tokens:]


class SharedPass:
    """Passes over prompts and over the completions behind them, as one pass over the sequences of both.

    Args:
        prompts, completions ([`PolicyPass`]): Of `num_prompts` and of `batch_size` rows.
        rows (`torch.LongTensor` of shape `(batch_size,)`): Each completion's prompt.
        make_cache (`Callable`): An empty cache for a pass over the prompts.
    """

    def __init__(
        self, prompts: PolicyPass, completions: PolicyPass, rows: torch.Tensor, make_cache: Callable[[], Cache]
    ):
        self.prompts, self.completions, self.rows, self.make_cache = prompts, completions, rows, make_cache

    @property
    def layer_states(self) -> torch.Tensor:
        """As of [`PolicyPass`], of the whole sequences."""
        return torch.cat([self.prompts.layer_states[self.rows], self.completions.layer_states], 1)

    def last(self, num_tokens: int) -> torch.Tensor:
        """As of [`PolicyPass`], the completions and at least one token before them."""
        completions = self.completions.last_states
        prompts = self.prompts.last(num_tokens - completions.shape[1])
        return torch.cat([prompts[self.rows], completions], 1)

    @property
    def copies(self) -> PromptCopies:
        return PromptCopies(self.rows, self.prompts.layer_states.shape[1])

    @property
    def trace(self) -> SharedPass | None:
        return None if self.prompts.trace is None else self

    def replay(self, layers: nn.ModuleList, norm: nn.Module) -> torch.Tensor:
        """As [`LayerTrace.replay`], of the completions and the token before them."""
        cache = self.make_cache()
        prompts = self.prompts.trace.replay(layers, norm, cache)[:, -1:]
        completions = self.completions.trace.replay(layers, norm, shared_cache(cache, self.rows))
        return torch.cat([prompts[self.rows], completions], 1)


def whole_pass(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    traced: bool = False,
    cut: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> PolicyPass:
    """Run the policy over whole sequences.

    Args:
        model (`SegCompassForReasoningSegmentation`): Whose VLM runs.
        inputs (`dict[str, torch.Tensor]`): The VLM's, of prompts and completions.
        traced (`bool`, defaults to `False`): Record the pass, for a reference policy.
        cut (`Callable`): Makes of the SAE layer's states what the layers above go on with. Nothing below trains; cut
            off, gradient checkpointing and PEFT's input gradients cost nothing.
    """
    return _run(model, sequence_inputs(model.vlm, inputs), traced, cut)


def shared_pass(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    prompts: Prompts,
    traced: bool = False,
    cut: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> SharedPass:
    """As [`whole_pass`], but over each prompt once; the completions see its keys and values.

    Args:
        model, inputs, traced, cut: As of [`whole_pass`].
        prompts ([`Prompts`]): Of the sequences.
    """
    vlm = model.vlm

    def make_cache() -> Cache:
        return prompt_cache(vlm)

    cache = make_cache()
    with caches_beside_checkpoints(decoder_layers(vlm)):
        first = sequence_inputs(vlm, prompts.inputs) | {CACHE: cache, "use_cache": True}
        first = _run(model, first, traced, cut)
        behind = sequence_inputs(vlm, inputs, shared_cache(cache, prompts.rows))
        with positions_without_padding(vlm, inputs["attention_mask"][:, : prompts.length]):
            behind = _run(model, behind, traced, cut)
    return SharedPass(first, behind, prompts.rows, make_cache)


def _run(model: nn.Module, inputs: dict[str, Any], traced: bool, cut: Callable) -> PolicyPass:
    layer = model.config.sae_layer
    trace = LayerTrace(model.vlm, layer) if traced else None
    with HiddenStateCapture(model.vlm, layer, lambda states, _: cut(states)) as capture, trace or nullcontext():
        model.base_model(**inputs)
    return PolicyPass(capture.layer_states[0], capture.last_states[0], trace)


@contextmanager
def caches_beside_checkpoints(layers: nn.ModuleList) -> Iterator[None]:
    """While passes run, let layers with gradient checkpointing keep their cache; transformers takes it from them, as
    a cache that grows would grow twice. Those of [`prompt_cache`] and [`shared_cache`] may be asked again."""
    name = "_can_checkpoint_with_cache"
    before = [layer.__dict__.get(name) for layer in layers]
    for layer in layers:
        setattr(layer, name, True)
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            if value is None:
                delattr(layer, name)
            else:
                setattr(layer, name, value)
