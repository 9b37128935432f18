# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From a stage's settings to the memory it needs."""

from __future__ import annotations

from typing import Any

import torch

from ...configuration_segcompass import SegCompassConfig
from ...modeling_segcompass import SegCompassForReasoningSegmentation
from .estimate import MemoryEstimate, estimate_memory
from .setup import TrainingSetup


def estimate_stage(
    stage: str,
    arguments: Any,
    config: SegCompassConfig,
    lora_r: int = 0,
    dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = False,
    completion_tokens: int = 512,
    **others: Any,
) -> MemoryEstimate:
    """Memory of a stage with the settings of its trainer.

    Args:
        stage (`str`): `"warmup"`, `"sae"`, `"segmentation"` or `"grpo"`.
        arguments (`TrainingArguments`): Of its trainer.
        config ([`SegCompassConfig`]): Of the whole model.
        lora_r (`int`, defaults to 0): Rank of adapters, which are kept in float32; 0: none.
        dtype (`torch.dtype`, defaults to float32): What weights are loaded in.
        load_in_4bit (`bool`, defaults to `False`): Whether the decoder is in NF4.
        completion_tokens (`int`, defaults to 512): Of a reference answer; GRPO has a limit of its own.
        others: Fields of [`TrainingSetup`]: `gpus`, `sharding`, `prompt_tokens`, `active_concepts`.

    Raises:
        ValueError: an optimizer whose states are not known.
    """
    adapter = None
    if lora_r:
        from ..adapters import lora_config

        with torch.device("meta"):
            model = SegCompassForReasoningSegmentation(config)
        heads = "none" if stage == "warmup" else "full"
        adapter = lora_config(model, r=lora_r, alpha=2 * lora_r, heads=heads)
    if stage != "grpo":
        others["completion_tokens"] = completion_tokens
    trainable_dtype = torch.float32 if lora_r else dtype
    setup = TrainingSetup.from_arguments(
        stage, arguments, dtype=dtype, trainable_dtype=trainable_dtype, load_in_4bit=load_in_4bit, **others
    )
    return estimate_memory(config, setup, adapter)


__all__ = ["estimate_stage"]
