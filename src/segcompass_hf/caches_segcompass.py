# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of what is written, kept with room for what comes."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens: so often everything kept is copied, and so much memory may lie idle per answer


class GrowingLayer(DynamicLayer):
    """A [`DynamicLayer`] that writes new keys and values behind the old ones.

    The parent joins old and new ones in a new place for every token: copying a cache takes longer than attending to
    it, and that of hundreds of answers comes from fresh memory every time.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._given: tuple | None = None  # keys and values as the last update left them
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None  # the memory that these are the front part of

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keys and values `(batch_size, heads, tokens, head_dim)` so far; views that a later update leaves alone."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), key_states.shape[-2]
        kept = self._given is not None and self.keys is self._given[0] and self.values is self._given[1]
        if not kept or start + new > self._room[0].shape[-2]:
            states = (self.keys, key_states), (self.values, value_states)
            self._room = tuple(_with_room(old, latest, start, start + new + ROOM) for old, latest in states)
        for room, latest in zip(self._room, (key_states, value_states), strict=True):
            room[..., start : start + new, :] = latest
        self._given = tuple(room[..., : start + new, :] for room in self._room)
        self.keys, self.values = self._given
        return self._given


def _with_room(old: torch.Tensor, latest: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Memory for `size` tokens, with the first `start` of `old`."""
    room = latest.new_empty((*latest.shape[:-2], size, latest.shape[-1]))
    if start:
        room[..., :start, :] = old
    return room


def let_grow(cache: Any) -> None:
    """Let the plain layers of a cache that is empty grow in place; those of other kinds stay as they are."""
    if getattr(cache, "offloading", False) or not hasattr(cache, "layers") or cache.get_seq_length():
        return
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer


__all__ = ["GrowingLayer", "let_grow"]
