# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Readers of annotation files and folders: each returns a `datasets.Dataset` in the row schema."""
