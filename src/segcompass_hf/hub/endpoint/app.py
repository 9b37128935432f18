# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The server's addresses as a FastAPI application, with its schema, request ids and the log."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils import logging

from ... import __version__
from .handler import refusal
from .handler_inputs import RequestError
from .metrics import CONTENT_TYPE
from .schema import (
    ANSWER_EXAMPLE,
    REQUEST_EXAMPLES,
    Refusal,
    SegmentationAnswers,
    State,
    request_schema,
)
from .service import Service

logger = logging.get_logger(__name__)

REQUEST_ID = "x-request-id"  # of the client, if it has this form; else one of ours
_ID_FORM = re.compile(r"[\w.-]{1,64}", re.ASCII)
CLIENT_GONE = 499  # as nginx counts it; nobody reads it
_STATUSES = {
    400: "The request is malformed, or an image cannot be read.",
    408: "The body came too slowly.",
    413: "The body, an image or the instruction is too large.",
    422: "The model refuses the request.",
    500: "Our fault; the log names the request.",
    503: "Too much is waiting, or the server is stopping; `Retry-After` says when to try again.",
}


class RequestLog:
    """Names every request, and logs and counts those that ask something.

    Args:
        app (`ASGIApp`): Answers.
        service ([`Service`]): Whose metrics count.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        name = given if _ID_FORM.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        status, start = CLIENT_GONE, time.perf_counter()

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        finally:
            if scope["method"] == "POST":
                seconds = time.perf_counter() - start
                self.service.metrics.count_request(status, seconds)
                logger.info("request %s: POST %.100r, status %d, %.3f s", name, scope["path"], status, seconds)


def create_app(service: Service) -> FastAPI:
    """The application of a service.

    `POST /` takes the handler's JSON, or an image's own bytes with `?instruction=...`; `GET /health` says that the
    process is there, `GET /ready` whether it takes requests; `GET /metrics`, `GET /openapi.json` and `GET /docs`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="SegCompass",
        version=__version__,
        description="Reasoning segmentation: an image and an instruction to reasoning and masks.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(RequestLog, service=service)

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        message = "POST / with a request, or GET /health, /ready, /metrics, /openapi.json or /docs."
        return JSONResponse(refusal(RequestError(error.status_code, message)), error.status_code, error.headers)

    @app.get("/", include_in_schema=False)
    @app.get("/health", summary="Whether the process is there")
    async def health() -> State:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether it takes requests", response_model=State, responses={503: {"model": State}})
    async def ready() -> JSONResponse:
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/metrics", summary="What Prometheus reads", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    _add_segmentation(app, service)
    return app


def _add_segmentation(app: FastAPI, service: Service) -> None:
    """`POST /`, whose body is read and checked by the service; its types are told to the schema here."""
    place = "#/components/schemas/{model}"
    request_type, types = request_schema(place)
    types["SegmentationRequest"] = request_type
    examples = {name: {"value": value} for name, value in REQUEST_EXAMPLES.items()}
    body = {
        "application/json": {"schema": {"$ref": place.format(model="SegmentationRequest")}, "examples": examples},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    }
    query = [
        {"name": name, "in": "query", "schema": schema, "explode": False, "description": "Where the body is an image."}
        for name, schema in types["Parameters"]["properties"].items()
    ]
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": says} for status, says in _STATUSES.items()
    }
    responses[200] = {
        "model": SegmentationAnswers,
        "description": "The answer; to a list of inputs a list, in which a bad input has an `error`.",
        "content": {"application/json": {"example": ANSWER_EXAMPLE}},
    }

    @app.post(
        "/",
        summary="Segment what an instruction means",
        responses=responses,
        openapi_extra={"requestBody": {"required": True, "content": body}, "parameters": query},
    )
    async def segment(request: Request) -> Response:
        try:
            answer = await service.respond(request, request.state.request_id)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        refused = isinstance(answer, dict) and "error" in answer
        status, headers = (answer["error"]["status"] if refused else 200), {}
        if status in (408, 413, 503):
            headers["Connection"] = "close"  # the rest of the body is not read
        if status == 503:
            headers["Retry-After"] = str(service.retry_after())
        return JSONResponse(answer, status, headers)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            FastAPI.openapi(app)["components"]["schemas"].update(types)
        return app.openapi_schema

    app.openapi = openapi
