# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What can be evaluated: anything that turns rows into masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass
class Prediction:
    """The answer to one row.

    Args:
        masks (`np.ndarray` of shape `(num_masks, height, width)`): bool, at the size of the row's image. No mask says
            that nothing is meant; several count as their union.
        scores (`list[float]`): One per mask, in [0, 1]; empty where the predictor has none.
        reasoning (`str`, *optional*): What the model thought.
        text (`str`, *optional*): The whole answer in words.
        duplicates_dropped (`int`, defaults to 0): Masks that the predictor left out, since each showed the same object
            as a better one.
    """

    masks: np.ndarray
    scores: list[float] = field(default_factory=list)
    reasoning: str | None = None
    text: str | None = None
    duplicates_dropped: int = 0

    def __post_init__(self) -> None:
        self.masks = np.asarray(self.masks)
        if self.masks.ndim != 3 or self.masks.dtype != bool:
            raise ValueError(
                f"masks of a prediction are {self.masks.dtype} of shape {self.masks.shape}; expected bool of shape "
                "(num_masks, height, width), and (0, height, width) where nothing is predicted."
            )
        if self.scores and len(self.scores) != len(self.masks):
            raise ValueError(f"a prediction has {len(self.masks)} masks but {len(self.scores)} scores; one per mask.")
        if not all(0 <= score <= 1 for score in self.scores):  # NaN is in no range
            raise ValueError(f"a prediction has the scores {self.scores}; expected numbers in [0, 1].")


class Predictor(Protocol):
    """Anything the runner evaluates.

    A row's prediction may depend on the rows of its batch (padding changes the last bits of floats), but on nothing
    that came before: batches are spread over processes, and those finished before a kill are not seen again. What is
    random must be seeded by the row, for instance by its `sample_id`.

    A predictor may also have `settings`, a `dict` that json can hold with whatever decides its answers (weights,
    thresholds, seeds). They are part of the summary, and a folder of results is not continued with others. With a
    `check_row`, which raises a `ValueError` for a row that it cannot answer (no instruction, too long a one), such
    rows are named and counted like those whose image is broken.
    """

    name: str

    def predict(self, rows: list[dict[str, Any]]) -> list[Prediction]:
        """Answer rows in the row schema, whose `image` is an RGB `PIL.Image.Image`; one prediction per row."""
        ...
