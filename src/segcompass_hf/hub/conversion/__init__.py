# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the original code: to this package's format and back."""
