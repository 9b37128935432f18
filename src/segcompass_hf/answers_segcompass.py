# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers in the loop of `generate`: a prompt passes the VLM once for all of its answers, and none beyond its end."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from .text_stack_segcompass import rows_of_pass, to_all_rows

LEFT_TO_REARRANGE = 0.75  # of the answers that pass: so few make copying their keys and values worth while


def answers_to_sample(vlm: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many answers to a prompt `vlm.generate(**kwargs)` would sample, and arguments that ask for one.

    Answers that are not sampled are left to `generate`, which refuses to write the same one several times.
    """
    config = kwargs.get("generation_config")
    settings = vlm.generation_config if config is None else config
    number = kwargs.get("num_return_sequences") or settings.num_return_sequences or 1
    if number == 1 or not kwargs.get("do_sample", settings.do_sample):
        return 1, kwargs
    one = {name: value for name, value in kwargs.items() if name != "num_return_sequences"}
    if config is None:
        return number, one | {"num_return_sequences": 1}
    config = copy.copy(config)
    config.num_return_sequences = 1
    return number, one | {"generation_config": config}


class OneStepLater(StoppingCriteria):
    """The verdict of other criteria, but the step in which the last row ends is followed by one more.

    Rows that ended before stay ended, so that all but the last column is as it were without. Likewise with the step
    from which on the rest of every row is known, `rest` `(rows, number)`.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.criteria = criteria
        self.rest_of: Callable[[torch.Tensor], torch.Tensor | None] = lambda ids: None
        self.rest: torch.Tensor | None = None
        self.ended: torch.Tensor | None = None  # (rows,)
        self.over = False  # all rows have ended; the step that runs is the one more
        if any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            self.eos_token_id = None  # by this `generate` knows that rows which ended are padded

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self.over:
            return torch.ones_like(self.ended)
        ended = self.criteria(input_ids, scores, **kwargs)
        self.ended = ended if self.ended is None else self.ended | ended
        self.over = bool(self.ended.all())
        if not self.over:
            self.rest = self.rest_of(input_ids)
            self.over = self.rest is not None
        return torch.zeros_like(ended) if self.over else ended


def can_rearrange(cache: Any) -> bool:
    """Whether it is a cache whose rows can be put in another order; the quantized ones learned it after 5.17."""
    if not hasattr(cache, "reorder_cache"):
        return False
    quantized = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "_quantize")]
    return all(type(layer).reorder_cache is not DynamicLayer.reorder_cache for layer in quantized)


def takes_several_tokens(caches: list[Any], inputs: dict[str, Any]) -> bool:
    """Whether a pass behind the prompt may be of several tokens.

    Attention alone has to look back (recurrent layers have another rule for one token than for several), and what has
    an entry per token has to be known to [`with_rest`].
    """
    states = [linear for cache in caches for linear in getattr(cache, "is_linear", [True])]
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not caches or any(states) or not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return False
    per_token = {
        name
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[:2] == ids.shape
    }
    return ids.shape[1] == 1 and mask.ndim == 2 and all(name in _GROWS or _is_type(name) for name in per_token)


def with_rest(inputs: dict[str, Any], rest: torch.Tensor) -> dict[str, Any]:
    """Inputs of a pass of one token per row, with `rest` `(rows, number)` behind it."""
    number = rest.shape[1]
    steps = torch.arange(1, number + 1, device=rest.device)
    longer = {
        "input_ids": lambda value: rest.to(value),
        "attention_mask": lambda value: value.new_ones(len(value), number),
        "position_ids": lambda value: value[..., -1:] + steps.to(value),  # (rows, 1), or (3 or 4, rows, 1)
        "cache_position": lambda value: value[-1:] + steps.to(value),  # of older versions, (1,)
    }
    grown = {name: longer[name] for name in _GROWS if isinstance(inputs.get(name), torch.Tensor)}
    types = [name for name, value in inputs.items() if _is_type(name) and isinstance(value, torch.Tensor)]
    grown |= {name: lambda value: value[..., -1:].expand(*value.shape[:-1], number) for name in types}
    return inputs | {name: torch.cat([inputs[name], more(inputs[name])], -1) for name, more in grown.items()}


_GROWS = ("input_ids", "attention_mask", "position_ids", "cache_position")  # by a rule of ours


def _is_type(name: str) -> bool:
    return name.endswith("token_type_ids")


class AnswerWriter:
    """A VLM as the loop of `generate` sees it, which spends nothing on what it has computed or nobody reads.

    Prompts pass it once, however many answers each has; then what was kept of them is repeated. Answers that have
    ended pass it no more: what the loop is told of them is 0. Where no cache can be rearranged, every answer passes
    with its own prompt, and to the end of the longest. The rest of all answers, once it is known, passes at once.

    Args:
        vlm (`PreTrainedModel`): The VLM itself.
        copies (`int`): Answers per prompt.
        input_ids (`torch.LongTensor` of shape `(num_prompts, prompt_length)`): Prompts.
        model_kwargs (`dict[str, Any]`): What `generate` prepared for them, the cache too.
        generation_config (`GenerationConfig`): Likewise.
        ended (`Callable`, *optional*): Says which answers have ended, `(num_prompts * copies,)`; `None` at first.
            Without it none is left out.
        rest (`Callable`, *optional*): Says which tokens follow the last one of every answer, `(rows, number)`; `None`
            while that is not known. Behind their pass there is none: what it gave is given again.

    Attributes:
        takes_several (`bool`, *optional*): Whether a pass may be of several tokens; known after the first of one.
        all_ids (`torch.LongTensor` of shape `(num_prompts * copies, prompt_length)`): The prompt of every answer.
        all_kwargs (`dict[str, Any]`): `model_kwargs` for these.
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        copies: int,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        generation_config: GenerationConfig,
        ended: Callable[[], torch.Tensor | None] | None = None,
        rest: Callable[[], torch.Tensor | None] | None = None,
    ):
        self.vlm, self.output, self.ended, self.rest = vlm, None, ended, rest
        self.takes_several, self.last_output = None, None
        self.caches = [value for value in model_kwargs.values() if can_rearrange(value)]
        if not self.caches or generation_config.output_hidden_states or generation_config.output_attentions:
            self.ended = None
        self.rows: torch.Tensor | None = None  # that still pass; all while it is None
        self._passed: torch.Tensor | None = None  # (rows,), whose last token has passed
        self.all_ids, self.all_kwargs = input_ids, model_kwargs
        if copies == 1:
            return
        if self.caches:
            self.output = vlm._prefill(input_ids, generation_config, model_kwargs)
            self.output["logits"] = self.output["logits"][:, -1:]
            rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(copies)
            for cache in self.caches:
                cache.reorder_cache(rows)
            _change(self.output, len(input_ids), lambda value: value.index_select(0, rows.to(value.device)))
            # Read by the first pass alone, and not every family can repeat them.
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_encoder_outputs"}
        # Last: a family's rule may change what it is given.
        self.all_ids, self.all_kwargs = vlm._expand_inputs_for_generation(
            expand_size=copies, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vlm, name)

    def _prefill(self, *args, **kwargs) -> Any:
        """The first pass of the loop, which may be over."""
        output, self.output = self.output, None
        return self.vlm._prefill(*args, **kwargs) if output is None else output

    def __call__(self, **inputs) -> Any:
        """The pass of one token per answer."""
        if self.last_output is not None:
            return self.last_output
        if self.ended is None or "position_ids" not in inputs:
            return self.vlm(**inputs)
        self._leave_out_ended()
        if self.takes_several is None:
            self.takes_several = takes_several_tokens(self.caches, inputs)
        rest = None if self.rest is None else self.rest()
        if rest is None:
            return self._pass(inputs)
        self.last_output = self._pass(with_rest(inputs, rest))
        return self.last_output

    def _pass(self, inputs: dict[str, Any]) -> Any:
        if self.rows is None:
            return self.vlm(**inputs)
        number = len(self.all_ids)
        inputs = {name: self._picked(name, value, number) for name, value in inputs.items()}
        with rows_of_pass(self.rows, number):
            output = self.vlm(**inputs)
        _change(output, len(self.rows), lambda value: to_all_rows(value, self.rows, number))
        return output

    def _leave_out_ended(self) -> None:
        """Rearrange the caches where enough answers have ended, and their last tokens passed, since the last time."""
        if self._passed is not None:
            rows = torch.arange(len(self._passed), device=self._passed.device) if self.rows is None else self.rows
            places = (~self._passed[rows]).nonzero().flatten()
            if 0 < len(places) <= LEFT_TO_REARRANGE * len(rows):
                self.rows = rows[places]
                for cache in self.caches:
                    cache.reorder_cache(places)
        ended = self.ended()
        self._passed = None if ended is None else ended.clone()

    def _picked(self, name: str, value: Any, number: int) -> Any:
        axis = 1 if name == "position_ids" and value.ndim == 3 else 0  # (3 or 4, rows, tokens)
        if not isinstance(value, torch.Tensor) or value.ndim <= axis or value.shape[axis] != number:
            return value
        return value.index_select(axis, self.rows.to(value.device))


def _change(value: Any, rows: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`change` tensors of so many rows in outputs; outputs within are changed in place."""
    if isinstance(value, ModelOutput):
        for name, each in list(value.items()):
            value[name] = _change(each, rows, change)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_change(each, rows, change) for each in value)
    return change(value) if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value


__all__ = ["AnswerWriter", "OneStepLater", "answers_to_sample"]
