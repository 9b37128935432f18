# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Scenes, the procedural benchmark: seeded pictures of coloured shapes, with instructions and reference reasoning."""

from .dataset import SPLITS, Scene, SceneRows, build, iterate, sample, to_row
from .instructions import KINDS

__all__ = ["KINDS", "SPLITS", "Scene", "SceneRows", "build", "iterate", "sample", "to_row"]
