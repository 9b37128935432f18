# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Warm-up: a VLM learns the answer's format and to reason, from reference answers."""
