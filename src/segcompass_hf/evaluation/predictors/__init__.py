# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Who answers in an evaluation: a model, baselines, boxes of a VLM, files of another program."""
