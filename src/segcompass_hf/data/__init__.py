# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets in one row format (`schema`): the benchmarks, your own folders, and Scenes, the procedural benchmark.

Every builder returns a `datasets.Dataset` in the row schema and takes `report=BuildReport()`, which then lists what
could not be used. Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Submodule -> public names that it defines.
_EXPORTS = {
    "builders.build_report": ("BuildReport",),
    "embedding_cache": ("EmbeddingCache",),
    "slot_cache": ("SlotCache",),
    "collator": ("SegmentationCollator",),
    "builders.coco": ("build_coco",),
    "builders.folder": ("build_folder",),
    "builders.splitting": ("build_folder_splits", "split_by_image"),
    "builders.refer": ("build_grefcoco", "build_refcoco"),
    "builders.reasonseg": ("build_reasonseg",),
    "schema": ("decode_mask", "decode_masks", "encode_mask", "row_features"),
    "builders.leakage": ("eval_image_ids", "same_pictures"),
    "builders.hosted": ("from_hosted_reasonseg",),
    "hosting.publish": ("push_dataset",),
    "hosting.write": ("write_dataset",),
}
_MODULES = ("scenes",)
__all__ = [*(name for names in _EXPORTS.values() for name in names), *_MODULES]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, _MODULES)
