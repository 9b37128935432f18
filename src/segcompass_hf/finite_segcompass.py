# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Values that are not numbers: the stage that gave them is named, and the weights that hold such."""

import torch
from torch import nn


def check_finite(model: nn.Module, name: str, *tensors: torch.Tensor) -> None:
    """Raise where a stage's output is not a number, instead of returning masks that mean nothing.

    Args:
        model (`nn.Module`): Whose stage it is.
        name (`str`): Of the stage, as a submodule.
        tensors (`torch.Tensor`): Its output.

    Raises:
        ValueError: NaN or infinities; the message names the stage, and the weights that hold them.
    """
    for tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"`{name}` gave {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values that are not "
                f"finite. {non_finite_parameters(model.get_submodule(name), name)}"
            )


def non_finite_parameters(module: nn.Module, name: str) -> str:
    """Name the weights that hold NaN or infinities, or say that none does."""
    weights = [(key, value) for key, value in module.named_parameters() if not value.is_meta]  # offloaded ones are
    bad = [key for key, value in weights if not bool(torch.isfinite(value).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"These weights are broken: {', '.join(f'{name}.{key}' for key in bad[:3])}{more}; reload them."
    return "Its weights are finite, so its input was not or its dtype overflows; try dtype=torch.float32 or bfloat16."


__all__ = ["check_finite", "non_finite_parameters"]
