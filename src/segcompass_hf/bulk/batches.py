# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of shards -> batches of prompts of like length, decoded and prepared in threads ahead of the model."""

from __future__ import annotations

import copy
import hashlib
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..images_segcompass import to_rgb_image
from .places import read_file
from .shards import Shard, Source, SourceRow, read_with_problems

Item = TypeVar("Item")

BATCHES_PER_WINDOW = 8  # rows that are sorted by length together
PIXELS_PER_WINDOW = 64_000_000  # of different images; a window ends before its images fill the memory
BATCHES_AHEAD = 4
IMAGES_REMEMBERED = 4  # whose content may come again in the next rows
THREADS = 4  # that read and decode


@dataclass
class Question:
    """An image and one instruction.

    Args:
        place (`int`): Among the questions of its shard.
        columns (`dict`): What an answer's row says of it: `sample_id`, `source`, `row`, `question`, `instruction`.
        key (`str`): Of the image's content.
        image (`PIL.Image.Image`, *optional*): RGB; `None` where there is a problem.
        num_tokens (`int`): Of the prompt, image included.
        problem (`str`, *optional*): Why it cannot be answered.
    """

    place: int
    columns: dict[str, Any]
    key: str = ""
    image: Any = None
    num_tokens: int = 0
    problem: str | None = None


@dataclass
class Batch:
    """Questions that are answered together.

    Args:
        shard ([`Shard`]): Theirs.
        questions (`list[Question]`): Without a problem; all of those with one are a batch too, without `inputs`.
        new (`list[str]`): Keys of images that no batch before has asked about.
        inputs (`Future`, *optional*): Of [`BatchMaker.inputs`].
        done_with (`set[str]`): Keys of images that no later batch asks about.
        is_last (`bool`): Whether the shard ends here.
    """

    shard: Shard
    questions: list[Question]
    new: list[str] = field(default_factory=list)
    inputs: Future | None = None
    done_with: set[str] = field(default_factory=set)
    is_last: bool = False


class BatchMaker:
    """Batches of shards, the same for a shard whenever and wherever it is read.

    Args:
        processor (`SegCompassProcessor`): Makes the model's inputs.
        check (`RowTextCheck`): Counts tokens.
        source ([`Source`]): The data set.
        instructions (`Sequence[str]`): Asked about every image; where there are none, those of the data set.
        batch_size (`int`): Questions of a batch.
    """

    def __init__(self, processor: Any, check: Any, source: Source, instructions: Sequence[str], batch_size: int):
        self.processor, self.check, self.source = processor, check, source
        self.instructions, self.batch_size = tuple(instructions), batch_size
        self._language = copy.copy(processor)
        self._language._sam_inputs = processor._places  # pixels for the segmenter are made once per image

    def batches(self, shards: Iterable[Shard]) -> Iterator[Batch]:
        """All batches, prepared ahead; the last of each shard is marked."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
            yield from read_ahead(lambda: self._prepared(shards, pool), BATCHES_AHEAD)

    def _prepared(self, shards: Iterable[Shard], pool: ThreadPoolExecutor) -> Iterator[Batch]:
        for shard in shards:
            failed = []
            for window in self._windows(self._questions(shard, pool)):
                failed += [question for question in window if question.problem is not None]
                readable = [question for question in window if question.problem is None]
                for batch in self._cut(shard, readable):
                    batch.inputs = pool.submit(self.inputs, batch.questions, batch.new)
                    yield batch
            yield Batch(shard, failed, is_last=True)

    def _questions(self, shard: Shard, pool: ThreadPoolExecutor) -> Iterator[Question]:
        """The questions of a shard in order, their images decoded and their prompts counted."""
        place = 0
        for row, key, image in self._decoded(shard, pool):
            for number, instruction in enumerate(self._asked(row)):
                is_text = isinstance(instruction, str)
                columns = {"sample_id": row.sample_id, "source": row.source, "row": row.row, "question": number}
                question = Question(place, columns | {"instruction": instruction if is_text else None}, key)
                place += 1
                try:
                    if row.problem is not None:
                        raise ValueError(row.problem)
                    if not is_text:
                        raise ValueError(f"the instruction is {instruction!r:.60}; expected a text.")
                    question.image = image.result()
                    question.num_tokens = self.check.num_tokens({"image": question.image, "instruction": instruction})
                except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
                    question.problem = str(error)
                yield question

    def _asked(self, row: SourceRow) -> Sequence[Any]:
        """The instructions about an image; a column may hold several."""
        if self.instructions:
            return self.instructions
        several = isinstance(row.instruction, list) and row.instruction
        return row.instruction if several else [row.instruction]

    def _decoded(self, shard: Shard, pool: ThreadPoolExecutor) -> Iterator[tuple[SourceRow, str, Future | None]]:
        """Rows in order, with key and image; neighbours with one image share it."""
        known: OrderedDict[str, Future] = OrderedDict()
        waiting: deque = deque()
        for row in read_with_problems(self.source, shard):
            key, image = "", None
            if row.problem is None and row.image is None:
                row.problem = "the row has no image."
            if row.problem is None:
                key = row.image if isinstance(row.image, str) else _content_key(row.image)
                image = known.pop(key, None) or pool.submit(_decode, row.image)
                known[key] = image
                if len(known) > IMAGES_REMEMBERED:
                    known.popitem(last=False)
            row.image = None  # the thread that decodes it holds it
            waiting.append((row, key, image))
            if len(waiting) > THREADS:
                yield waiting.popleft()
        yield from waiting

    def _windows(self, questions: Iterable[Question]) -> Iterator[list[Question]]:
        window: list[Question] = []
        images: dict[str, int] = {}  # pixels
        for question in questions:
            if question.image is not None:
                images[question.key] = question.image.width * question.image.height
            full = len(window) == BATCHES_PER_WINDOW * self.batch_size
            if window and (full or sum(images.values()) > PIXELS_PER_WINDOW):
                yield window
                window, images = [], {key: size for key, size in images.items() if key == question.key}
            window.append(question)
        if window:
            yield window

    def _cut(self, shard: Shard, window: list[Question]) -> list[Batch]:
        """Batches of a window, sorted by length; the images of each are encoded where they are first asked about."""
        window = sorted(window, key=lambda question: (question.num_tokens, question.place))
        starts = range(0, len(window), self.batch_size)
        batches = [Batch(shard, window[start : start + self.batch_size]) for start in starts]
        seen: set[str] = set()
        for batch in batches:
            batch.new = [key for key in dict.fromkeys(question.key for question in batch.questions) if key not in seen]
            seen.update(batch.new)
        for batch in reversed(batches):
            batch.done_with = {question.key for question in batch.questions} & seen
            seen -= batch.done_with
        return batches

    def inputs(self, questions: Sequence[Question], new: Sequence[str]) -> tuple[dict[str, Any], torch.Tensor | None]:
        """The model's inputs but the segmenter's, and the segmenter's pixels of the `new` images.

        Returns:
            `tuple`: what the processor makes, and `sam_pixel_values` `(len(new), 3, canvas, canvas)`.

        Raises:
            ValueError: The processor refuses one of them.
        """
        images = {question.key: question.image for question in questions}
        inputs = self._language(
            images=[question.image for question in questions],
            instruction=[question.columns["instruction"] for question in questions],
        )
        pixels = self.processor._sam_inputs([images[key] for key in new])["sam_pixel_values"] if new else None
        return dict(inputs), pixels


def _content_key(image: bytes) -> str:
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def _decode(image: bytes | str) -> Any:
    """Raises `ValueError` where it is no image, `OSError` where it cannot be read now."""
    return to_rgb_image(read_file(image) if isinstance(image, str) else image)


def read_ahead(make: Callable[[], Iterable[Item]], ahead: int) -> Iterator[Item]:
    """The items of an iterable that a thread of its own runs through, so many of them ahead; its errors come too."""
    items: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(entry: tuple) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return items.put(entry, timeout=0.1)

    def run() -> None:
        try:
            for item in make():
                put((item, None))
                if stopped.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=run, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()
