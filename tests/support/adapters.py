# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of adapters and of quantised models share."""

import torch
from model_inputs import inputs_of
from peft import PeftModel


@torch.no_grad()
def move(model: PeftModel, seed: int = 0) -> PeftModel:
    """Change everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@torch.no_grad()
def outputs_of(model, family: str = "llava") -> list[torch.Tensor]:
    output = model(**inputs_of(family, training=True))
    return [output.loss, output.logits, output.heatmap_logits, output.slot_logits, output.pred_masks]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cast_as_trl_does(model: PeftModel) -> PeftModel:
    """What GRPOTrainer does to an adapter on a quantised base."""
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model
