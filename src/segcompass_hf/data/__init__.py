# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets in one row format (`schema`): the benchmarks, your own folders, and Scenes, the procedural benchmark.

Every builder returns a `datasets.Dataset` in the row schema and takes `report=BuildReport()`, which then lists what
could not be used. Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, _MODULES)
