# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What each concept stands for: examples and labels of a checkpoint's features, counted over a data set."""
