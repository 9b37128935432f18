# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which prompts are worth sampling: kinds that every batch holds, and the frontier of what a model can do."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

from ...evaluation.pass_at_k import read_pass_rates

REPLAY_SHARE = 0.5  # of the prompts drawn in place of others: ones that are known to teach
RETRY_SHARE = 0.1  # of the prompts that taught nothing when last seen, when their turn comes again
TRIES = 64  # of drawing a prompt that has not taught nothing, before any is taken


def column_of(rows: Any, name: str, setting: str) -> list[Any]:
    """A column of a training set, read without its images.

    Raises:
        ValueError: A stream or a list, or no such column; names the `setting` that needs it.
    """
    if not hasattr(rows, "__len__") or not hasattr(rows, "column_names"):
        raise ValueError(
            f"{setting} looks prompts up by a column, which {type(rows).__name__} does not allow; give a "
            "datasets.Dataset."
        )
    if name not in rows.column_names:
        raise ValueError(f"{setting} reads the column {name!r}; train_dataset has {rows.column_names}.")
    return list(rows[name])


class StratifiedRepeatSampler(RepeatSampler):
    """[`trl.trainer.utils.RepeatSampler`] whose batches hold every value of a column.

    One place of a batch belongs to every value; the rest are shared out as the rows are. Rows of rare values come
    round again before the others are through; the length stays that of the parent.

    Args:
        strata (`list`): The column, one entry per row.
        batch_size (`int`): Prompts of a generation, at least as many as there are values.
        kwargs: As of the parent.

    Raises:
        ValueError: Fewer prompts than values.
    """

    def __init__(self, data_source: Any, strata: list[Any], batch_size: int = 1, **kwargs):
        super().__init__(data_source, batch_size=batch_size, **kwargs)
        self.rows: dict[Any, list[int]] = {}
        for index, stratum in enumerate(strata):
            self.rows.setdefault(stratum, []).append(index)
        if len(self.rows) > batch_size:
            values = ", ".join(sorted(map(str, self.rows)))
            raise ValueError(
                f"a generation takes {batch_size} prompts, but the column has {len(self.rows)} values, each of which "
                f"every batch is to hold: {values}. Raise the batch size, gradient_accumulation_steps or "
                "steps_per_generation, lower num_generations, or leave stratify_by out."
            )

    def __iter__(self) -> Iterator[int]:
        # One number of the generator at the start, whoever resumes counts on it.
        seed = int(torch.randint(2**62, (), generator=self.generator)) if self.shuffle else None
        chances = random.Random(seed)
        turns = {stratum: self._turns(rows, chances) for stratum, rows in self.rows.items()}
        spare, credit = self.batch_size - len(self.rows), dict.fromkeys(self.rows, 0.0)
        for _ in range(self.num_samples // self.batch_size):
            chosen = list(self.rows)
            for stratum, rows in self.rows.items():
                credit[stratum] += spare * len(rows) / self.num_samples
            for _ in range(spare):
                chosen.append(max(credit, key=credit.get))
                credit[chosen[-1]] -= 1
            batch = [next(turns[stratum]) for stratum in chosen]
            for _ in range(self.repeat_count):
                for index in batch:
                    yield from [index] * self.mini_repeat_count

    def _turns(self, rows: list[int], chances: random.Random) -> Iterator[int]:
        """The rows of a value, again and again, each time in another order."""
        while True:
            yield from chances.sample(rows, len(rows)) if self.shuffle else rows


class PromptPool:
    """What is known of the prompts of a data set: which taught something when last sampled.

    A prompt teaches where its samples are neither all right nor all wrong. That is measured before training
    (`segcompass evaluate --pass-at-k`), and whenever a group of its completions is sampled.

    Args:
        sample_ids (`list[str]`): Of all prompts.
        strata (`list`, *optional*): A value each; a prompt is replaced by one with the same.
        pass_rates (`Mapping[str, float]`, *optional*): Share of right samples by `sample_id`, of those measured.

    Raises:
        ValueError: Pass rates of none of the prompts.
    """

    def __init__(
        self, sample_ids: list[str], strata: list[Any] | None = None, pass_rates: Mapping[str, float] | None = None
    ):
        self.sample_ids, self.strata = sample_ids, strata or [None] * len(sample_ids)
        self.index = {sample_id: index for index, sample_id in enumerate(sample_ids)}
        self._rows: dict[Any, list[int]] = {}
        for index, stratum in enumerate(self.strata):
            self._rows.setdefault(stratum, []).append(index)
        self.teaches: dict[int, bool] = {}
        for sample_id, rate in (pass_rates or {}).items():
            self.note(sample_id, 0 < rate < 1)
        if pass_rates is not None and not self.teaches:
            raise ValueError(
                f"none of the {len(pass_rates)} measured prompts (such as {next(iter(pass_rates), None)!r}) is among "
                f"the {len(sample_ids)} of train_dataset (such as {sample_ids[0]!r}); measure these."
            )

    def note(self, sample_id: str, teaches: bool) -> None:
        """Remember how a prompt did."""
        if sample_id in self.index:
            self.teaches[self.index[sample_id]] = bool(teaches)

    def is_due(self, sample_id: str, chances: random.Random) -> bool:
        """Whether a prompt is to be sampled now that its turn has come."""
        teaches = self.teaches.get(self.index.get(sample_id), True)
        return teaches or chances.random() < RETRY_SHARE

    def draw(self, sample_id: str, taken: Collection[int], chances: random.Random) -> int:
        """Index of a prompt in place of another, of the same value of the column.

        Args:
            sample_id (`str`): Of the prompt to be replaced.
            taken (`Collection[int]`): Indices that are not drawn, as long as there are others.
            chances (`random.Random`): What decides.
        """
        place = self.index.get(sample_id)
        rows = self._rows[self.strata[place]] if place is not None else list(range(len(self.sample_ids)))
        if chances.random() < REPLAY_SHARE:
            known = [index for index in rows if self.teaches.get(index) and index not in taken]
            if known:
                return chances.choice(known)
        tried = [chances.choice(rows) for _ in range(TRIES)]
        free = [index for index in tried if index not in taken]
        return next((index for index in free if self.teaches.get(index, True)), (free or tried)[0])

    def state(self) -> dict[int, bool]:
        """What a checkpoint keeps."""
        return dict(self.teaches)

    def load_state(self, state: dict[int, bool]) -> None:
        """Put back what `state` returned."""
        self.teaches = dict(state)


def choice_of_prompts(rows: Any, args: Any) -> tuple[list[Any] | None, PromptPool | None]:
    """What a training's settings say of its prompts, checked: the column that batches are balanced by, and the pool
    that prompts are drawn from.

    Args:
        rows (`datasets.Dataset`): To train on.
        args ([`SegCompassGRPOConfig`]): `stratify_by`, `pass_rates`, `max_resamplings`.

    Raises:
        ValueError: Settings and rows do not fit each other, or no pass rates are where they are said to be.
    """
    strata = pool = None
    if args.stratify_by is not None:
        strata = column_of(rows, args.stratify_by, f"stratify_by={args.stratify_by!r}")
        prompts = args.generation_batch_size // args.num_generations
        StratifiedRepeatSampler(strata, strata, mini_repeat_count=1, batch_size=prompts)
    if args.max_resamplings or args.pass_rates is not None:
        setting = "pass_rates" if args.pass_rates is not None else "max_resamplings"
        rates = None if args.pass_rates is None else read_pass_rates(args.pass_rates)
        pool = PromptPool(column_of(rows, "sample_id", setting), strata, rates)
    return strata, pool


__all__ = ["PromptPool", "StratifiedRepeatSampler", "choice_of_prompts", "column_of"]
