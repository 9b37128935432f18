# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training will need of memory, counted before it starts."""
