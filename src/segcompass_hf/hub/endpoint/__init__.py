# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Serving: the handler of an Inference Endpoint, and a small server around it."""
