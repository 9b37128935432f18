# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which questions are answered together, and when."""

import asyncio
import time
from concurrent.futures import Future

import pytest
from PIL import Image

from segcompass_hf.hub.endpoint import batching
from segcompass_hf.hub.endpoint.batching import Batcher
from segcompass_hf.hub.endpoint.handler import Question


def ask(text: str, **settings) -> Question:
    return Question(Image.new("RGB", (8, 8)), text, settings)


class Model:
    """Notes batches; answers with the instruction, at once or when it is told to."""

    def __init__(self, at_once: bool = True):
        self.batches, self.pending, self.at_once = [], [], at_once

    def submit(self, questions) -> Future:
        self.batches.append([question.instruction for question in questions])
        self.pending.append(Future())
        if self.at_once:
            self.finish()
        return self.pending[-1]

    def finish(self) -> None:
        self.pending[-1].set_result([{"text": text} for text in self.batches[-1]])


def run(model: Model, talk, batch_size: int = 4, wait_seconds: float = 0.01, **settings) -> None:
    """Run `talk(batcher)` beside the batcher."""

    async def main() -> None:
        batcher = Batcher(model.submit, batch_size, wait_seconds, **settings)
        task = asyncio.create_task(batcher.run())
        try:
            await asyncio.wait_for(talk(batcher), 20)
        finally:
            task.cancel()

    asyncio.run(main())


def asked_at_once(*questions: Question, **settings) -> list[list[str]]:
    """The batches of questions that arrive together; each gets its own answer."""
    model = Model()

    async def talk(batcher: Batcher) -> None:
        answers = await asyncio.gather(*map(batcher.ask, questions))
        assert [answer["text"] for answer in answers] == [question.instruction for question in questions]

    run(model, talk, **settings)
    return model.batches


def test_equal_settings_go_together_and_the_oldest_first():
    short, cut = {"reasoning": "short"}, {"slot_logit_threshold": 1.0}
    asked = [ask("a"), ask("b", **short), ask("c"), ask("d", **cut), ask("e", **short), ask("f")]
    assert asked_at_once(*asked) == [["a", "c", "f"], ["b", "e"], ["d"]]


def test_no_more_than_the_batch_size():
    assert asked_at_once(*map(ask, "abcdefghi")) == [["a", "b", "c", "d"], ["e", "f", "g", "h"], ["i"]]
    assert asked_at_once(*map(ask, "abc"), batch_size=1) == [["a"], ["b"], ["c"]]


def test_a_full_batch_does_not_wait():
    start = time.monotonic()
    assert asked_at_once(*map(ask, "abcd"), wait_seconds=30) == [["a", "b", "c", "d"]]
    assert asked_at_once(*map(ask, "abc"), batch_size=1, wait_seconds=30) == [["a"], ["b"], ["c"]]
    assert time.monotonic() - start < 10


def test_votes_count_as_so_many_answers():
    """Of 4 answers at a time 3 + 3 do not fit, 2 + 2 do, and 8 go alone; who does not fit makes the batch full."""
    three, two, eight = ({"votes": votes} for votes in (3, 2, 8))
    assert asked_at_once(ask("a", **three), ask("b", **three), wait_seconds=0.1) == [["a"], ["b"]]
    assert asked_at_once(ask("a", **two), ask("b", **two), wait_seconds=30) == [["a", "b"]]
    assert asked_at_once(ask("a", **eight), wait_seconds=30) == [["a"]]


def test_large_images_are_not_put_together(monkeypatch):
    monkeypatch.setattr(batching, "BATCH_PIXELS", 2 * 64)
    assert asked_at_once(*map(ask, "abc")) == [["a", "b"], ["c"]]
    monkeypatch.setattr(batching, "BATCH_PIXELS", 10)  # one is always answered
    assert asked_at_once(*map(ask, "ab")) == [["a"], ["b"]]


def test_who_comes_within_the_wait_goes_along():
    model = Model()

    async def talk(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.ask(ask("a")))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.ask(ask("b")))

    run(model, talk, wait_seconds=2)
    assert model.batches == [["a", "b"]]


def test_questions_gather_while_the_model_computes():
    model, batches = Model(at_once=False), []

    async def talk(batcher: Batcher) -> None:
        asked = [asyncio.create_task(batcher.ask(ask("a")))]
        while not model.pending:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(batcher.ask(ask(text))) for text in "bcd"]
        await asyncio.sleep(0.02)
        model.finish()
        await asked[0]
        while len(model.pending) < 2:
            await asyncio.sleep(0.001)
        model.finish()
        await asyncio.gather(*asked)

    run(model, talk, wait_seconds=0, on_batch=lambda questions, seconds: batches.append((questions, seconds >= 0)))
    assert model.batches == [["a"], ["b", "c", "d"]] and batches == [(1, True), (3, True)]


def test_who_has_gone_is_not_asked():
    model = Model()

    async def talk(batcher: Batcher) -> None:
        gone, stays = (asyncio.create_task(batcher.ask(ask(text))) for text in "ab")
        await asyncio.sleep(0.02)
        gone.cancel()
        assert (await stays)["text"] == "b"

    run(model, talk, wait_seconds=0.2)
    assert model.batches == [["b"]]


def test_a_batch_that_cannot_be_asked_leaves_the_next_ones_alone(monkeypatch):
    model = Model()

    async def talk(batcher: Batcher) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(batcher, "_submit", lambda questions: 1 / 0)
            assert (await batcher.ask(ask("a")))["error"]["status"] == 500
        assert (await batcher.ask(ask("b")))["text"] == "b"

    run(model, talk)
    assert model.batches == [["b"]]


@pytest.mark.parametrize("wait_seconds", [0, 0.2])
def test_a_lone_question_waits_no_longer_than_it_has_to(wait_seconds):
    start = time.monotonic()
    assert asked_at_once(ask("a"), wait_seconds=wait_seconds) == [["a"]]
    assert time.monotonic() - start >= wait_seconds
