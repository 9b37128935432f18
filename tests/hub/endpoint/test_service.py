# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the server makes of an address."""

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")

from segcompass_hf.hub.endpoint.service import parameters_of_query


def test_names_and_numbers_in_an_address():
    assert parameters_of_query("forbid=red,+blue&votes=3&require=ring&slot_logit_threshold=1e5&mask_format=png") == {
        "forbid": ["red", "blue"],
        "votes": 3,
        "require": ["ring"],
        "slot_logit_threshold": 1e5,
        "mask_format": "png",
    }
    assert parameters_of_query("votes=many&reasoning=none") == {"votes": "many", "reasoning": "none"}
