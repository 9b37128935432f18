# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of prompts, kept with their graph, and seen by the completions behind them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from ...text_stack_segcompass import text_config


class PromptLayer(CacheLayerMixin):
    """Keys and values that one decoder layer computes of prompts.

    Gradient checkpointing runs the layer again in the backward pass, so that `update` is called twice: what the first
    call brought stays, and a later one gets what the first got.

    Args:
        empty (`CacheLayerMixin`): The layer of a cache that the family generates with, never filled itself.
    """

    def __init__(self, empty: CacheLayerMixin):
        super().__init__()
        self.empty, self.filled = empty, None
        self.is_sliding = getattr(empty, "is_sliding", False)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is to be prepared."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keys and values `(prompts, heads, tokens, head_dim)` that the prompts' own tokens see."""
        filled = copy.copy(self.empty)
        seen = filled.update(key_states, value_states, *args, **kwargs)
        self.filled = filled if self.filled is None else self.filled
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.filled or self.empty).get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return (self.filled or self.empty).get_seq_length()

    def get_max_length(self) -> int:
        return self.empty.get_max_length()


class SharedPromptLayer(CacheLayerMixin):
    """What completions see in one decoder layer: keys and values of their prompt, then their own.

    It keeps nothing, so that a layer may run again; gradients of all completions add up in their prompt.

    Args:
        prompts ([`PromptLayer`]): Filled.
        rows (`torch.LongTensor` of shape `(batch_size,)`): Each completion's prompt.
    """

    def __init__(self, prompts: PromptLayer, rows: torch.Tensor):
        super().__init__()
        self.prompts, self.rows, self.is_sliding = prompts, rows, prompts.is_sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is to be prepared."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keys and values `(batch_size, heads, prompt + completion, head_dim)`."""
        filled = self.prompts.filled
        pairs = (filled.keys, key_states), (filled.values, value_states)
        return tuple(torch.cat([kept.index_select(0, self.rows.to(kept.device)), new], -2) for kept, new in pairs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prompts.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.prompts.get_seq_length()

    def get_max_length(self) -> int:
        return self.prompts.get_max_length()


def prompt_cache(vlm: nn.Module) -> Cache:
    """An empty cache for a pass over prompts, of the kind of layers (full, sliding) that the VLM generates with.

    Raises:
        TypeError: It has layers of another kind, such as linear attention, whose state after a prompt is not a list of
            keys and values.
    """
    layers = DynamicCache(config=text_config(vlm)).layers
    other = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, CacheLayerMixin)})
    if other:
        raise TypeError(f"its cache has layers of the kind {', '.join(other)}, which keep no keys and values")
    return Cache(layers=[PromptLayer(layer) for layer in layers])


def shared_cache(prompts: Cache, rows: torch.Tensor) -> Cache:
    """The cache for a pass over completions behind the prompts that filled `prompts`.

    Args:
        prompts (`Cache`): From [`prompt_cache`], after the pass over the prompts.
        rows (`torch.LongTensor` of shape `(batch_size,)`): Each completion's prompt.
    """
    return Cache(layers=[SharedPromptLayer(layer, rows) for layer in prompts.layers])
