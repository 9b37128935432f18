# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The live page: type an instruction, see concepts and masks, switch concepts off."""
