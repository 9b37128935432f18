# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation that others can repeat: predictors, a resumable runner on several processes, and its reports.

`evaluate_dataset(predictor, dataset, output_dir)` scores whatever follows `Predictor` on any data set in the row
schema. Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
