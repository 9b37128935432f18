# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights that `accelerate` keeps on the CPU or on disk, loaded where they are read outside of a `forward`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def weights_at_hand(*modules: nn.Module, recurse: bool = True) -> Iterator[None]:
    """Load the offloaded weights of modules and, with `recurse`, of what they hold, for the time of the context.

    The hooks of `device_map` and `cpu_offload` load weights for each module's own `forward`. An SAE's `encode` is
    none, and SAM's mask decoder reads weights of embeddings that it never calls. Without hooks nothing is done.
    """
    parts = [module for part in modules for module in (part.modules() if recurse else [part])]
    hooked = [module for module in parts if hasattr(module, "_hf_hook")]
    try:
        for module in hooked:
            module._hf_hook.pre_forward(module)
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)


def execution_device(model: nn.Module) -> torch.device | None:
    """Where a model with offloaded weights computes, and so wants its inputs; `None` without any."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(place) for place in places if place is not None), None)
