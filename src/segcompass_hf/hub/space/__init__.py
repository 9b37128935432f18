# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The live page as a Hugging Face Space: the files of a Space, and what writes them."""
