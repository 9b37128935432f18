# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation that others can repeat: predictors, a resumable runner on several processes, and its reports.

`evaluate_dataset(predictor, dataset, output_dir)` scores whatever follows `Predictor` on any data set in the row
schema. Each name is loaded when first used.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Submodule -> public names that it defines.
_EXPORTS = {
    "predictors.baselines": ("BASELINES", "make_baseline"),
    "predictors.box_localizer": ("BoxLocalizerPredictor", "is_malformed"),
    "runner": ("EvaluationSummary", "evaluate_dataset"),
    "predictors.external": ("FolderPredictor", "prediction_file_name"),
    "prediction": ("Prediction", "Predictor"),
    "predictors.model": ("ModelPredictor",),
    "predictors.sampling": ("SamplingPredictor",),
    "pass_at_k": ("measure_pass_at_k", "read_pass_rates"),
    "calibration": ("calibrate", "fit_calibration"),
    "comparison": ("compare_runs",),
    "datasets_spec": ("load_dataset_of",),
    "records": ("read_samples",),
}
__all__ = [name for names in _EXPORTS.values() for name in names]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
