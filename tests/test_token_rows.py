# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows for the added tokens, where embeddings and head are tied, apart, or of different sizes."""

import odd_vlms
import pytest
import tiny
import torch
from breadth.building import Parts
from breadth.families import FAMILIES
from transformers import AutoModelForImageTextToText

from segcompass_hf.token_rows_segcompass import add_tokens, num_token_rows

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


@pytest.mark.parametrize("tie", [True, False])
def test_rows_kept_apart_are_joined(tie, tmp_path):
    """IDEFICS keeps the rows of its image's tokens in matrices of their own, and resizing forgets those."""
    parts = Parts.build("idefics", FAMILIES["idefics"])
    size = len(parts.tokenizer)
    parts.config.vocab_size, parts.config.additional_vocab_size = size - 2, 2
    parts.config.tie_word_embeddings = tie
    vlm = parts.vlm()
    rows = torch.cat(list(vlm.get_input_embeddings().parameters()))
    head_rows = torch.cat(list(vlm.get_output_embeddings().parameters()))
    ids = torch.arange(size)[None]
    given = {"pixel_values": torch.ones(1, 1, 3, 28, 28), "image_attention_mask": torch.ones(1, size, 1).long()}
    with torch.no_grad():
        before = vlm(input_ids=ids, **given).logits
        added = add_tokens(parts.tokenizer, vlm)
        after = vlm(input_ids=ids, **given).logits
    assert before.shape[2] == size and after.shape[2] == num_token_rows(vlm) == size + len(ADDED)
    assert added["think_end_token_id"] == size + 2
    assert torch.equal(vlm.get_input_embeddings().weight[:size], rows)
    assert torch.equal(vlm.get_output_embeddings().weight[:size], head_rows)
    torch.testing.assert_close(after[..., :size], before)
    vlm.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids, **given).logits, after)


def test_another_padding_token_than_positions_are_counted_by_is_refused():
    parts = Parts.build("kosmos-2", FAMILIES["kosmos-2"])
    vlm = parts.vlm()
    add_tokens(parts.tokenizer, vlm)
    parts.tokenizer.pad_token = "<s>"
    with pytest.raises(ValueError, match=r"pads with token \d+ \(<s>\), but the VLM counts positions by"):
        add_tokens(parts.tokenizer, vlm)
