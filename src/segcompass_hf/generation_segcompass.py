# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Generation: hidden states captured on the way, and answers that are well-formed by construction."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What transformers calls a cache in outputs and arguments; renamed in 5.24.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
ADDED_TOKENS = {"ref_token_id": "<REF_POS>", "think_start_token_id": "<think>", "think_end_token_id": "</think>"}


class _LayerReached(Exception):
    """Ends a pass through the VLM; not an error."""


class HiddenStateCapture:
    """Context that collects what SegCompass needs from every pass through a VLM's base model.

    Per pass: the output of `layer` decoder layers (`hidden_states[layer]`, before the final norm) and the last hidden
    state (after it). During `generate` the passes are the prompt and then one token each, so that joined along the
    tokens they are the states of the sequence without a second pass.

    Args:
        base_model (`nn.Module`): The VLM without its head (`model.base_model`).
        layer (`int`): Index into `hidden_states`; 0 reads the embeddings.
        edit (`Callable`, *optional*): Called with the states of one pass, `(batch, tokens, hidden)`, and the number of
            tokens passed before; returns the states to go on with. What is captured is what it returns.
        stop (`bool`, defaults to `False`): End the pass and the context once the layer's states are there: what lies
            above is not computed, and `last_states` stay empty.
    """

    def __init__(
        self,
        base_model: nn.Module,
        layer: int,
        edit: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        stop: bool = False,
    ):
        self.base_model, self.layer, self.edit, self.stop = base_model, layer, edit, stop
        self.layer_states: list[torch.Tensor] = []
        self.last_states: list[torch.Tensor] = []
        self.cache = None
        self.position_ids = None  # of the newest pass, where the caller gave them
        self._handles: list = []

    def __enter__(self):
        layers = decoder_layers(self.base_model)
        if self.layer == 0:
            self._handles.append(layers[0].register_forward_pre_hook(self._read_input, with_kwargs=True))
        else:
            self._handles.append(layers[self.layer - 1].register_forward_hook(self._read_output))
        self._handles.append(self.base_model.register_forward_pre_hook(self._read_positions, with_kwargs=True))
        self._handles.append(self.base_model.register_forward_hook(self._read_last))
        return self

    def __exit__(self, kind, *exception) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return kind is _LayerReached

    @property
    def num_tokens(self) -> int:
        """Tokens whose states are collected so far."""
        return sum(states.shape[1] for states in self.layer_states)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both states of every token, joined over the passes: twice `(batch_size, sequence_length, hidden_size)`."""
        if not self.last_states:
            raise RuntimeError("no pass through the VLM was captured; run the model inside the context.")
        if len(self.last_states) == 1:
            return self.layer_states[0], self.last_states[0]
        return torch.cat(self.layer_states, dim=1), torch.cat(self.last_states, dim=1)

    def _collect(self, states: torch.Tensor) -> torch.Tensor:
        if self.edit is not None:
            states = self.edit(states, self.num_tokens)
        self.layer_states.append(states)
        if self.stop:
            raise _LayerReached
        return states

    def _read_input(self, module, args, kwargs):
        if args:
            return (self._collect(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._collect(kwargs["hidden_states"])}

    def _read_output(self, module, args, output):
        if isinstance(output, torch.Tensor):
            return self._collect(output)
        return (self._collect(output[0]), *output[1:])

    def _read_positions(self, module, args, kwargs):
        self.position_ids = kwargs.get("position_ids")

    def _read_last(self, module, args, output):
        self.last_states.append(output[0])
        self.cache = getattr(output, CACHE, None)


def decoder_layers(base_model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a VLM's text model.

    Raises:
        ValueError: where the VLM has no text model with `layers`.
    """
    for name in ("language_model", "text_model", "model", "decoder"):
        text_model = getattr(base_model, name, None)
        if text_model is not None and hasattr(text_model, "layers"):
            return text_model.layers
    if hasattr(base_model, "layers"):
        return base_model.layers
    raise ValueError(
        f"{type(base_model).__name__} has no text model with `layers` (looked at language_model, text_model, model "
        "and decoder), so there is no layer to read concepts from; use a VLM built on a decoder-only language model."
    )


@torch.no_grad()
def run_last_token(capture: HiddenStateCapture, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Pass the last token through the base model, against the cache of the passes captured so far.

    `generate` never feeds its last token back, so this single-token step completes the states.

    Args:
        capture (`HiddenStateCapture`): Still entered, after generation.
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`): Prompt and completion.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): As generation saw it.
    """
    if capture.cache is None:
        raise ValueError("generation kept no cache, so the last token's states cannot be had; pass use_cache=True.")
    if capture.position_ids is not None:
        position_ids = capture.position_ids[..., -1:] + 1  # one on, whatever the family's position scheme
    else:
        position_ids = attention_mask.long().cumsum(-1)[:, -1:] - 1
    capture.base_model(
        input_ids=input_ids[:, -1:],
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        **{CACHE: capture.cache},
    )


class SegCompassFormatLogitsProcessor(LogitsProcessor):
    """Guarantees `<think> reasoning </think>`, then exactly `num_slots` `<REF_POS>`, then the end.

    Every row's place in the answer is read off its own tokens, so rows may be at different places. Reasoning is at
    least one token, except with `reasoning="none"`, and is closed when `max_reasoning_tokens` are written.

    Args:
        prompt_length (`int`): Tokens before the completion.
        num_slots (`int`): How many `<REF_POS>` to write.
        ref_token_id, think_start_token_id, think_end_token_id, eos_token_id (`int`): The tokens of the format.
        max_reasoning_tokens (`int`): Most tokens between the tags; 0 closes the tag at once.
        forbidden_token_ids (`list[int]`, *optional*): Never written inside the reasoning (image tokens, padding).
    """

    def __init__(
        self,
        prompt_length: int,
        num_slots: int,
        ref_token_id: int,
        think_start_token_id: int,
        think_end_token_id: int,
        eos_token_id: int,
        max_reasoning_tokens: int,
        forbidden_token_ids: list[int] | None = None,
    ):
        self.prompt_length, self.num_slots = prompt_length, num_slots
        self.ref, self.start, self.end, self.eos = ref_token_id, think_start_token_id, think_end_token_id, eos_token_id
        self.max_reasoning_tokens = max_reasoning_tokens
        self.forbidden = sorted({self.ref, self.start, self.eos, *(forbidden_token_ids or [])})

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Keep only the scores that lead to a well-formed answer.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`): Tokens so far.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`): Logits of the next token.
        """
        if not 0 <= self.end < scores.shape[-1] or max(self.forbidden) >= scores.shape[-1]:
            raise ValueError(
                f"the format's tokens go up to id {max(self.end, *self.forbidden)}, the VLM scores {scores.shape[-1]} "
                "tokens; resize its embeddings to the tokenizer."
            )
        completion = input_ids[:, self.prompt_length :]
        written = completion.shape[1]
        forced = self._forced(completion)  # (batch_size,), -1 where the model is free to reason
        scores = scores.clone()
        scores[:, self.forbidden] = float("-inf")
        if written <= 1:
            scores[:, self.end] = float("-inf")  # reasoning is at least one token
        rows = (forced >= 0).nonzero().flatten()
        scores[rows] = float("-inf")
        scores[rows, forced[rows]] = 0.0
        return scores

    def _forced(self, completion: torch.Tensor) -> torch.Tensor:
        """The only token that may come next, per row, or -1. `completion`: `(batch_size, written)`."""
        written = completion.shape[1]
        if written == 0:
            return completion.new_full((completion.shape[0],), self.start)
        is_closed = (completion == self.end).any(dim=1)
        num_refs = (completion == self.ref).sum(dim=1)
        cap = self.end if written - 1 >= self.max_reasoning_tokens else -1
        forced = torch.full_like(num_refs, cap)
        forced[is_closed] = self.ref
        forced[is_closed & (num_refs >= self.num_slots)] = self.eos
        return forced


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Never writes the given tokens; also stops at once, with a reason, where the VLM's scores are not numbers.

    A written image placeholder would ask for image features that do not exist when the sequence is read again.
    """

    def __init__(self, token_ids: list[int], explain: Callable[[], str] | None = None):
        self.token_ids, self.explain = sorted(set(token_ids)), explain
        self.checked = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.checked and not self._finite(scores):
            reason = self.explain() if self.explain is not None else ""
            raise ValueError(f"the VLM's scores for the first token hold NaN (module `vlm`). {reason}")
        self.checked = True
        ids = [i for i in self.token_ids if i < scores.shape[-1]]
        scores = scores.clone()
        scores[:, ids] = float("-inf")
        return scores

    @staticmethod
    def _finite(scores: torch.Tensor) -> bool:
        return not bool(torch.isnan(scores).any())


def reasoning_budget(
    reasoning: Literal["full", "short", "none"],
    num_slots: int,
    max_new_tokens: int,
    max_reasoning_tokens: int,
    short_reasoning_tokens: int,
) -> int:
    """Tokens that the reasoning may take so that the whole answer fits into `max_new_tokens`.

    The answer is opening tag, reasoning, closing tag, `num_slots` `<REF_POS>`, end.

    Example:

    ```python
    >>> reasoning_budget("full", num_slots=4, max_new_tokens=20, max_reasoning_tokens=512, short_reasoning_tokens=32)
    13
    ```
    """
    caps = {"full": max_reasoning_tokens, "short": short_reasoning_tokens, "none": 0}
    if reasoning not in caps:
        raise ValueError(f'reasoning must be "full", "short" or "none", got {reasoning!r}.')
    fixed = num_slots + 3
    least = fixed + (reasoning != "none")
    if max_new_tokens < least:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} is too few: two tags, {num_slots} <REF_POS> and the end take {fixed} "
            f"tokens, with reasoning={reasoning!r} the answer takes at least {least}; raise max_new_tokens, or pass "
            "constrain_format=False."
        )
    return min(caps[reasoning], max_new_tokens - fixed)


def completion_mask_of(completion: torch.Tensor, eos_token_ids: list[int]) -> torch.Tensor:
    """1 up to and including each row's first end token, 0 after it. `completion`: `(batch_size, length)` ids."""
    if completion.shape[1] == 0 or not eos_token_ids:
        return torch.ones_like(completion)
    is_end = torch.isin(completion, torch.tensor(eos_token_ids, device=completion.device))
    ended_before = is_end.long().cumsum(dim=1) - is_end.long()
    return (ended_before == 0).long()


FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def final_norm(base_model: nn.Module) -> nn.Module:
    """The norm behind the last decoder layer of a VLM's text model.

    Raises:
        ValueError: where it goes by no known name.
    """
    layers = decoder_layers(base_model)
    text_model = next(module for module in base_model.modules() if getattr(module, "layers", None) is layers)
    for name in FINAL_NORMS:
        if isinstance(getattr(text_model, name, None), nn.Module):
            return getattr(text_model, name)
    raise ValueError(
        f"{type(text_model).__name__} has no final norm under a known name {FINAL_NORMS}; train with beta=0, which "
        "needs no reference policy."
    )


__all__ = ["HiddenStateCapture", "SegCompassFormatLogitsProcessor"]
