# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Joint training: GRPO for the reasoning, segmentation losses for the masks."""
