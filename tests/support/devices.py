# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The device that `tests/test_devices.py` runs on, and how far results may lie from float32 on the CPU."""

import os

import torch

DEVICE = os.environ.get("SEGCOMPASS_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, whatever their devices and dtypes."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def on_device(inputs: dict, dtype: torch.dtype = torch.float32) -> dict:
    """Inputs on the device, pictures in `dtype`."""
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return {name: value.to(DEVICE) for name, value in cast.items()}
