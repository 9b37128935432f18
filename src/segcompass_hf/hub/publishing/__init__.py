# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A model folder with its card, checked and pushed to the Hub."""
