# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From a request's body to its answer: what is let in, read, asked in batches, and given up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from PIL import Image
from starlette.requests import ClientDisconnect, Request
from transformers.utils import logging

from .batching import Batcher
from .handler import Question, RequestHandler, refusal
from .handler_inputs import THRESHOLDS, RequestError, parse_request
from .metrics import Metrics

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


@dataclass
class ServerLimits:
    """What the server takes on, beside the [`Limits`] of each request.

    Args:
        batch_size (`int`): Answers that the model writes at a time; 1 answers every question alone.
        batch_seconds (`float`): How long a question waits for others of the same settings.
        body_bytes (`int`): Of a request; eight images of 3 MB in base64.
        read_seconds (`float`): For a whole body.
        in_flight (`int`): Requests, and images, in memory at a time; two batches at least.
        waiting (`int`): Requests that wait for that in their connections; further ones are refused.
        answer_seconds (`float`): For everything about one request.
    """

    batch_size: int = 8
    batch_seconds: float = 0.01
    body_bytes: int = 32_000_000
    read_seconds: float = 20.0
    in_flight: int = 16
    waiting: int = 256
    answer_seconds: float = 300.0


class Service:
    """Answers requests with a handler, in batches.

    Args:
        handler ([`RequestHandler`]): Reads and answers.
        limits ([`ServerLimits`], *optional*): What is taken on.
    """

    def __init__(self, handler: RequestHandler, limits: ServerLimits | None = None):
        self.handler, self.limits = handler, limits or ServerLimits()
        self.warm, self.draining = False, False
        self.active = 0  # requests that are not answered yet
        self._queued = 0  # of these, such as wait for their turn to be read
        self._seconds_per_question = 1.0  # of late
        gauges = {
            "requests_active": ("Requests that are not answered yet.", lambda: self.active),
            "requests_waiting": ("Requests that wait for their turn to be read.", lambda: self._queued),
            "ready": ("1 where the server takes requests.", lambda: float(self.state == "ready")),
        }
        self.metrics = Metrics(gauges)
        self._batcher = Batcher(handler.submit, self.limits.batch_size, self.limits.batch_seconds, self._count_batch)
        in_flight = max(self.limits.in_flight, 2 * self.limits.batch_size)
        self._turns, self._images = asyncio.Semaphore(in_flight), asyncio.Semaphore(in_flight)
        self._readers = ThreadPoolExecutor(handler.limits.fetching, thread_name_prefix="read")

    @property
    def state(self) -> str:
        """`"ready"`, `"warming up"` or `"draining"`."""
        return "draining" if self.draining else "ready" if self.warm else "warming up"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer questions while the block runs."""
        tasks = [asyncio.create_task(self._batcher.run()), asyncio.create_task(self._warm_up())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._readers.shutdown(wait=False)

    async def _warm_up(self) -> None:
        """Answer a question, so that the first visitor does not wait for what is done once."""
        question = Question(Image.new("RGB", (64, 64)), "it", {"reasoning": "short"}, request="warm-up")
        answer = await self._batcher.ask(question)
        self.warm = "error" not in answer
        if not self.warm:
            logger.error("the model cannot answer, so the server will not be ready: %s", answer["error"]["message"])

    async def respond(self, request: Request, name: str) -> Any:
        """What the handler answers to a request.

        Args:
            request (`Request`): With a JSON body, or an image's own bytes and its parameters in the query.
            name (`str`): What the log calls it.

        Returns:
            `dict` or `list[dict]`: as of [`RequestHandler`], an `error` where it is refused.

        Raises:
            ClientDisconnect: Nobody waits for the answer any more.
        """
        self.active += 1
        try:
            return await asyncio.wait_for(self._respond(request, name), self.limits.answer_seconds)
        except asyncio.TimeoutError:
            seconds = self.limits.answer_seconds
            return refusal(RequestError(503, f"there was no answer within {seconds:g} seconds; try again later."))
        except ClientDisconnect:
            raise
        except Exception as error:
            return refusal(error, name)
        finally:
            self.active -= 1

    async def _respond(self, request: Request, name: str) -> Any:
        async with self._turn():
            data = await self._read(request)
            inputs, parameters = parse_request(data, self.handler.limits)
            asked = asyncio.gather(*(self._answer(sample, parameters, name) for sample in inputs))
            answers = await _unless_gone(request, asked)
            return answers if isinstance(data["inputs"], list) else answers[0]

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait for a place in memory.

        Raises:
            RequestError: Too many wait already, or the server is about to stop.
        """
        if self.draining:
            raise RequestError(503, "the server is stopping; try again later.")
        if self._turns.locked() and self._queued >= self.limits.waiting:
            raise RequestError(503, f"{self._queued} requests are waiting already; try again later.")
        self._queued += 1
        try:
            await self._turns.acquire()
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _read(self, request: Request) -> Any:
        """The request that a body holds.

        Raises:
            RequestError: It is too long, too slow or no JSON.
            ClientDisconnect: It ends early.
        """
        body = await read_body(request, self.limits.body_bytes, self.limits.read_seconds)
        if request.headers.get("content-type", "").startswith("image/"):
            return {"inputs": body, "parameters": parameters_of_query(request.url.query)}
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "the body is no JSON.") from error

    async def _answer(self, sample: Any, parameters: dict[str, Any], name: str) -> dict[str, Any]:
        try:
            sample = await self._in_thread(self.handler.fetch, sample)
            async with self._images:
                question = await self._in_thread(self.handler.question, sample, parameters, name)
                return await self._batcher.ask(question)
        except Exception as error:
            return refusal(error, name)

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    def _count_batch(self, questions: int, seconds: float) -> None:
        self.metrics.count_batch(questions, seconds)
        self._seconds_per_question += 0.2 * (seconds / questions - self._seconds_per_question)

    def retry_after(self) -> int:
        """In how many seconds those that are here now will have been answered, about."""
        return max(1, math.ceil(self.active * self._seconds_per_question))


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        RequestError: It is longer than `max_bytes`, or takes longer than `seconds`.
        ClientDisconnect: It ends early.
    """
    too_long = RequestError(413, f"the request is longer than {max_bytes} bytes.")
    if int(request.headers.get("content-length", 0)) > max_bytes:  # the server has checked that it is a number
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:  # without Content-Length
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError as error:
        raise RequestError(408, f"the body took longer than {seconds:g} seconds.") from error


async def _unless_gone(request: Request, answers: Awaitable[Result]) -> Result:
    """The answers, unless the client closes its connection before.

    Raises:
        ClientDisconnect: It does.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(answers), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


def parameters_of_query(query: str) -> dict[str, Any]:
    """Parameters as JSON would hold them; what is no number stays a text, which the handler refuses by name."""
    parameters: dict[str, Any] = dict(parse_qsl(query))
    kinds = ((float, THRESHOLDS), (int, ("max_new_tokens", "votes")), (_listed, ("forbid", "require")))
    for kind, names in kinds:
        for name in parameters.keys() & set(names):
            with contextlib.suppress(ValueError):
                parameters[name] = kind(parameters[name])
    return parameters


def _listed(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",")]
