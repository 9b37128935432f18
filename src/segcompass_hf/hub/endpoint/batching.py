# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Waiting questions -> batches of equal settings -> the model, one batch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .handler import Question, refusal

BATCH_PIXELS = 24_000_000  # of the images of a batch; its masks take a byte per pixel and slot


@dataclass(eq=False)
class Waiting:
    """A question in the queue.

    Args:
        question ([`Question`]): What is asked.
        since (`float`): Seconds of the event loop's clock.
        answer (`asyncio.Future`): Done as soon as nobody waits for it any more.
    """

    question: Question
    since: float
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Gathers questions for a few milliseconds and has those of equal settings answered together.

    The oldest question decides the settings, so that none waits for ever. It leaves when `batch_size` rows are there
    or when it has waited for `wait_seconds`; while the model computes, the others gather anyway.

    Args:
        submit (`Callable`): [`RequestHandler.submit`].
        batch_size (`int`): Answers that the model writes at a time; a question with `votes` counts as so many.
        wait_seconds (`float`): How long a question waits for company.
        on_batch (`Callable[[int, float], None]`, *optional*): Called with the questions of each batch and the seconds
            that it took.
    """

    def __init__(
        self,
        submit: Callable[[Sequence[Question]], Future[list[dict[str, Any]]]],
        batch_size: int,
        wait_seconds: float,
        on_batch: Callable[[int, float], None] | None = None,
    ):
        self._submit, self.batch_size, self.wait_seconds = submit, batch_size, wait_seconds
        self._on_batch = on_batch
        self._queue: list[Waiting] = []
        self._arrived = asyncio.Event()

    async def ask(self, question: Question) -> dict[str, Any]:
        """The answer to a question. Where the caller stops waiting, an unasked question is dropped."""
        waiting = Waiting(question, asyncio.get_running_loop().time())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def run(self) -> None:
        """Answer questions until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch, start = await self._next_batch(), loop.time()
            questions = [waiting.question for waiting in batch]
            try:
                answers = await asyncio.wrap_future(self._submit(questions))
            except Exception as error:  # the next batch is not to suffer from it
                answers = [refusal(error, question.request) for question in questions]
            if self._on_batch is not None:
                self._on_batch(len(batch), loop.time() - start)
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    async def _next_batch(self) -> list[Waiting]:
        """Wait for the batch of the oldest question, and take it out of the queue."""
        while True:
            self._queue = [waiting for waiting in self._queue if not waiting.answer.done()]
            left = None  # seconds that the oldest may still wait
            if self._queue:
                batch, is_full = self._batch_of_oldest()
                left = batch[0].since + self.wait_seconds - asyncio.get_running_loop().time()
                if is_full or left <= 0:
                    self._queue = [waiting for waiting in self._queue if waiting not in batch]
                    return batch
            self._arrived.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _batch_of_oldest(self) -> tuple[list[Waiting], bool]:
        """What can be answered with the oldest question now, and whether nothing more would fit."""
        settings = self._queue[0].question.settings
        batch: list[Waiting] = []
        rows = pixels = 0
        for waiting in self._queue:
            question = waiting.question
            if question.settings != settings:
                continue
            rows += question.num_rows
            pixels += question.image.width * question.image.height
            if batch and (rows > self.batch_size or pixels > BATCH_PIXELS):
                return batch, True
            batch.append(waiting)
        return batch, rows >= self.batch_size
