# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Shards -> rows of answers: every image through the segmenter's encoder once, however many questions it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..evaluation.predictors.model import ModelPredictor
from ..image_features_segcompass import ImageFeatures, join_rows
from .batches import Batch, BatchMaker, Question
from .rows import answered_row, failed_row, strongest_concepts
from .shards import Shard, Source


class ShardPredictor:
    """Answers shards, one after another.

    The rows of a shard depend on nothing but the shard, the model and the settings: not on the shards before it, nor
    on the process.

    Args:
        predictor ([`ModelPredictor`]): Model, processor and how it answers.
        source ([`Source`]): The data set.
        instructions (`Sequence[str]`): Asked about every image; where there are none, those of the data set.
        batch_size (`int`): Questions at a time.
        concepts (`int`, *optional*, defaults to 0): So many active concepts of each answer are listed.
        on_batch (`Callable[[int, int], None]`, *optional*): Called with the questions and errors of each batch.
    """

    def __init__(
        self,
        predictor: ModelPredictor,
        source: Source,
        instructions: Sequence[str],
        batch_size: int,
        concepts: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ):
        self.predictor, self.concepts, self.on_batch = predictor, concepts, on_batch
        self._maker = BatchMaker(predictor.processor, predictor.check_row, source, instructions, batch_size)
        self._held: dict[str, torch.Tensor | ImageFeatures] = {}  # key of an image -> its features, a batch of one

    def predict(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[dict[str, Any]]]]:
        """Each shard with all of its rows, in the order of its questions.

        Raises:
            OSError: A file cannot be read now.
        """
        found: dict[int, dict[str, Any]] = {}
        for batch in self._maker.batches(shards):
            answers = self._answers(batch)
            found |= {question.place: row for question, row in zip(batch.questions, answers, strict=True)}
            if self.on_batch is not None:
                self.on_batch(len(answers), sum(row["error"] is not None for row in answers))
            if batch.is_last:
                yield batch.shard, [found[place] for place in sorted(found)]
                found = {}

    def _answers(self, batch: Batch) -> list[dict[str, Any]]:
        if batch.inputs is None:
            return [self._failed(question, question.problem) for question in batch.questions]
        try:
            return self._segment(batch.questions, batch.new, batch.inputs.result)
        except ValueError:  # of one question; alone it is known which
            return [self._answer_alone(question) for question in batch.questions]
        finally:
            for key in batch.done_with:
                self._held.pop(key, None)

    def _answer_alone(self, question: Question) -> dict[str, Any]:
        new = [] if question.key in self._held else [question.key]
        try:
            return self._segment([question], new, lambda: self._maker.inputs([question], new))[0]
        except ValueError as error:
            return self._failed(question, str(error))

    @torch.no_grad()
    def _segment(
        self, questions: list[Question], new: list[str], make_inputs: Callable[[], tuple[dict, torch.Tensor | None]]
    ) -> list[dict[str, Any]]:
        inputs, pixels = make_inputs()
        model = self.predictor.model
        if pixels is not None:
            features = model.encode_image(pixels.to(model.device))
            self._held |= {key: features[index : index + 1] for index, key in enumerate(new)}
        features = join_rows([self._held[question.key] for question in questions], torch.cat)
        images = [[question.image] for question in questions]
        inputs = inputs | {"image_embeddings": features}
        output, _, results = self.predictor.segment_inputs(inputs, images, all_slots=False)
        concepts: list = [None] * len(questions)
        if self.concepts:
            concepts = strongest_concepts(output.concepts, self.concepts)
        return [answered_row(q.columns, *answer) for q, *answer in zip(questions, results, concepts, strict=True)]

    def _failed(self, question: Question, problem: str | None) -> dict[str, Any]:
        return failed_row(question.columns, problem or "unknown", bool(self.concepts))
