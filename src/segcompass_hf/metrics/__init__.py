# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of referring and reasoning segmentation, as plain functions on numpy arrays and as an `evaluate` module."""

from .answers import choice_f1, chosen_objects, is_right_choice, mixed_at_k, pass_at_k
from .breakdown import breakdown, metrics_with_intervals
from .calibration import best_ious, calibration_figures, count_duplicates, expected_calibration_error, ranking
from .evaluate_module import evaluate_module_path
from .segmentation import (
    ALL_METRIC_NAMES,
    METRIC_NAMES,
    PRECISION_NAMES,
    LeftOutScore,
    SampleScore,
    SegmentationAccumulator,
    bootstrap_intervals,
    metrics_of_scores,
    num_bearing_samples,
    score_sample,
    segmentation_metrics,
)
from .selection import choose_objects, selection_by_group, selection_figures

__all__ = [
    "ALL_METRIC_NAMES",
    "METRIC_NAMES",
    "PRECISION_NAMES",
    "LeftOutScore",
    "SampleScore",
    "SegmentationAccumulator",
    "best_ious",
    "bootstrap_intervals",
    "breakdown",
    "calibration_figures",
    "choice_f1",
    "choose_objects",
    "chosen_objects",
    "count_duplicates",
    "evaluate_module_path",
    "expected_calibration_error",
    "is_right_choice",
    "metrics_of_scores",
    "metrics_with_intervals",
    "mixed_at_k",
    "num_bearing_samples",
    "pass_at_k",
    "ranking",
    "score_sample",
    "segmentation_metrics",
    "selection_by_group",
    "selection_figures",
]
