"""Scenes as tensors for the training recipe of scenes-tiny: made on the fly, every sample seen once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import scenes
from ..data.scenes.drawing import CELL, COLORS, GRID, SHAPES, SIZES
from .scenes_parts import normalize_pixels

MAX_OBJECTS = 10
ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES)}
CELLS = tuple("abcdefgh"[column] + str(row + 1) for row in range(GRID) for column in range(GRID))


class SceneSamples(Dataset):
    """Scene `i` of a split as arrays; the same `i` gives the same sample in every process and after every resume.

    `kinds` restricts the instructions, but for every `any_kind_every`-th scene.
    """

    def __init__(
        self,
        num_samples: int,
        split: str = "train",
        seed: int = 0,
        kinds: tuple[str, ...] | None = None,
        any_kind_every: int | None = None,
    ):
        self.num_samples, self.split, self.seed = num_samples, split, seed
        self.kinds, self.any_kind_every = kinds, any_kind_every

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        free = self.any_kind_every is not None and index % self.any_kind_every == 0
        scene = scenes.sample(self.split, index, self.seed, None if free else self.kinds)
        table = np.full((MAX_OBJECTS, 4), -100, np.int64)  # color, shape, size, cell of each object
        for row, o in zip(table, scene.objects, strict=False):
            row[:3] = [values.index(getattr(o, name)) for name, values in ATTRIBUTES.items()]
            row[3] = o.row * GRID + o.column
        return {
            "image": scene.image,
            "ids": scene.ids,
            "objects": table,
            "instruction": scene.instruction.text,
            "reasoning": scene.instruction.reasoning,
            "targets": scene.instruction.targets,
        }


def patch_labels(ids: torch.Tensor, objects: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every 14-pixel patch shows.

    Args:
        ids (`torch.Tensor` of shape `(batch, height, width)`): 0 or 1 + object index, per pixel.
        objects (`torch.Tensor` of shape `(batch, MAX_OBJECTS, 4)`): color, shape, size, cell; -100: no object.

    Returns:
        `dict` of `(batch, 64)` tensors: `color`, `shape`, `size` (-100 off objects), `centre` (bool: holds an
        object's centre), `background` (bool: no object within).
    """
    batch = ids.shape[0]
    patches = ids.view(batch, GRID, CELL, GRID, CELL).transpose(2, 3).reshape(batch, GRID * GRID, -1).long()
    counts = torch.zeros(batch, GRID * GRID, MAX_OBJECTS + 1, dtype=torch.long)
    counts.scatter_add_(2, patches, torch.ones_like(patches))
    most, owner = counts[..., 1:].max(-1)  # (batch, 64)
    centre = torch.zeros(batch, GRID * GRID, dtype=torch.bool)
    for index in range(MAX_OBJECTS):
        rows = (objects[:, index, 3] >= 0).nonzero()[:, 0]
        cells = objects[rows, index, 3]
        centre[rows, cells] = True
        owner[rows, cells] = index
    shown = centre | (most > 0.4 * CELL * CELL)
    labels = {"centre": centre, "background": counts[..., 0] == CELL * CELL}
    for column, name in enumerate(ATTRIBUTES):
        values = objects[..., column].gather(1, owner)
        labels[name] = torch.where(shown, values, torch.full_like(values, -100))
    return labels


@dataclass
class SceneCollator:
    """Stack samples; with a tokenizer also build prompt + reference completion, padded on the right.

    `targets` holds the first `num_slots` objects of the answer.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    num_slots: int = 4

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            "pixel_values": normalize_pixels(torch.from_numpy(np.stack([s["image"] for s in samples]))),
            "ids": torch.from_numpy(np.stack([s["ids"] for s in samples])),
            "objects": torch.from_numpy(np.stack([s["objects"] for s in samples])),
        }
        if self.tokenizer is not None:
            batch.update(self._text(samples))
        return batch

    def _text(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.tokenizer
        image = "<image>" * (GRID * GRID)
        prompts = [f"{tokenizer.bos_token}{image}{s['instruction']}" for s in samples]
        slots = "<REF_POS>" * self.num_slots
        completions = [f"<think>{s['reasoning']}</think>{slots}{tokenizer.eos_token}" for s in samples]
        prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids
        completion_ids = tokenizer(completions, add_special_tokens=False).input_ids
        length = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
        input_ids = torch.full((len(samples), length), tokenizer.pad_token_id)
        attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            end = len(prompt) + len(completion)
            input_ids[row, :end] = torch.tensor(prompt + completion)
            attention_mask[row, :end] = 1
            completion_mask[row, len(prompt) : end] = 1
        labels = torch.where(completion_mask == 1, input_ids, torch.full_like(input_ids, -100))
        targets = torch.zeros(len(samples), self.num_slots, dtype=torch.long)  # 1 + object index, 0 = no object
        for row, sample in enumerate(samples):
            chosen = sample["targets"][: self.num_slots]
            targets[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.long) + 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "labels": labels,
            "targets": targets,
        }
