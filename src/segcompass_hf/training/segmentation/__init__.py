# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Supervised segmentation: the losses of the model under teacher forcing."""
