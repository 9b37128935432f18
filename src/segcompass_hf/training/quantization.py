# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""4-bit and 8-bit bases through bitsandbytes: the language model's decoder layers shrink, everything else stays."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..configuration_segcompass import SegCompassConfig
from ..loading_segcompass import full_precision_modules
from ..modeling_segcompass import SegCompassForReasoningSegmentation
from ..text_stack_segcompass import decoder_layers


def quantization_config(
    model_or_config: PreTrainedModel | SegCompassConfig,
    bits: Literal[4, 8] = 4,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    **kwargs: Any,
) -> BitsAndBytesConfig:
    """What `from_pretrained(..., quantization_config=...)` takes: the decoder layers in NF4 or int8, and nothing else.

    Vision tower, projector, embeddings, `lm_head`, SAE, codebook, slot encoder, slot mapper and SAM keep their
    precision: 4 bits break SAM and the heads, and move the SAE's input.

    Args:
        model_or_config ([`SegCompassForReasoningSegmentation`] or [`SegCompassConfig`]): Of the base.
        bits (`int`, defaults to 4): 4 is NF4, 8 is LLM.int8().
        compute_dtype (`torch.dtype`, *optional*): Of the products of 4-bit layers; bfloat16 on a GPU that has it,
            float32 elsewhere when left out.
        double_quant (`bool`, defaults to `True`): Quantise the scales of 4-bit weights too (0.4 bits per weight less).
        kwargs: Further fields of `BitsAndBytesConfig`.

    Example:

    ```python
    config = SegCompassConfig.from_pretrained(path)
    model = SegCompassForReasoningSegmentation.from_pretrained(path, quantization_config=quantization_config(config))
    ```
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    skip = full_precision_modules(config, SegCompassForReasoningSegmentation)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip, **kwargs)
    if bits != 4:
        raise ValueError(f"bitsandbytes quantises to 4 or 8 bits, got bits={bits}.")
    if compute_dtype is None:
        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        compute_dtype = torch.bfloat16 if on_gpu else torch.float32
    fields = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": skip,
    }
    return BitsAndBytesConfig(**{**fields, **kwargs})


def quantized_modules(model: nn.Module) -> list[str]:
    """Names of the modules that bitsandbytes quantised."""
    import bitsandbytes as bnb

    return [
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    ]


def check_quantization(model: PreTrainedModel) -> list[str]:
    """Names of the quantised modules, after making sure that they are the decoder's linear layers, all and only these.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): Without an adapter.

    Raises:
        ValueError: Something else is quantised, or a decoder layer is not.
    """
    layers = decoder_layers(model.vlm)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linear = {f"{prefix}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    quantized = quantized_modules(model)
    beside, left = sorted(set(quantized) - linear), sorted(linear - set(quantized))
    if beside or left:
        named = beside or left
        raise ValueError(
            f"{len(named)} modules {'beside the decoder are' if beside else 'of the decoder are not'} quantised "
            f"({', '.join(named[:3])}{', ...' if len(named) > 3 else ''}); load with quantization_config(config)."
        )
    return quantized


__all__ = ["check_quantization", "quantization_config", "quantized_modules"]
