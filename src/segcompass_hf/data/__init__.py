# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets in one row format (`schema`): the benchmarks, your own folders, and Scenes, the procedural benchmark.

Every builder returns a `datasets.Dataset` in the row schema and takes `report=BuildReport()`, which then lists what
could not be used. Each name is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> submodule that defines it.
_EXPORTS = {
    "BuildReport": "builders.build_report",
    "EmbeddingCache": "embedding_cache",
    "SegmentationCollator": "collator",
    "build_coco": "builders.coco",
    "build_folder": "builders.folder",
    "build_folder_splits": "builders.splitting",
    "split_by_image": "builders.splitting",
    "build_grefcoco": "builders.refer",
    "build_reasonseg": "builders.reasonseg",
    "build_refcoco": "builders.refer",
    "decode_mask": "schema",
    "decode_masks": "schema",
    "encode_mask": "schema",
    "eval_image_ids": "builders.leakage",
    "from_hosted_reasonseg": "builders.hosted",
    "push_dataset": "hosting.publish",
    "row_features": "schema",
    "write_dataset": "hosting.write",
}
_MODULES = ("scenes",)
__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
