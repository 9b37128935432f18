# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One handler of the bundled checkpoint for all tests of the endpoint."""

import pytest

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.hub.endpoint.handler import EndpointHandler


@pytest.fixture(scope="session")
def rows():
    return list(scenes.iterate("val", 4, seed=0))


@pytest.fixture(scope="session")
def handler():
    return EndpointHandler(str(segcompass_hf.bundled_checkpoint()), device="cpu")
