# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Help from a reference reasoning where all samples of a group are wrong: as one rollout, or as a beginning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor

from ..rewards.rewards import THINK_START

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[\u3002\uff01\uff1f])")  # also of Chinese and Japanese


def guidance_strength(step: int, num_steps: int, share: float) -> float:
    """How much help there is at an optimizer step: 1 at the first, falling in a line to 0 when `share` of the training
    is over.

    Example:
        >>> [guidance_strength(step, 100, 0.5) for step in (0, 25, 50, 80)]
        [1.0, 0.5, 0.0, 0.0]
    """
    return max(0.0, 1 - step / (share * max(num_steps, 1)))


def reference_answer(row: dict[str, Any], processor: Any) -> list[int] | None:
    """Token ids of a row's reference answer with the end of its turn; `None` where it has no reasoning."""
    reasoning = (row.get("reasoning") or "").strip()
    if not reasoning:
        return None
    return processor._ids_of(processor.build_completion(reasoning) + processor.end_of_turn_token)


def first_sentences(reasoning: str, strength: float) -> str:
    """The beginning of a reasoning that is given away: all but the last sentence at strength 1, at least the first one
    above 0, nothing at 0, and nothing of a reasoning of one sentence.

    Example:
        >>> words = "One cup is red. It stands left. The answer is a1."
        >>> first_sentences(words, 1.0), first_sentences(words, 0.4), first_sentences(words, 0.0)
        ('One cup is red. It stands left.', 'One cup is red.', '')
    """
    ends = [match.start() for match in SENTENCE_END.finditer(reasoning.strip())]
    ends = [end for end in ends if reasoning.strip()[end:].strip()]
    number = math.ceil(strength * len(ends))
    return reasoning.strip()[: ends[number - 1]] if number else ""


def beginning_of(row: dict[str, Any], processor: Any, strength: float) -> list[int] | None:
    """Token ids of the first sentences of a row's reference answer; `None` where nothing is given.

    They are the first tokens of the whole answer, so that no word is cut where the whole does not cut it.
    """
    answer, sentences = reference_answer(row, processor), first_sentences(row.get("reasoning") or "", strength)
    if answer is None or not sentences:
        return None
    wanted = len(THINK_START + sentences)
    for number in range(1, len(answer)):
        if len(processor.tokenizer.decode(answer[:number])) >= wanted:
            return answer[:number]
    return None


class BeginWith(LogitsProcessor):
    """Lets every row begin with tokens that are given.

    Args:
        prompt_length (`int`): Tokens before the completions.
        beginnings (`Sequence[Sequence[int]]`): Token ids, one list per row; an empty one gives nothing.
    """

    def __init__(self, prompt_length: int, beginnings: Sequence[Sequence[int]]):
        self.prompt_length, self.beginnings = prompt_length, beginnings

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        written = input_ids.shape[1] - self.prompt_length
        rows = [row for row, ids in enumerate(self.beginnings) if written < len(ids)]
        if not rows:
            return scores
        scores = scores.clone()
        scores[rows] = float("-inf")
        scores[rows, [self.beginnings[row][written] for row in rows]] = 0.0
        return scores


@contextmanager
def begun_answers(model: Any, beginnings: Sequence[Sequence[int]] | None) -> Iterator[None]:
    """While it lasts, `model.generate` begins its rows as given.

    They pass the model as any token that it writes, so that states, caches and positions are those of its family.

    Args:
        model (`SegCompassForReasoningSegmentation`): Not wrapped.
        beginnings (`Sequence[Sequence[int]]`, *optional*): Token ids, one list per row of all calls together, in their
            order; `None` changes nothing.
    """
    if beginnings is None:
        yield
        return
    own, left = model.generate, list(beginnings)
    before = vars(model).get("generate")  # where something else has wrapped it

    def generate(*args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        config = kwargs.get("generation_config") or model.generation_config
        number = len(ids) * (kwargs.get("num_return_sequences") or config.num_return_sequences or 1)
        its, left[:] = left[:number], left[number:]
        processors = [*(kwargs.pop("logits_processor", None) or []), BeginWith(ids.shape[1], its)]
        return own(*args, logits_processor=processors, **kwargs)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before


__all__ = ["beginning_of", "begun_answers", "first_sentences", "guidance_strength", "reference_answer"]
