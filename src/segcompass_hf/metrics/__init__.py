# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of referring and reasoning segmentation, as plain functions on numpy arrays and as an `evaluate` module."""

from .breakdown import breakdown, metrics_with_intervals
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

__all__ = [
    "ALL_METRIC_NAMES",
    "METRIC_NAMES",
    "PRECISION_NAMES",
    "LeftOutScore",
    "SampleScore",
    "SegmentationAccumulator",
    "bootstrap_intervals",
    "breakdown",
    "evaluate_module_path",
    "metrics_of_scores",
    "metrics_with_intervals",
    "num_bearing_samples",
    "score_sample",
    "segmentation_metrics",
]
