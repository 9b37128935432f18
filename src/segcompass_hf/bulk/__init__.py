# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers for whole data sets: shards in, Parquet out, on one process, several, or a cluster, always the same rows.

`predict_dataset(PredictionJob("pictures", "out", instructions=("the dog",)))` asks a checkpoint; each name is loaded
when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
