# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Words and patches that mean the same share one space: names of objects and losses on them."""
