# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sharing: original checkpoints in, checkpoints and cards out."""
