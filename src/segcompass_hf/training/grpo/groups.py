# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Completions of one prompt in TRL's micro-batches: kept together, and their prompt's inputs taken once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from .passes import Prompts

# What TRL passes on to the model beside ids and mask, and what it needs to tell apart the pictures of rows.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
PICTURES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes")
PICTURES += ("image_position_ids",)
COUNTS = ("num_images", "num_tiles")


def answers_in_a_row(rows: Sequence[dict[str, Any]], image_numbers: torch.Tensor, number: int) -> int:
    """`number` where every so many rows in a row are the same prompt with the same picture, else 1.

    Args:
        rows (`Sequence[dict]`): With their `prompt`, as they are to be sampled for.
        image_numbers (`torch.LongTensor` of shape `(len(rows),)`): Equal where rows show the same image.
        number (`int`): Completions per prompt.
    """
    images = image_numbers.tolist()
    same = [
        rows[first]["prompt"] == rows[first + later]["prompt"] and images[first] == images[first + later]
        for first in range(0, len(rows) - number + 1, number)
        for later in range(1, number)
    ]
    return number if len(rows) % number == 0 and all(same) else 1


def parts_of_prompts(prompt_ids: list, images: list | None, fields: dict[str, Any], size: int) -> Iterator[tuple]:
    """At most `size` prompts at a time, of what TRL makes of prompts: token ids, pictures, and the VLM's other inputs.

    Where it cannot be told which entries belong to which picture (tiles), all at once.
    """
    number = len(prompt_ids)
    fields = {
        name: value if _is_taken_as_it_is(value) else torch.as_tensor(np.array(value))
        for name, value in fields.items()
    }
    split = split_pixel_values_by_grid({**fields, "num_images": [1] * number}) if number > size else {}
    if not split or any(len(value) != number for value in split.values()):
        yield prompt_ids, images, fields
        return
    for start in range(0, number, size):
        rows = slice(start, start + size)
        part = unsplit_pixel_values_by_grid({name: value[rows] for name, value in split.items()})
        part.pop("num_images")
        yield prompt_ids[rows], images and images[rows], part


def _is_taken_as_it_is(value: Any) -> bool:
    """A tensor, or lists with an entry per token; TRL makes tensors of all else."""
    return isinstance(value, torch.Tensor) or (isinstance(value, list) and isinstance(value[0], list))


def prompt_numbers(batch: dict[str, Any]) -> torch.Tensor:
    """Numbers `(batch_size,)` of a batch's prompts, in no order; equal where tokens, padding and picture are equal."""
    parts = batch["image_numbers"][:, None], batch["prompt_ids"], batch["prompt_mask"]
    return torch.unique(torch.cat(parts, 1), dim=0, return_inverse=True)[1]


def shared_prompts(batch: dict[str, Any]) -> Prompts | None:
    """The different prompts of a micro-batch; `None` where no two completions have the same one.

    Args:
        batch (`dict[str, Any]`): TRL's inputs of a micro-batch, and `image_numbers` `(batch_size,)`.
    """
    rows = prompt_numbers(batch)
    num_prompts = int(rows.max()) + 1
    if num_prompts == len(rows):
        return None
    first = (rows == torch.arange(num_prompts, device=rows.device)[:, None]).int().argmax(1)
    width = batch["prompt_ids"].shape[1]
    given = {name: batch[name] for name in (*PER_TOKEN, *PICTURES, *COUNTS) if batch.get(name) is not None}
    given = unsplit_pixel_values_by_grid(_pick(split_pixel_values_by_grid(given), first))
    inputs = {name: value[:, :width] if name in PER_TOKEN else value for name, value in given.items()}
    inputs = {name: value for name, value in inputs.items() if name not in COUNTS}
    prompts = {"input_ids": batch["prompt_ids"][first], "attention_mask": batch["prompt_mask"][first]}
    return Prompts(rows, prompts | inputs)


def with_groups_together(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one sampling, with the completions of a prompt next to each other.

    TRL shuffles completions; what is left of that is the order of the prompts, which stays as random as it was.
    """
    batches = [split_pixel_values_by_grid(batch) for batch in batches]
    columns = {name: _join([batch[name] for batch in batches]) for name in batches[0]}
    numbers = prompt_numbers(columns)
    first = (numbers[:, None] == numbers).int().argmax(1)
    ordered = _pick(columns, torch.argsort(first, stable=True))
    return [unsplit_pixel_values_by_grid(batch) for batch in split_tensor_dict(ordered, len(batches))]


def _join(values: list[Any]) -> Any:
    """A column of several batches as one; what has no rows is the same in all."""
    if isinstance(values[0], torch.Tensor):
        return values[0] if values[0].ndim == 0 else torch.cat(values)
    return None if values[0] is None else [each for value in values for each in value]


def _pick(columns: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Some rows of columns, in this order."""

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.ndim == 0 else value[rows]
        return None if value is None else [value[row] for row in rows.tolist()]

    return {name: pick(value) for name, value in columns.items()}
