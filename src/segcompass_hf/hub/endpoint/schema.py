# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Requests and answers as types, for the server's OpenAPI schema; what checks requests is `handler_inputs.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict  # pydantic's, for the keys that may be left out

from .handler_inputs import Limits

LIMITS = Limits()

Names = Annotated[list[str], Field(max_length=LIMITS.concepts)] | str
Threshold = Annotated[float, Field(gt=-1e6, lt=1e6)]
Instruction = Annotated[str, Field(min_length=1, max_length=LIMITS.instruction, description="What to find, in words.")]
EncodedImage = Annotated[str, Field(description="Base64 of an image file, also as a `data:` URL, or an http(s) URL.")]


class Input(TypedDict):
    """An image and what to find in it; without an instruction, that of the parameters."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    image: EncodedImage
    instruction: NotRequired[Instruction]


class Parameters(TypedDict, total=False):
    """How to answer."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    instruction: Annotated[str, Field(description="Of the inputs that have none.")]
    mask_format: Annotated[Literal["rle", "png"], Field(description="COCO run lengths (`rle`), or base64 of a PNG.")]
    reasoning: Annotated[Literal["full", "short", "none"], Field(description="How much to think; `full` if left out.")]
    max_new_tokens: Annotated[int, Field(ge=1, le=LIMITS.new_tokens, description="Of the whole answer.")]
    slot_logit_threshold: Annotated[Threshold, Field(description="Masks with a logit above it are kept.")]
    mask_logit_threshold: Annotated[Threshold, Field(description="Pixels with a logit above it are inside.")]
    duplicate_iou_threshold: Annotated[Threshold, Field(description="A mask that overlaps a better one so much goes.")]
    forbid: Annotated[Names, Field(description="Names of concepts that no mask may show.")]
    require: Annotated[Names, Field(description="Names of concepts that every mask has to show.")]
    votes: Annotated[
        int, Field(ge=2, le=LIMITS.votes, description="Sample so many answers, and return what they share.")
    ]


class SegmentationRequest(TypedDict):
    """One question, or several that have the parameters in common; a bare image needs an `instruction` there."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    inputs: Input | EncodedImage | Annotated[list[Input | EncodedImage], Field(min_length=1, max_length=LIMITS.batch)]
    parameters: NotRequired[Parameters | None]


class RunLengths(TypedDict):
    """A mask as COCO's compressed run lengths."""

    size: Annotated[list[int], Field(min_length=2, max_length=2, description="Height and width.")]
    counts: str


class Segment(TypedDict):
    """One object found."""

    slot: int
    score: Annotated[float, Field(ge=0, le=1, description="The chance that the mask is right, where calibrated.")]
    mask: RunLengths | Annotated[str, Field(description="Base64 of a PNG, 255 inside.")]


class Broken(TypedDict):
    """A guardrail that was broken, and what was done."""

    rule: Literal["forbid", "require"]
    concept: str
    slot: Annotated[int | None, Field(description="The mask that was left out; null where none is left.")]
    share: Annotated[float | None, Field(description="Of the mask that shows the concept, in [0, 1].")]
    reason: str


class SegmentationAnswer(TypedDict):
    """The answer to one question."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    reasoning: Annotated[str, Field(description="What the model thought.")]
    text: Annotated[str, Field(description="All that the model wrote.")]
    size: Annotated[list[int], Field(min_length=2, max_length=2, description="Height and width of image and masks.")]
    segments: list[Segment]
    guardrails: NotRequired[list[Broken]]


class Fault(TypedDict):
    """Why there is no answer."""

    status: Annotated[int, Field(ge=400, le=599, description="As of HTTP.")]
    message: str


class Refusal(TypedDict):
    """A request, or one of its inputs, that was not answered."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    error: Fault


class State(TypedDict):
    """Of the server."""

    status: Literal["ok", "ready", "warming up", "draining"]


SegmentationAnswers = SegmentationAnswer | list[SegmentationAnswer | Refusal]

_SQUARE = (  # 8 x 8 pixels, one colour
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mO8o6HBgA0wMeAAg1MCAO/EATxlNiNaAAAAAElFTkSuQmCC"
)
REQUEST_EXAMPLES: dict[str, Any] = {
    "one question": {"inputs": {"image": _SQUARE, "instruction": "the mug"}},
    "several questions": {
        "inputs": [
            {"image": _SQUARE, "instruction": "the mug"},
            {"image": _SQUARE, "instruction": "what it stands on"},
        ],
        "parameters": {"reasoning": "short", "mask_format": "png"},
    },
}
ANSWER_EXAMPLE: dict[str, Any] = {
    "reasoning": "a mug stands on the table",
    "text": "<think>a mug stands on the table</think>",
    "size": [8, 8],
    "segments": [{"slot": 0, "score": 0.93, "mask": {"size": [8, 8], "counts": "0P2"}}],
}


def request_schema(ref_template: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON schemas of a request and of the types that it names.

    Args:
        ref_template (`str`): Where a type is found, such as `"#/components/schemas/{model}"`.

    Returns:
        `tuple[dict, dict]`: the request's schema, and type -> schema.
    """
    schema = TypeAdapter(SegmentationRequest).json_schema(ref_template=ref_template)
    return schema, schema.pop("$defs")
