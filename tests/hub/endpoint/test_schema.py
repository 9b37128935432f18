# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The OpenAPI schema says what the handler does."""

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")

from endpoint import StandIn, request
from fastapi.openapi.models import OpenAPI
from pydantic import TypeAdapter, ValidationError

from segcompass_hf.hub.endpoint.app import create_app
from segcompass_hf.hub.endpoint.handler_inputs import Limits, RequestError, _checks, parse_request
from segcompass_hf.hub.endpoint.schema import (
    ANSWER_EXAMPLE,
    REQUEST_EXAMPLES,
    Parameters,
    Refusal,
    SegmentationAnswer,
    SegmentationRequest,
)
from segcompass_hf.hub.endpoint.service import Service

REQUEST, ANSWER = TypeAdapter(SegmentationRequest), TypeAdapter(SegmentationAnswer)


@pytest.fixture(scope="module")
def document() -> dict:
    return create_app(Service(StandIn())).openapi()


def accepts(adapter: TypeAdapter, data: object) -> bool:
    try:
        adapter.validate_python(data, strict=True)
    except ValidationError:
        return False
    return True


def is_parsed(data: object) -> bool:
    try:
        parse_request(data, Limits())
    except RequestError:
        return False
    return True


def test_every_parameter_is_told():
    assert set(Parameters.__annotations__) == set(_checks(Limits()))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("votes", [1, 2, 8, 9, True, "3", None, 2.5]),
        ("max_new_tokens", [0, 1, 1024, 1025, False, 3.0]),
        ("slot_logit_threshold", [0, -3.5, 1e6, -1e6, float("nan"), float("inf"), "1", True]),
        ("mask_logit_threshold", [1, []]),
        ("duplicate_iou_threshold", [0.5, None]),
        ("mask_format", ["rle", "png", "svg", 1]),
        ("reasoning", ["full", "short", "none", "some", ["full"]]),
        ("forbid", ["red", ["red"], ["red"] * 32, ["red"] * 33, [1], 7, None]),
        ("require", ["red", [], [None]]),
        ("instruction", ["red", 3]),
        ("temperature", [1]),
    ],
)
def test_schema_and_handler_agree_on_parameters(name, values):
    requests = [{"inputs": "AAAA", "parameters": {name: value}} for value in values]
    assert [accepts(REQUEST, data) for data in requests] == [is_parsed(data) for data in requests]


def test_schema_and_handler_agree_on_requests():
    one = {"image": "AAAA", "instruction": "red"}
    for data in ([], {}, {"inputs": one, "parameters": [1]}, {"inputs": []}, {"inputs": [one] * 9}):
        assert not accepts(REQUEST, data) and not is_parsed(data)
    for data in ({"inputs": one}, {"inputs": "AAAA", "parameters": None}, {"inputs": [one, "AAAA"] * 4}):
        assert accepts(REQUEST, data) and is_parsed(data)


def test_examples_are_answered_in_the_form_of_the_answers_example(handler, rows):
    for data in REQUEST_EXAMPLES.values():
        assert accepts(REQUEST, data)
        answers = handler(data)
        for answer in answers if isinstance(answers, list) else [answers]:
            ANSWER.validate_python(answer, strict=True)
    ANSWER.validate_python(ANSWER_EXAMPLE, strict=True)
    shown = {"slot_logit_threshold": -1e5}
    for more in ({"mask_format": "png"}, {"forbid": ["red"]}, {"require": ["red"]}):
        answer = handler(request(rows[0], **shown, **more))
        assert answer["segments"] or answer["guardrails"]
        ANSWER.validate_python(answer, strict=True)
    TypeAdapter(Refusal).validate_python(handler({}), strict=True)


def test_the_document_is_openapi_and_names_all_its_types(document):
    OpenAPI.model_validate(document)
    assert set(document["paths"]) == {"/", "/health", "/ready", "/metrics"}
    named = [text.split('"')[0] for text in str(document).replace("'", '"').split("#/components/schemas/")[1:]]
    types = document["components"]["schemas"]
    assert {"SegmentationRequest", "Input", "Parameters", "SegmentationAnswer", "Segment", "Refusal"} <= set(named)
    assert set(named) <= set(types)
    post = document["paths"]["/"]["post"]
    assert set(post["responses"]) == {"200", "400", "408", "413", "422", "500", "503"}
    content = post["requestBody"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/SegmentationRequest"}
    assert [example["value"] for example in content["application/json"]["examples"].values()] == [
        *REQUEST_EXAMPLES.values()
    ]
    assert "image/*" in content
    assert {parameter["name"] for parameter in post["parameters"]} == set(Parameters.__annotations__)
    assert post["responses"]["200"]["content"]["application/json"]["example"] == ANSWER_EXAMPLE
    assert types["Parameters"]["properties"]["votes"]["maximum"] == Limits().votes
