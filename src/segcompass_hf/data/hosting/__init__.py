# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets as Parquet with a card: written to a folder, pushed to the Hub."""
