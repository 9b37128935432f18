# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The paper's claims about concepts, measured on any model and data set."""
