# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Batch norms normalise by what they have stored, in training as afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_stored_statistics(model: nn.Module) -> nn.Module:
    """Keep the batch norms of a model in evaluation, whatever `model.train()` says.

    Vision encoders with batch norms were trained on large batches. The few images of a step here would be normalised
    by each other, other than when the model is used, and a frozen encoder would change by being read. Gains and biases
    train as before.

    Args:
        model (`nn.Module`): Gets a hook on each of its batch norms; nothing where it has none.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(_evaluate)
    return model


def _evaluate(module: nn.Module, _: Any) -> None:
    module.eval()


__all__ = ["keep_stored_statistics"]
