# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
from .job import PredictionJob as PredictionJob
from .ray_engine import predict_dataset_with_ray as predict_dataset_with_ray
from .running import PredictionSummary as PredictionSummary
from .running import predict_dataset as predict_dataset
