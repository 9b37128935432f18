# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Controls that an explanation has to stand against: equal norms, unions, causal patches, other words, other SAEs."""
