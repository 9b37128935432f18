# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sharing: original checkpoints in, checkpoints and cards out. Each name is loaded when first used."""

from __future__ import annotations

from .._lazy import lazy_names

# Public name -> submodule that defines it.
_EXPORTS = {
    "convert_original_checkpoint": "conversion.from_original",
    "convert_to_original_checkpoint": "conversion.to_original",
    "load_original_sae": "conversion.from_original",
    "load_original_sam": "conversion.from_original",
    "compose_checkpoint": "composition",
    "write_space": "space.write",
    "push_to_hub": "publishing.push",
    "ModelPublication": "publishing.push",
    "stage_checkpoint": "publishing.stage",
    "check_stage": "publishing.checks",
    "write_model_card": "publishing.card",
    "render_model_card": "publishing.card",
    "recipe_names": "publishing.card",
}
__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
