# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The VLM architectures of transformers that are tried, in alphabetical order; see `Family` for the columns."""

from .families_fixed import FIXED
from .families_grid import GRID
from .families_other import OTHER
from .families_tiles import TILED

FAMILIES = dict(sorted({**FIXED, **GRID, **OTHER, **TILED}.items()))
