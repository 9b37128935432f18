# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Looking into an answer: which concepts made which mask, tested causally; figures and reports of it.

Each name is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> submodule that defines it.
_EXPORTS = {
    "SegmentationRow": "FIG",
    "plot_segmentations": "FIG",
    "explain": "explaining",
    "Answer": "answer",
    "mask_iou": "answer",
    "Attribution": "attribution",
    "attribute": "attribution",
    "ablate": "causal",
    "steer": "causal",
    "steer_many": "causal",
    "capture": "replay",
    "Replay": "replay",
    "CapturedSegmentation": "replay",
    "faithfulness_curves": "faithfulness",
    "feature_orders": "faithfulness",
    "bootstrap_interval": "faithfulness",
    "FaithfulnessCurves": "faithfulness",
    "minimal_sufficient_set": "sufficient",
    "SufficientSet": "sufficient",
    "Explanation": "explanation",
    "MaskExplanation": "explanation",
    "ConceptAttribution": "explanation",
    "Ablation": "explanation",
    "Token": "explanation",
    "TokenShare": "explanation",
    "mask_to_rle": "explanation",
    "token_kinds": "token_kinds",
    "measure_claims": "claims.measure",
    "claims_figures": "claims.figures",
    "claims_markdown": "claims.report",
    "plot_claims": "claims.report",
    "ConceptDictionary": "dictionary.dictionary",
    "ConceptEntry": "dictionary.dictionary",
    "scenes_objects": "dictionary.objects",
    "target_objects": "dictionary.objects",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value  # the next access does not come here
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
