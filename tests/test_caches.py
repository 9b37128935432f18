# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Caches that grow in place: what they hold is what transformers' hold, and memory is moved once in a while."""

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from segcompass_hf.caches_segcompass import ROOM, GrowingLayer, let_grow


def states(tokens: int, rows: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 3, tokens, 4, generator=generator) for _ in range(2))


CHANGES = {
    "more": lambda layer, number: None,
    "reordered": lambda layer, number: layer.reorder_cache(torch.tensor([1, 0])),
    "repeated": lambda layer, number: layer.batch_repeat_interleave(2),
    "selected": lambda layer, number: layer.batch_select_indices(torch.tensor([0])),
    "cropped": lambda layer, number: layer.crop(-2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_plain_layer_holds(change):
    grown, plain = GrowingLayer(), DynamicLayer()
    for number, tokens in enumerate((5, 1, 1, ROOM, 1, 3)):
        rows = 2 if plain.keys is None else len(plain.keys)
        given = states(tokens, rows, number)
        for one, other in zip(grown.update(*given), plain.update(*given), strict=True):
            assert torch.equal(one, other)
        assert grown.get_seq_length() == plain.get_seq_length()
        if number in (1, 3):
            CHANGES[change](grown, number)
            CHANGES[change](plain, number)
    assert torch.equal(grown.keys, plain.keys) and torch.equal(grown.values, plain.values)


def test_memory_is_moved_once_in_a_while_and_views_stay():
    layer = GrowingLayer()
    first, _ = layer.update(*states(5))
    before, places = first.clone(), set()
    for number in range(ROOM + 1):
        keys, _ = layer.update(*states(1, seed=number))
        places.add(keys.data_ptr())
    assert len(places) == 2  # room for 64 more tokens, then new room
    assert torch.equal(first, before)


def test_what_trains_is_joined_with_its_graph():
    layer = GrowingLayer()
    keys, values = (each.requires_grad_() for each in states(2))
    seen, _ = layer.update(keys, values)
    layer.update(*states(1))
    seen.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_only_plain_layers_of_an_empty_cache_are_replaced():
    config = tiny_model("gemma3").config.vlm_config.get_text_config()
    cache = DynamicCache(config=config)
    kinds = [type(layer) for layer in cache.layers]
    assert DynamicSlidingWindowLayer in kinds
    let_grow(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer if k is DynamicLayer else k for k in kinds]
    filled = DynamicCache()
    filled.update(*states(2), 0)
    let_grow(filled)
    assert type(filled.layers[0]) is DynamicLayer
    lazy = DynamicCache()
    let_grow(lazy)
    lazy.update(*states(2), 0)
    assert type(lazy.layers[0]) is GrowingLayer
    let_grow(None)
