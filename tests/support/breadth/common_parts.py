# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts that rows of the families' table have in common."""

TORCHVISION = ("torchvision",)
TIMM = ("torchvision", "timm")
IMAGE = {"image_token": "<image>"}
SQUARE = {"size": {"height": 28, "width": 28}}
SHORTEST = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CLIP_ARGUMENTS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
