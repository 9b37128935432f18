# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What is asked of a data set: everything that decides the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .shards import Source

INSTRUCTION_COLUMN = "instruction"


@dataclass(frozen=True)
class PredictionJob:
    """A data set, a checkpoint, and how to ask.

    Args:
        dataset (`str`): See [`open_source`].
        output (`str`): Folder or URL for the results.
        model (`str`, *optional*): Folder, Hub id or name of a checkpoint; see `default_checkpoint`.
        instructions (`tuple[str, ...]`, *optional*): Each is asked about every image; in place of a column.
        instruction_column (`str`, *optional*): Where the data set's own are, a text or a list of texts per image;
            `instruction` by default.
        reasoning (`str`, *optional*, defaults to `"full"`): As in `segment`.
        max_new_tokens (`int`, *optional*): Limit of an answer; the model's by default.
        batch_size (`int`, *optional*, defaults to 8): Questions at a time.
        rows_per_shard (`int`, *optional*, defaults to 500): Rows that are written as a whole; what a kill may lose.
        concepts (`int`, *optional*, defaults to 0): So many active concepts of each answer are listed.
        allow_outside (`bool`, *optional*, defaults to `False`): Also read files outside of the data set's folder.

    Raises:
        ValueError: An instruction is empty, a number is too small, or instructions and a column are given.
    """

    dataset: str
    output: str
    model: str | None = None
    instructions: tuple[str, ...] = ()
    instruction_column: str | None = None
    reasoning: Literal["full", "short", "none"] = "full"
    max_new_tokens: int | None = None
    batch_size: int = 8
    rows_per_shard: int = 500
    concepts: int = 0
    allow_outside: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.instructions, str) or not all(words.strip() for words in self.instructions):
            raise ValueError(
                f"instructions are {self.instructions!r:.80}; expected a tuple of texts, each saying what to find."
            )
        if self.instructions and self.instruction_column is not None:
            raise ValueError(
                f"there are instructions for every image and a column of them ({self.instruction_column!r}); name one "
                "of the two."
            )
        for name, least in {"batch_size": 1, "rows_per_shard": 1, "concepts": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number of {least} or more.")

    def open_source(self) -> Source:
        """The data set's shards; see [`open_source`] for what it raises."""
        from .sources import open_source

        column = None if self.instructions else self.instruction_column or INSTRUCTION_COLUMN
        return open_source(self.dataset, self.rows_per_shard, column, self.allow_outside)

    def load_predictor(self, device: Any = None) -> Any:
        """Checkpoint and processor as a [`ModelPredictor`]; see `load_checkpoint` for what it raises."""
        from ..checkpoint import default_checkpoint, load_checkpoint
        from ..evaluation.predictors.model import ModelPredictor

        model, processor, name = load_checkpoint(self.model or default_checkpoint(self.dataset), device)
        limits = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        extra = {"output_concepts": True} if self.concepts else {}
        return ModelPredictor(model, processor, Path(name).name, reasoning=self.reasoning, **limits, **extra)

    def shard_predictor(
        self, predictor: Any, source: Source, on_batch: Callable[[int, int], None] | None = None
    ) -> Any:
        """The [`ShardPredictor`] of this job."""
        from .predicting import ShardPredictor

        return ShardPredictor(predictor, source, self.instructions, self.batch_size, self.concepts, on_batch)

    def settings(self, predictor: Any, source: Source) -> dict[str, Any]:
        """What two runs must share for their rows to be the same, as json holds it."""
        return {
            "predictor": {"name": predictor.name, **predictor.settings},
            "dataset": source.description(),
            "instructions": list(self.instructions),
            "batch_size": self.batch_size,
            "rows_per_shard": self.rows_per_shard,
            "concepts": self.concepts,
        }
