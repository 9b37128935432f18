# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A model that answers while one watches: reasoning as it is written, then masks that follow changed concepts."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...checkpoint import words_note
from ...figure import slot_colour, tidy
from ..report.picture import paint

if TYPE_CHECKING:
    from ..answer import Answer
    from ..explanation import Ablation, ConceptAttribution, Explanation

NUM_SHOWN = 8  # concepts to change


class LiveModel:
    """One model for several users: answers are made one after another, each user keeps their own.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model.
        processor ([`SegCompassProcessor`]): Its processor.
        name (`str`): What users see.
        dictionary ([`ConceptDictionary`], *optional*): Names of concepts; the checkpoint's own by default.
        num_ablations (`int`, *optional*, defaults to 5): Concepts per mask to take away as a test.
    """

    def __init__(self, model: Any, processor: Any, name: str, dictionary: Any = None, num_ablations: int = 5):
        self.model, self.processor, self.name = model.eval(), processor, name
        self.dictionary, self.num_ablations = dictionary, num_ablations
        self.lock = threading.Lock()  # states are captured by hooks on the model: one answer at a time

    def answer(self, image: Any, instruction: str, reasoning: str = "full") -> Iterator[str | LiveAnswer]:
        """Answer an instruction.

        Args:
            image: What the processor takes as an image.
            instruction (`str`): What to look for.
            reasoning (`str`, defaults to `"full"`): As in `segment`.

        Yields:
            `str`: the reasoning so far, again and again; at last a [`LiveAnswer`].

        Raises:
            ValueError: The image or the instruction cannot be used. An iterator that is closed stops the model.
        """
        from ..answer import Answer
        from ..explaining import explain_answer

        written = _Written(self.processor.tokenizer)
        with self.lock:
            worker = _Worker(
                written, lambda: Answer(self.model, self.processor, image, instruction, reasoning, streamer=written)
            )
            try:
                yield from written
            finally:
                written.stopped.set()
                worker.join()
            answer = worker.result()
            answer.segment_kwargs.pop("streamer")
            explanation = explain_answer(answer, num_ablations=self.num_ablations, dictionary=self.dictionary)
        explanation.model_name = self.name
        yield LiveAnswer(answer, explanation, self.lock, words_note(self.processor, instruction))


class LiveAnswer:
    """One user's answer, and what becomes of it when concepts are changed.

    Attributes:
        explanation ([`Explanation`]): Of the answer as it is.
        note (`str`, *optional*): What to say of words that the checkpoint was not trained on.
        shown (list of `tuple[ConceptAttribution, int]`): The concepts of largest |contribution| over all masks, each
            with the number of the mask where it is largest; at most `NUM_SHOWN`.
    """

    def __init__(self, answer: Answer, explanation: Explanation, lock: threading.Lock, note: str | None = None):
        self.answer, self.explanation, self.note, self._lock = answer, explanation, note, lock
        self.shown = _largest(explanation)

    def change(self, scales: Mapping[int, float]) -> Ablation:
        """What the masks become when concepts are scaled; without a pass of the language model.

        Args:
            scales (`Mapping[int, float]`): Feature id to factor; 0 takes a concept away, 1 leaves it.
        """
        from ..causal import steer

        with self._lock:
            return steer(self.answer, {feature: scale for feature, scale in scales.items() if scale != 1})

    def picture(self, masks: Sequence[np.ndarray] | None = None) -> Image.Image:
        """The image with masks over it, those of the answer by default; else a thin line shows where those were."""
        explained = self.explanation.masks
        colours = [slot_colour(mask.slot) for mask in explained]
        before = [mask.mask for mask in explained if mask.kept or masks is not None]
        if masks is None:
            return paint(self.explanation.image, before, colours)
        return paint(self.explanation.image, masks, colours, before)


def _largest(explanation: Explanation) -> list[tuple[ConceptAttribution, int]]:
    ranked = [(concept, number) for number, mask in enumerate(explanation.masks) for concept in mask.concepts]
    ranked.sort(key=lambda entry: -abs(entry[0].contribution))
    first: dict[int, tuple[ConceptAttribution, int]] = {}
    for concept, number in ranked:
        first.setdefault(concept.feature, (concept, number))
    return list(first.values())[:NUM_SHOWN]


class _Stopped(Exception):
    """Nobody watches any more."""


class _Written:
    """What `generate` calls a streamer; iterating it gives the reasoning so far until the answer is complete."""

    def __init__(self, tokenizer: Any):
        self.stopped = threading.Event()
        self._tokenizer, self._ids, self._texts = tokenizer, None, queue.SimpleQueue()

    def put(self, ids: Any) -> None:
        """Called with the prompt, then with every token."""
        if self.stopped.is_set():
            raise _Stopped
        if self._ids is None:
            self._ids = []
            return
        self._ids.extend(ids.flatten().tolist())
        text = self._tokenizer.decode(self._ids)
        self._texts.put(tidy(text.partition("</think>")[0].replace("<think>", "")))

    def end(self) -> None:
        """Called when the last token is written; masks are still to come."""

    def close(self) -> None:
        """No more text will come."""
        self._texts.put(None)

    def __iter__(self) -> Iterator[str]:
        shown = None
        while (text := self._texts.get()) is not None:
            if text != shown:
                yield text
            shown = text


class _Worker(threading.Thread):
    """Makes an answer while its text is read."""

    def __init__(self, written: _Written, work: Any):
        super().__init__(daemon=True, name="segcompass answer")
        self._written, self._work, self._made, self._error = written, work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._made = self._work()
        except BaseException as error:  # raised again where the answer is wanted
            self._error = error
        finally:
            self._written.close()

    def result(self) -> Any:
        """What was made, or its error again."""
        if self._error is not None:
            raise self._error
        return self._made
