# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The rows of a stage, named as `segcompass evaluate` names data sets."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ...data import scenes
from ...data.builders.splitting import build_folder_splits, split_by_image
from ...evaluation.datasets_spec import load_dataset_of
from ..segmentation.own_reasoning import with_right_samples
from .settings import RecipeError, Stage

HELD_OUT = "held_out"  # as `eval_dataset`: a fifth of the images of `dataset`, or the split that a folder names
# Columns that a stage cannot do without; an SAE reads interleaved rows too.
NEEDED = {"warmup": ("image", "instruction"), "sae": ()}
ALL_NEEDED = ("image", "instruction", "masks")


@dataclass
class StageRows:
    """What a stage trains and evaluates on: `datasets.Dataset`, or lazily made rows of Scenes."""

    train: Any
    evaluation: Any | None = None


class RowsWithout(Sequence):
    """Rows that lack some columns.

    Args:
        rows (`Sequence[dict]`): In the row schema.
        columns (`Collection[str]`): What is left out.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], columns: Collection[str]):
        self.rows, self.columns = rows, frozenset(columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return {name: value for name, value in self.rows[index].items() if name not in self.columns}


def load_rows(stage: Stage, arguments: Any, num_processes: int = 1) -> StageRows:
    """The rows that a stage names.

    Args:
        stage ([`Stage`]): Its own keys say which.
        arguments (`TrainingArguments`): Of its trainer; rows of Scenes are as many as its steps need.
        num_processes (`int`, defaults to 1): That share the work.

    Raises:
        RecipeError: None is named, it cannot be read, or has too few rows; names stage and key.
    """
    own, name = stage.own, stage.name
    if own.dataset is None:
        raise RecipeError(f"{name}.dataset is missing; name what to train on, such as folder:my_pictures.")
    if own.own_samples is not None and name != "segmentation":
        raise RecipeError(f"{name}.own_samples: only segmentation trains on right answers; leave it out.")
    as_dataset = name == "grpo" or own.own_samples is not None
    try:
        if own.eval_dataset == HELD_OUT:
            train, evaluation = _split(own.dataset, arguments.seed)
        else:
            count = own.num_samples or rows_needed(stage, arguments, num_processes)
            train = _named(own.dataset, count, f"{name}.num_samples", as_dataset)
            evaluation = None
            if own.eval_dataset is not None:
                count = own.num_eval_samples or 100
                evaluation = _named(own.eval_dataset, count, f"{name}.num_eval_samples", as_dataset)
    except RecipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(f"{name}.dataset: {error}") from error
    train = _first(train, own.num_samples, f"{name}.num_samples")
    if evaluation is not None:
        evaluation = _without(_first(evaluation, own.num_eval_samples, f"{name}.num_eval_samples"), stage)
    train = _without(train, stage)
    if own.own_samples is not None:
        try:
            train = with_right_samples(train, own.own_samples)
        except ValueError as error:
            raise RecipeError(f"{name}.own_samples: {error}") from error
    if name == "grpo":
        from ..grpo.prompt_pool import choice_of_prompts  # needs TRL, other stages do not

        try:
            choice_of_prompts(train, arguments)
        except ValueError as error:
            raise RecipeError(f"{name}: {error}") from error
    return StageRows(train, evaluation)


def rows_needed(stage: Stage, arguments: Any, num_processes: int = 1) -> int | None:
    """Rows of the steps asked for, each seen once; `None` where settings do not say."""
    if arguments.max_steps <= 0 or stage.name == "sae":  # whose steps count tokens
        return None
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes
    return max(1, arguments.max_steps * per_step // getattr(arguments, "num_generations", 1))


def _named(spec: str, num_samples: int | None, key: str, as_dataset: bool) -> Any:
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        split, _, seed = rest.partition(":")
        if num_samples is None:
            raise RecipeError(f"{key} is missing: {spec} has no end of its own.")
        if split in scenes.SPLITS and (seed or "0").isdigit() and not as_dataset:
            return scenes.SceneRows(split, num_samples, int(seed or 0))  # others: the message of load_dataset_of
    if kind == "folder" and rest.count(":") < 2:  # evaluation calls lines without a split "test"
        spec += ":" * (2 - rest.count(":")) + "train"
    return load_dataset_of(spec, num_samples).dataset


def _split(spec: str, seed: int) -> tuple[Any, Any]:
    kind, _, rest = spec.partition(":")
    if kind == "folder" and rest.count(":") < 2:
        root, _, annotations = rest.partition(":")
        return build_folder_splits(root, annotations or None, seed=seed)
    if kind == "scenes":
        raise RecipeError(f"eval_dataset: {HELD_OUT} is for data with an end; of {spec} name another split.")
    return split_by_image(load_dataset_of(spec).dataset, seed=seed)


def _first(rows: Any, count: int | None, key: str) -> Any:
    if count is None or len(rows) == count:
        return rows
    if not 0 < count <= len(rows):
        raise RecipeError(f"{key} is {count}, but the data set has {len(rows)} rows.")
    return rows.select(range(count))


def _without(rows: Any, stage: Stage) -> Any:
    columns, needed = stage.own.without or [], NEEDED.get(stage.name, ALL_NEEDED)
    present = getattr(rows, "column_names", None) or list(rows[0])
    missing = [name for name in needed if name not in present]
    if missing:
        raise RecipeError(f"{stage.name}.dataset has the columns {present} and lacks {missing}, which it reads.")
    unknown = [name for name in columns if name not in present]
    if unknown:
        raise RecipeError(f"{stage.name}.without names {unknown}; the data set has {present}.")
    if set(columns) & set(needed):
        raise RecipeError(f"{stage.name}.without leaves out {columns}; the stage reads {', '.join(needed)}.")
    if not columns:
        return rows
    return rows.remove_columns(columns) if hasattr(rows, "remove_columns") else RowsWithout(rows, columns)


__all__ = ["HELD_OUT", "RowsWithout", "StageRows", "load_rows", "rows_needed"]
