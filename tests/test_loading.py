# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows for the added tokens, where embeddings and head are tied, apart, or of different sizes."""

import odd_vlms
import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from segcompass_hf.loading_segcompass import add_tokens, num_token_rows

ADDED = ("ref_token_id", "think_start_token_id", "think_end_token_id")


def grown_tokenizer(num_tokens: int):
    """A tokenizer of just so many tokens, the added ones not among them."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens([f"<filler {index}>" for index in range(num_tokens - len(tokenizer))])
    assert len(tokenizer) == num_tokens
    return tokenizer


@pytest.mark.parametrize("tie", [True, False])
def test_rows_for_added_tokens(tie):
    vlm = AutoModelForImageTextToText.from_config(tiny.tiny_vlm_config(tie=tie, vocab_size=500))
    before = [vlm.get_input_embeddings().weight.clone(), vlm.get_output_embeddings().weight.clone()]
    assert num_token_rows(vlm) == 500
    ids = add_tokens(grown_tokenizer(500), vlm)
    assert [ids[name] for name in ADDED] == [500, 501, 502]
    embeddings, head = vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight
    assert (head is embeddings) == tie
    for weight, old in zip((embeddings, head), before, strict=True):
        assert len(weight) == num_token_rows(vlm) == 503
        assert torch.equal(weight[:500], old)


def test_no_rows_are_added_where_there_are_enough():
    vlm = AutoModelForImageTextToText.from_config(tiny.tiny_vlm_config(vocab_size=520))
    embeddings = vlm.get_input_embeddings()
    add_tokens(grown_tokenizer(510), vlm)
    assert vlm.get_input_embeddings() is embeddings


@pytest.mark.parametrize("num_tokens", [490, 498], ids=["within the embeddings", "beyond them"])
def test_embeddings_with_more_rows_than_the_head(num_tokens, tmp_path):
    """Mllama embeds 8 rows more than it writes, the first of them its image token; 488 + 8 and 488 here."""
    vlm = odd_vlms.odd_vlm("mllama", vocab_size=488)
    old = vlm.get_input_embeddings().weight.clone(), vlm.get_output_embeddings().weight.clone()
    assert (len(old[0]), len(old[1])) == (496, 488)
    ids = add_tokens(grown_tokenizer(num_tokens), vlm)
    assert ids["think_end_token_id"] == num_tokens + 2
    embeddings, head = vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight
    assert len(head) == num_token_rows(vlm) == num_tokens + 3  # every token can be written
    assert len(embeddings) == num_tokens + 3 + 8  # as the configuration makes it
    assert torch.equal(embeddings[:496], old[0]) and torch.equal(head[:488], old[1])
    vlm.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
