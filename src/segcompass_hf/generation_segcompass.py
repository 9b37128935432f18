# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Generation: every token passes the VLM, and answers are well-formed by construction."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from .answers_segcompass import AnswerWriter, OneStepLater, answers_to_sample

# What transformers calls a cache in outputs and arguments; renamed in 5.24.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
GROWING_CACHES = ("dynamic", "offloaded", "quantized")  # of transformers' cache_implementation
ADDED_TOKENS = {"ref_token_id": "<REF_POS>", "think_start_token_id": "<think>", "think_end_token_id": "</think>"}


def generate_and_feed_last(
    vlm: PreTrainedModel, *args, streamer: Any = None, synced_gpus: bool | None = None, **kwargs
) -> Any:
    """`vlm.generate(...)`, which also passes the last token through the VLM, as its family passes every other.

    `generate` never feeds its last token back, so states captured on the way would lack those of that token. Here the
    loop goes on for one step more; what that step writes is seen by no one. Same arguments, same sequences. A prompt
    with several answers (`num_return_sequences`) passes once, and ended answers no more; what the format leaves no
    choice about passes together. See [`AnswerWriter`].

    Args:
        vlm (`PreTrainedModel`): Writes greedily or samples.
        streamer (*optional*): Gets the tokens that are returned, each when the next one is written.
        synced_gpus (`bool`, *optional*): As for `generate`.
        args, kwargs: For `generate`.

    Raises:
        ValueError: Beam search, or a cache that has no room for the step more.
    """
    tokenizer = kwargs.pop("tokenizer", None)
    mode = vlm._extract_generation_mode_kwargs(None, {}, synced_gpus, None, streamer)
    if mode.get("streamer") is not None:
        mode["streamer"] = _AllButLast(streamer)
    if tokenizer is not None:
        kwargs = _with_stop_strings(kwargs, tokenizer)

    asked = kwargs.get("logits_processor") or []
    copies, kwargs = answers_to_sample(vlm, kwargs)

    # By this name `generate` prepares everything and leaves the loop to its caller.
    def custom_generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={generation_config.num_beams}: beams change places while they are written, so captured "
                "states would belong to other beams; use greedy decoding or sampling."
            )
        check_growing_cache(generation_config.cache_implementation)
        stop = OneStepLater(stopping_criteria)
        form = _deciding_format(asked, stopping_criteria, generation_config, mode)
        lost = [processor for processor in asked if processor not in logits_processor]  # Janus hands none on
        logits_processor = LogitsProcessorList([*lost, *logits_processor])
        # Embeddings that count positions themselves have to see all rows.
        ended = None if counting_embeddings(model) else lambda: stop.ended
        writer = AnswerWriter(model, copies, input_ids, model_kwargs, generation_config, ended, lambda: stop.rest)
        if form is not None:
            pad = generation_config._pad_token_tensor
            stop.rest_of = lambda ids: form.rest(ids, stop.ended, pad) if writer.takes_several else None
        output = type(model)._sample(
            writer,
            writer.all_ids,
            logits_processor=lambda ids, scores: scores if stop.over else logits_processor(ids, scores),
            stopping_criteria=StoppingCriteriaList([stop]),
            generation_config=generation_config,
            **{**writer.all_kwargs, **mode},
        )
        output = _without_last(output)
        return output if stop.rest is None else torch.cat([output, stop.rest], dim=1)

    with positions_without_padding(vlm, kwargs.get("attention_mask")):
        return vlm.generate(*args, streamer=streamer, custom_generate=custom_generate, **kwargs)


def counting_embeddings(vlm: torch.nn.Module) -> list[torch.nn.Module]:
    """Embeddings that count positions themselves, from their padding token's id on (Kosmos-2's and Kosmos-2.5's)."""
    return [module for module in vlm.modules() if hasattr(module, "create_position_ids_from_input_ids")]


@contextmanager
def positions_without_padding(vlm: torch.nn.Module, attention_mask: torch.Tensor | None) -> Iterator[None]:
    """While a VLM writes, let embeddings that count positions themselves leave out the padding in front of a row.

    They do so for a whole sequence, but to a written token they add the length of the whole cache.

    Args:
        vlm (`nn.Module`): Nothing happens where its embeddings get their positions.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Of the prompts.
    """
    counting = counting_embeddings(vlm)
    if attention_mask is None or not counting:
        yield
        return
    padding = (attention_mask.cumsum(1) == 0).sum(1)

    def give_positions(module, args, kwargs):
        past = kwargs.get("cache_length", kwargs.get("past_key_values_length")) or 0  # the latter until 5.23
        ids = kwargs.get("input_ids")
        if not past or ids is None:
            return None
        left_out = padding.repeat_interleave(len(ids) // len(padding))  # of beams and several answers too
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device) + module.padding_idx + past
        return args, {**kwargs, "position_ids": places - left_out.to(ids.device)[:, None]}

    handles = [module.register_forward_pre_hook(give_positions, with_kwargs=True) for module in counting]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_growing_cache(implementation: str | None) -> None:
    """Refuse a `cache_implementation` of a fixed length.

    Raises:
        ValueError: It is none of [`GROWING_CACHES`].
    """
    if implementation not in (None, *GROWING_CACHES):
        raise ValueError(
            f"cache_implementation={implementation!r} has no room for the step that completes the last token's "
            f"states; use one of {', '.join(GROWING_CACHES)}."
        )


def _deciding_format(
    asked: list, criteria: StoppingCriteriaList, generation_config: Any, mode: dict
) -> "SegCompassFormatLogitsProcessor | None":
    """The format, where it has the last word on what is written, and nobody looks at single steps."""
    form = asked[-1] if asked else None
    others = [one for one in criteria if not isinstance(one, (EosTokenCriteria, MaxLengthCriteria))]
    seen = mode.get("streamer") is not None or mode.get("synced_gpus") or generation_config.return_dict_in_generate
    if others or seen:
        return None
    return form if isinstance(form, SegCompassFormatLogitsProcessor) else None


class _AllButLast:
    """A streamer that keeps the last thing put into it to itself."""

    def __init__(self, streamer: Any):
        self.streamer, self.held = streamer, None

    def put(self, value: torch.Tensor) -> None:
        if self.held is not None:
            self.streamer.put(self.held)
        self.held = value

    def end(self) -> None:
        self.streamer.end()


def _without_last(output: Any) -> Any:
    """What `generate` returns, without its last step."""
    if isinstance(output, torch.Tensor):
        return output[:, :-1]
    for name, value in output.items():
        output[name] = value[:-1] if isinstance(value, tuple) else value
    output["sequences"] = output["sequences"][:, :-1]
    return output


def _with_stop_strings(kwargs: dict, tokenizer: Any) -> dict:
    """Arguments with stop strings as a criterion: a loop of the caller's gets no tokenizer for them."""
    config = copy.copy(kwargs.get("generation_config"))
    words = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not words:
        return kwargs
    if config is not None:
        config.stop_strings, kwargs["generation_config"] = None, config
    criteria = [*(kwargs.get("stopping_criteria") or []), StopStringCriteria(tokenizer, words)]
    return {**kwargs, "stopping_criteria": StoppingCriteriaList(criteria)}


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

    def rest(
        self, input_ids: torch.LongTensor, ended: torch.Tensor, pad_token_id: torch.Tensor | int
    ) -> torch.LongTensor | None:
        """What follows in every row, up to its end; `None` where the model is free in one of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens so far, at least one of the
                completion.
            ended (`torch.BoolTensor` of shape `(batch_size,)`): Rows that have ended.
            pad_token_id (`torch.Tensor` or `int`): What stands behind the end.

        Returns:
            `torch.LongTensor` of shape `(batch_size, number)`, or `None`.
        """
        completion = input_ids[:, self.prompt_length :]
        is_closed = (completion == self.end).any(dim=1)
        if completion.shape[1] - 1 < self.max_reasoning_tokens and not bool((is_closed | ended).all()):
            return None
        place = torch.arange(self.num_slots + 2, device=input_ids.device)  # </think>, <REF_POS>, end
        refs_from = (~is_closed).long()
        end = refs_from + self.num_slots - (completion == self.ref).sum(dim=1)  # place of the end
        rest = torch.full((len(place),), self.ref, device=input_ids.device).repeat(len(completion), 1)
        rest[place < refs_from[:, None]] = self.end
        rest[place == end[:, None]] = self.eos
        rest[(place > end[:, None]) | ended[:, None]] = int(pad_token_id)
        return rest[:, : int(end.masked_fill(ended, -1).max()) + 1]

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


__all__ = ["SegCompassFormatLogitsProcessor", "generate_and_feed_last"]
