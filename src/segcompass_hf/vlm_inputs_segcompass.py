# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a VLM's forward gets for whole sequences: the inputs that its family's generation would have arrived at."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .generation_segcompass import CACHE, counting_embeddings
from .text_stack_segcompass import text_config


def sequence_inputs(vlm: nn.Module, inputs: Mapping[str, Any], cache: Any = None) -> dict[str, Any]:
    """Arguments of `vlm(...)` for sequences of prompt and completion, by the rules of its family.

    What has one entry per token may be as long as the prompt: over the completion it grows as `generate` lets it grow.
    Positions are counted as `generate` counts them, so that left padding changes nothing.

    Args:
        vlm (`PreTrainedModel`): With its head, without an adapter's wrapper.
        inputs (`Mapping`): `input_ids` `(batch_size, sequence_length)`, `attention_mask`, and what else the processor
            made for the VLM; entries that are `None` are left out.
        cache (`Cache`, *optional*): Holds the first tokens of the sequences: the arguments are for those behind.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    input_ids = given.pop("input_ids")
    given = {"use_cache": False, **given, **_grown(vlm, given, input_ids.shape[1])}
    labels = given.pop("labels", None)
    if "position_ids" not in given and "position_ids" in forward_arguments(vlm):
        given["position_ids"] = vlm._prepare_position_ids_for_generation(input_ids, given)
    if cache is not None:
        given |= {CACHE: cache, "use_cache": True, "next_sequence_length": input_ids.shape[1] - cache.get_seq_length()}
    prepared = vlm.prepare_inputs_for_generation(input_ids, is_first_iteration=cache is None, **given)
    if inputs.get("position_ids") is None and counting_embeddings(vlm):
        prepared.pop("position_ids", None)  # theirs do not begin at 0
    if "logits_to_keep" in prepared:
        prepared["logits_to_keep"] = every_state(vlm, prepared["logits_to_keep"])
    if labels is not None:
        prepared["labels"] = labels
    return {name: value for name, value in prepared.items() if value is not None}


def forward_arguments(vlm: nn.Module) -> set[str]:
    """Names that a VLM's forward takes."""
    return set(inspect.signature(vlm.forward).parameters)


def every_state(vlm: nn.Module, logits_to_keep: int | torch.Tensor) -> int | torch.Tensor:
    """`logits_to_keep` such that no layer drops states.

    Where upper layers share keys and values (Gemma 4) they compute only the tokens of a plain number, but masks need
    the states of all; the same places given as a tensor leave the layers alone and spare the logits all the same.
    """
    shares = getattr(text_config(vlm), "num_kv_shared_layers", None)
    if shares and isinstance(logits_to_keep, int) and logits_to_keep > 0:
        return torch.arange(-logits_to_keep, 0)
    return logits_to_keep


class _NoOutputs(dict):
    """In place of a pass's outputs, where only the lengths of inputs are asked for: answers anything with itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _grown(vlm: nn.Module, inputs: Mapping[str, Any], length: int) -> dict[str, torch.Tensor]:
    """Those per-token inputs that are shorter than the sequences, brought to their `length`.

    The family's rule for one more token shows which inputs have an entry per token, and what a written token's is.
    Token types and marks of an image's places that the rule does not know are those of text: 0.
    """
    short = {name: value for name, value in inputs.items() if _may_grow(value, length) and name not in _OF_SEQUENCES}
    if not short:
        return {}
    rule = vlm._update_model_kwargs_for_generation
    longer = rule(_NoOutputs(), {**short, "use_cache": False}, is_encoder_decoder=False, num_new_tokens=1)
    grown = {}
    for name, value in short.items():
        entry = longer[name][:, value.shape[1] :] if longer.get(name) is not None else value[:, :0]
        if entry.shape[1] != 1 and name.endswith(("token_type_ids", "position_mask")):
            entry = torch.zeros_like(value[:, -1:])
        if name == "token_type_ids" and not _is_causal(vlm, entry):
            entry = torch.ones_like(entry)
        if entry.shape[1] == 1:
            missing = entry.expand(-1, length - value.shape[1], *entry.shape[2:])
            grown[name] = torch.cat([value, missing], dim=1)
    return grown


def _is_causal(vlm: nn.Module, types: torch.Tensor) -> bool:
    """Whether tokens of these types see only what is before them, by the mask that the family makes of two of them.

    PaliGemma's type 0 is a prefix that sees all of itself, and before it had a rule of its own (transformers 5.17) the
    common one gave that to what is written: the language loss would have seen the answer.
    """
    make = getattr(vlm, "create_masks_for_generate", None)
    if make is None or types.shape[1] != 1:
        return True
    pair = types[:1].expand(1, 2)
    masks = make(
        config=vlm.config,
        inputs_embeds=torch.empty(1, 2, 0, device=pair.device),
        attention_mask=torch.ones_like(pair),
        position_ids=None,
        token_type_ids=pair,
        is_first_iteration=True,
        **{CACHE: None},
    )
    masks = [mask for mask in (masks.values() if isinstance(masks, dict) else [masks]) if torch.is_tensor(mask)]
    seen = [mask[0, 0, 0, 1] for mask in masks if mask.ndim == 4]  # of the second token by the first
    return not any(bool(each) if each.dtype == torch.bool else each.item() == 0 for each in seen)


_OF_SEQUENCES = ("attention_mask", "position_ids")  # whoever gives these gives them whole


def _may_grow(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[1] < length
