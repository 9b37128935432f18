# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sharing: original checkpoints in, checkpoints and cards out. Each name is loaded when first used."""

from __future__ import annotations

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
