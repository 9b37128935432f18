# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rewards of completions: the format of the answer and its masks."""
