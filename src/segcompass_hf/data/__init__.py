# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets in one row format (`schema`): the benchmarks, your own folders, and Scenes, the procedural benchmark.

Every builder returns a `datasets.Dataset` in the row schema and takes `report=BuildReport()`, which then lists what
could not be used. Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
__all__ += ["scenes"]
