# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What all trainers share: exact resume, whole checkpoints, sums over steps and processes."""
