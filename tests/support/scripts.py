# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Scripts of the repository as modules."""

import functools
import importlib.util
from pathlib import Path

from places import ROOT


@functools.cache
def module(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
