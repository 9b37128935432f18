# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Training, stage by stage: warm-up, SAE, supervised segmentation, joint training with reinforcement.

Each name is loaded when first used, so that an SAE can be trained where TRL is not installed. `recipe` runs the
stages one after the other, as `segcompass train` does.
"""

from __future__ import annotations

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
