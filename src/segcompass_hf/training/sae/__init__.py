# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The sparse autoencoder on the states of a VLM: activations, trainer, exchange with SAELens."""
