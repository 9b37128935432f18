# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models of transformers' VLM families, the steps they have to pass, and the record of what passed."""
