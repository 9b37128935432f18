# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of the VLM's embeddings and head for the tokens that SegCompass adds to its tokenizer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .generation_segcompass import ADDED_TOKENS, counting_embeddings
from .text_stack_segcompass import text_config


def add_tokens(tokenizer: Any, vlm: PreTrainedModel) -> dict[str, int]:
    """Add `<REF_POS>`, `<think>` and `</think>` to a tokenizer and embedding rows for them to the VLM.

    They are no special tokens: TRL decodes with `skip_special_tokens=True`, and rewards must see them.

    Returns:
        `dict[str, int]`: `ref_token_id`, `think_start_token_id` and `think_end_token_id`.

    Raises:
        ValueError: The VLM counts positions from another padding token than the tokenizer's.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in ADDED_TOKENS.values() if token not in known], special_tokens=False)
    _check_padding(tokenizer, vlm)
    _join_rows(vlm)
    if len(tokenizer) > num_token_rows(vlm):
        _resize_rows(vlm, len(tokenizer))
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in ADDED_TOKENS.items()}


def _check_padding(tokenizer: Any, vlm: PreTrainedModel) -> None:
    """Refuse a padding token that embeddings of positions do not know: they count the tokens that are none, so that a
    padded row would be read at other positions than alone."""
    for expected in {module.padding_idx for module in counting_embeddings(vlm)} - {tokenizer.pad_token_id, None}:
        raise ValueError(
            f"the tokenizer pads with token {tokenizer.pad_token_id} ({tokenizer.pad_token}), but the VLM counts "
            f"positions by its padding token {expected} ({tokenizer.convert_ids_to_tokens(expected)}): a padded row "
            "would be read otherwise than alone. Set the tokenizer's pad_token to that one, or take the tokenizer "
            "that was published with the VLM."
        )


def _join_rows(vlm: PreTrainedModel) -> None:
    """Bring rows that are kept apart from the vocabulary's (`additional_vocab_size`: IDEFICS's image tokens) into the
    same matrices as these: resizing would leave them behind."""
    config, parts = text_config(vlm), (vlm.get_input_embeddings(), vlm.get_output_embeddings())
    if not getattr(config, "additional_vocab_size", 0) or any(len([*part.parameters()]) < 2 for part in parts):
        return  # Molmo2's are behind the others already
    rows = [torch.cat([weight.detach() for weight in part.parameters()]) for part in parts]
    with torch.device(rows[0].device):
        head = nn.Linear(rows[1].shape[1], len(rows[1]), bias=False, dtype=rows[1].dtype)
    head.weight.data = rows[1]
    vlm.set_input_embeddings(nn.Embedding.from_pretrained(rows[0], freeze=False, padding_idx=parts[0].padding_idx))
    vlm.set_output_embeddings(head)
    config.vocab_size, config.additional_vocab_size = len(rows[0]), 0
    vlm.__dict__.pop("_tied_weights_keys", None)  # the class's are those of a model without such rows
    vlm.tie_weights()


def num_token_rows(vlm: PreTrainedModel) -> int:
    """Tokens that a VLM both reads and writes: the smaller of the rows of its embeddings and of its head."""
    head = vlm.get_output_embeddings()
    return min(module.weight.shape[0] for module in (vlm.get_input_embeddings(), head) if module is not None)


def _resize_rows(vlm: PreTrainedModel, num_tokens: int) -> None:
    """As `vlm.resize_token_embeddings`, but what the embeddings have beyond the head (rows of image tokens, in Mllama
    and Molmo2), and their configurations count on, stays."""
    rows = vlm.get_input_embeddings().weight.detach()
    surplus = rows.shape[0] - num_token_rows(vlm)
    rows = rows.clone() if surplus else rows  # resizing changes the module in place
    vlm.resize_token_embeddings(num_tokens)
    if surplus:
        embeddings = vlm._get_resized_embeddings(vlm.get_input_embeddings(), num_tokens + surplus)
        embeddings.weight.data[: len(rows)] = rows
        vlm.set_input_embeddings(embeddings)
