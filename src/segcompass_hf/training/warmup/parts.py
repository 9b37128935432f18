# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What of a VLM trains in the warm-up."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ...freezing_segcompass import train_rows
from ...text_stack_segcompass import decoder_layers, final_norm
from ..vision import VISION_ENCODERS, vision_encoder

PROJECTORS = ("merger", "projector", "connector")  # parts of names; the Qwens keep theirs inside the encoder


def choose_trainable(
    vlm: nn.Module, trainable: Literal["all", "without_vision", "decoder"], token_ids: list[int]
) -> None:
    """Leave trainable what the warm-up trains.

    Args:
        vlm (`PreTrainedModel`): Changed in place.
        trainable (`str`): `"all"`, all `"without_vision"` encoder, or the `"decoder"` layers and final norm with the
            embedding rows of `token_ids`.
        token_ids (`list[int]`): The added tokens.

    Raises:
        ValueError: the family keeps its vision encoder under a name that is not known here.
    """
    if trainable == "decoder":
        vlm.requires_grad_(False)
        decoder_layers(vlm).requires_grad_(True)
        final_norm(vlm).requires_grad_(True)
        train_rows(vlm, "both", token_ids)
        return
    vlm.requires_grad_(True)
    if trainable == "all":
        return
    encoder = vision_encoder(vlm)
    if encoder is None:
        raise ValueError(
            f"{type(vlm.base_model).__name__} has none of {', '.join(VISION_ENCODERS)}, so its vision encoder cannot "
            'be told apart; pass trainable="all" or "decoder".'
        )
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(any(part in name for part in PROJECTORS))


def add_adapters_to_vlm(vlm: nn.Module, peft_config: Any, token_ids: list[int]) -> nn.Module:
    """A `PeftModel` around a VLM; the rows of the added tokens train with it, unless the configuration trains
    embeddings in its own way.

    Args:
        vlm (`PreTrainedModel`): Changed in place.
        peft_config (`peft.PeftConfig`): For instance a `LoraConfig`.
        token_ids (`list[int]`): The added tokens, which are random until trained.
    """
    from peft import get_peft_model

    own_rows = getattr(peft_config, "trainable_token_indices", None) or getattr(peft_config, "modules_to_save", None)
    if hasattr(peft_config, "trainable_token_indices") and not own_rows:
        embeddings, head = vlm.get_input_embeddings(), vlm.get_output_embeddings()
        modules = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
        names = {name for name, module in vlm.named_modules() if any(module is known for known in modules)}
        peft_config.trainable_token_indices = {name: sorted(token_ids) for name in names}
    return get_peft_model(vlm, peft_config)
