# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Looking into an answer: which concepts made which mask, tested causally; figures and reports of it.

Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Public name -> submodule that defines it.
_EXPORTS = {
    "SegmentationRow": "..figure",
    "plot_segmentations": "..figure",
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
    "scenes_objects": "..data.scenes.names",
    "target_objects": "dictionary.objects",
}
__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
