# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Several answers to a prompt: the prompt passes the VLM once, and all of them go on behind it."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


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


class PrefilledOnce:
    """A VLM that writes several answers to every prompt; stands in for it in the loop of `generate`.

    Prompts pass it as they are, then what was kept of them is repeated. Where no cache keeps it, the loop passes every
    prompt as often as it is answered.

    Args:
        vlm (`PreTrainedModel`): The VLM itself.
        copies (`int`): Answers per prompt.
        input_ids (`torch.LongTensor` of shape `(num_prompts, prompt_length)`): Prompts.
        model_kwargs (`dict[str, Any]`): What `generate` prepared for them, the cache too.
        generation_config (`GenerationConfig`): Likewise.

    Attributes:
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
    ):
        self.vlm, self.output = vlm, None
        self.all_ids, self.all_kwargs = input_ids, model_kwargs
        if copies == 1:
            return
        caches = [value for value in model_kwargs.values() if hasattr(value, "reorder_cache")]
        if caches:
            self.output = vlm._prefill(input_ids, generation_config, model_kwargs)
            self.output["logits"] = self.output["logits"][:, -1:]
            rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(copies)
            for cache in caches:
                cache.reorder_cache(rows)
            for name, value in self.output.items():
                self.output[name] = _of_rows(value, rows, len(input_ids))
        # Last: a family's rule may change what it is given.
        self.all_ids, self.all_kwargs = vlm._expand_inputs_for_generation(
            expand_size=copies, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vlm, name)

    def __call__(self, *args, **kwargs) -> Any:
        return self.vlm(*args, **kwargs)

    def _prefill(self, *args, **kwargs) -> Any:
        """The first pass of the loop, which is over."""
        output, self.output = self.output, None
        return self.vlm._prefill(*args, **kwargs) if output is None else output


def _of_rows(value: Any, rows: torch.Tensor, num_prompts: int) -> Any:
    """A tensor, or several, with the entries of prompts repeated for `rows`."""
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(each, rows, num_prompts) for each in value)
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == num_prompts:
        return value.index_select(0, rows.to(value.device))
    return value


__all__ = ["PrefilledOnce", "answers_to_sample"]
