# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""An explanation as one HTML page or one figure."""
