# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sharing: original checkpoints in, checkpoints and cards out. Each name is loaded when first used."""

from __future__ import annotations

from .._lazy import lazy_names

# Submodule -> public names that it defines.
_EXPORTS = {
    "conversion.from_original": ("convert_original_checkpoint", "load_original_sae"),
    "conversion.segmenters": ("convert_original_sam", "load_original_sam"),
    "conversion.to_original": ("convert_to_original_checkpoint",),
    "composition": ("compose_checkpoint",),
    "segmenter_swap": ("swap_segmenter",),
    "space.write": ("write_space",),
    "publishing.push": ("push_to_hub", "ModelPublication"),
    "publishing.stage": ("stage_checkpoint",),
    "publishing.checks": ("check_stage",),
    "publishing.card": ("write_model_card", "render_model_card", "recipe_names"),
}
__all__ = [name for names in _EXPORTS.values() for name in names]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
