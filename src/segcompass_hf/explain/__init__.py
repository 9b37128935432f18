# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Looking into an answer: figures of reasoning, heatmaps and masks."""

import importlib
from typing import Any

_EXPORTS = {"SegmentationRow": "figure", "plot_segmentations": "figure"}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
