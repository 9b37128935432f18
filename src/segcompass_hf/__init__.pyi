# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

from . import data as data
from . import evaluation as evaluation
from . import explain as explain
from . import metrics as metrics
from . import training as training
from .configuration_mobile_sam import MobileSamConfig as MobileSamConfig
from .configuration_segcompass import SegCompassConfig as SegCompassConfig
from .configuration_segcompass import SegCompassSaeConfig as SegCompassSaeConfig
from .image_features_segcompass import ImageFeatures as ImageFeatures
from .interventions_segcompass import ConceptIntervention as ConceptIntervention
from .modeling_concepts import SparseConcepts as SparseConcepts
from .modeling_mobile_sam import MobileSamModel as MobileSamModel
from .modeling_sae import SegCompassSae as SegCompassSae
from .modeling_sae import SegCompassSaeOutput as SegCompassSaeOutput
from .modeling_segcompass import SegCompassForReasoningSegmentation as SegCompassForReasoningSegmentation
from .pipeline_segcompass import ReasoningSegmentationPipeline as ReasoningSegmentationPipeline
from .processing_segcompass import SegCompassProcessor as SegCompassProcessor
from .reading_segcompass import MaskTargets as MaskTargets
from .reading_segcompass import SegCompassOutput as SegCompassOutput
from .reading_segcompass import SequenceStates as SequenceStates
from .segmenting_segcompass import SegCompassSegmentationOutput as SegCompassSegmentationOutput

__version__: str

def bundled_checkpoint(name: str = "scenes-tiny") -> Path: ...
