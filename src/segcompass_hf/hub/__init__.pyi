# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
from .composition import compose_checkpoint as compose_checkpoint
from .conversion.from_original import convert_original_checkpoint as convert_original_checkpoint
from .conversion.from_original import load_original_sae as load_original_sae
from .conversion.segmenters import convert_original_sam as convert_original_sam
from .conversion.segmenters import load_original_sam as load_original_sam
from .conversion.to_original import convert_to_original_checkpoint as convert_to_original_checkpoint
from .publishing.card import recipe_names as recipe_names
from .publishing.card import render_model_card as render_model_card
from .publishing.card import write_model_card as write_model_card
from .publishing.checks import check_stage as check_stage
from .publishing.push import ModelPublication as ModelPublication
from .publishing.push import push_to_hub as push_to_hub
from .publishing.stage import stage_checkpoint as stage_checkpoint
from .segmenter_swap import swap_segmenter as swap_segmenter
from .space.write import write_space as write_space
