# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of referring and reasoning segmentation, as plain functions on numpy arrays."""

from .segmentation import (
    METRIC_NAMES,
    SampleScore,
    SegmentationAccumulator,
    bootstrap_intervals,
    score_sample,
    segmentation_metrics,
)

__all__ = [
    "METRIC_NAMES",
    "SampleScore",
    "SegmentationAccumulator",
    "bootstrap_intervals",
    "score_sample",
    "segmentation_metrics",
]
