# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The confidence from which slots are shown, chosen on rows: the one with the highest gIoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.segmentation import METRIC_NAMES, SampleScore, metrics_of_scores, score_sample


@dataclass
class AnswersByThreshold:
    """The answers to a row at every threshold: with its `n` surest masks, for every `n`.

    Args:
        slot_logits (`np.ndarray` of shape `(num_masks,)`): Confidences of its masks, the surest first.
        scores (`list[SampleScore]`): Of the answers with none of the masks, the surest, the two surest, and on.
    """

    slot_logits: np.ndarray
    scores: list[SampleScore]

    @classmethod
    def of(
        cls, masks: np.ndarray, slot_logits: np.ndarray, targets: np.ndarray, ignore: np.ndarray | None = None
    ) -> AnswersByThreshold:
        """Score the answers.

        Args:
            masks (`np.ndarray` of shape `(num_masks, height, width)`): bool, of the slots that would be shown if no
                confidence were too low; none of two that show one object.
            slot_logits (`np.ndarray` of shape `(num_masks,)`): Their confidences.
            targets (`np.ndarray` of shape `(num_objects, height, width)`), ignore (`np.ndarray`, *optional*): As for
                [`score_sample`].
        """
        order = np.argsort(-slot_logits, kind="stable")
        scores = [score_sample(masks[order[:count]], targets, ignore) for count in range(len(order) + 1)]
        return cls(slot_logits[order], scores)

    def at(self, threshold: float) -> SampleScore:
        """The score of the answer with the masks whose confidence is above a threshold."""
        return self.scores[int((self.slot_logits > threshold).sum())]


def choose_threshold(answers: Sequence[AnswersByThreshold]) -> dict[str, Any]:
    """The threshold with the highest gIoU.

    The higher it is, the more rows without target are answered rightly, and the fewer with one. Between two
    confidences all thresholds give the same answers; their middle is taken, and of equal ones the highest.

    Args:
        answers (`Sequence[AnswersByThreshold]`): Of the rows to choose it on.

    Returns:
        `dict`: `slot_logit_threshold`, and at this threshold `gIoU`, `cIoU`, `N-acc`, `T-acc` in [0, 1] of these rows.

    Raises:
        ValueError: no row has a mask, so that every threshold gives the same answers.
    """
    steps = [
        (logit, after.iou - before.iou)
        for answer in answers
        if not answer.scores[0].left_out
        for logit, before, after in zip(answer.slot_logits, answer.scores, answer.scores[1:], strict=False)
    ]
    if not steps:
        raise ValueError("no row has a mask at any confidence, so no threshold can be chosen; take other rows.")
    logits, gains = np.array(sorted(steps, key=lambda step: -step[0])).T
    last = np.flatnonzero(np.append(logits[1:] != logits[:-1], True))  # of each confidence, the last of its masks
    edges = np.array([logits[0] + 1.0, *logits[last], logits[-1] - 1.0])  # n edges: n - 1 different thresholds
    gious = np.append(0.0, np.cumsum(gains)[last])  # over that without any mask, times the number of rows
    best = int(gious.argmax())
    threshold = float((edges[best] + edges[best + 1]) / 2)
    figures = metrics_of_scores([answer.at(threshold) for answer in answers], METRIC_NAMES)
    return {"slot_logit_threshold": threshold, **figures}


__all__ = ["AnswersByThreshold", "choose_threshold"]
