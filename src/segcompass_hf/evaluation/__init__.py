# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation that others can repeat: predictors, a resumable runner on several processes, and its reports.

`evaluate_dataset(predictor, dataset, output_dir)` scores whatever follows `Predictor` on any data set in the row
schema. Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Public name -> submodule that defines it.
_EXPORTS = {
    "BASELINES": "predictors.baselines",
    "BoxLocalizerPredictor": "predictors.box_localizer",
    "EvaluationSummary": "runner",
    "FolderPredictor": "predictors.external",
    "ModelPredictor": "predictors.model",
    "Prediction": "predictors.model",
    "Predictor": "predictors.model",
    "compare_runs": "comparison",
    "evaluate_dataset": "runner",
    "load_dataset_of": "datasets_spec",
    "make_baseline": "predictors.baselines",
    "prediction_file_name": "predictors.external",
    "read_samples": "records",
}
__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
