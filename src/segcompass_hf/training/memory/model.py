# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A model of shapes without values, frozen as a stage of training freezes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...configuration_segcompass import SegCompassConfig
from ...modeling_segcompass import SegCompassForReasoningSegmentation

if TYPE_CHECKING:
    from .setup import TrainingSetup

HEADS = ("codebook", "slot_encoder", "slot_mapper")


@contextmanager
def fake_model(
    config: SegCompassConfig, peft_config: Any | None = None, stage: str = "grpo", trainable: str = "without_vision"
) -> Iterator[nn.Module]:
    """A model without values; tensors made inside the context have none either.

    Args:
        config ([`SegCompassConfig`]): Of the model.
        peft_config (`peft.PeftConfig`, *optional*): Adapters; what they replace does not train then.
        stage (`str`, defaults to `"grpo"`): `"warmup"` keeps the VLM alone, `"sae"` the VLM and the SAE.
        trainable (`str`, defaults to `"without_vision"`): See [`TrainingSetup`].
    """
    with torch.device("meta"):
        model = SegCompassForReasoningSegmentation(config)
        for name in {"warmup": (*HEADS, "sam", "sae"), "sae": (*HEADS, "sam")}.get(stage, ()):
            delattr(model, name)
        if peft_config is not None:
            from peft import get_peft_model

            get_peft_model(model, peft_config)  # changes the model itself
    with FakeTensorMode():
        _to_fake(model)
        if peft_config is None:
            _freeze(model, stage, trainable)
        yield model.train()


def _freeze(model: nn.Module, stage: str, trainable: str) -> None:
    if stage == "warmup":
        from ..warmup.parts import choose_trainable

        choose_trainable(model.vlm, trainable, [])
    elif stage == "sae":
        model.requires_grad_(False)
        model.sae.requires_grad_(True)
    else:
        model.freeze_for_training(trainable="masks" if trainable == "masks" else "joint")


def _to_fake(model: nn.Module) -> None:
    """Replace tensors of the meta device by fake ones of the CPU, where autocast and attention act as in training."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[id(tensor)]


def cast_weights(model: nn.Module, setup: TrainingSetup) -> None:
    """Bring weights to the dtypes they have while computing."""
    for name, parameter in model.named_parameters():
        if "positional_embedding" in name or "shared_embedding" in name:
            continue  # SAM's positions stay in float32
        if setup.sharding != "none" and setup.autocast:
            parameter.data = parameter.data.to(torch.bfloat16)
        else:
            parameter.data = parameter.data.to(setup.trainable_dtype if parameter.requires_grad else setup.dtype)
