# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Looking into an answer: which concepts made which mask, tested causally; figures and reports of it.

Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Submodule -> public names that it defines.
_EXPORTS = {
    "..figure": ("SegmentationRow", "plot_segmentations"),
    "explaining": ("explain",),
    "answer": ("Answer", "mask_iou"),
    "attribution": ("Attribution", "attribute"),
    "causal": ("ablate", "steer", "steer_many"),
    "replay": ("capture", "Replay", "CapturedSegmentation"),
    "faithfulness": ("faithfulness_curves", "feature_orders", "FaithfulnessCurves"),
    "..metrics.intervals": ("bootstrap_interval",),
    "sufficient": ("minimal_sufficient_set", "SufficientSet"),
    "explanation": (
        "Explanation",
        "MaskExplanation",
        "ConceptAttribution",
        "Ablation",
        "Token",
        "TokenShare",
    ),
    "report.payload": ("mask_to_rle",),
    "..token_kinds": ("token_kinds",),
    "claims.measure": ("measure_claims",),
    "claims.figures": ("claims_figures",),
    "claims.report": ("claims_markdown", "plot_claims"),
    "controls.ablations": ("matched_ablation", "union_tests"),
    "controls.patches": ("causal_patches",),
    "controls.reasoning": ("reasoning_test",),
    "controls.seeds": ("match_features",),
    "controls.running": ("run_controls",),
    "dictionary.dictionary": ("ConceptDictionary", "ConceptEntry"),
    "..concept_names_segcompass": ("NamedConcept",),
    "drift": ("DriftMonitor", "DriftReport", "concept_histograms"),
    "..data.scenes.names": ("scenes_objects",),
    "dictionary.names": ("ConceptName",),
    "dictionary.families": ("ConceptFamily", "group_concepts"),
    "dictionary.effects": ("ConceptEffect",),
    "effects": ("measure_effects",),
    "dictionary.interpretation": ("Interpreter", "interpret", "detection_score"),
    "dictionary.neuronpedia": ("save_neuronpedia",),
    "dictionary.objects": ("target_objects", "NamedObject"),
}
__all__ = [name for names in _EXPORTS.values() for name in names]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
