"""Scenes as tensors, with labels that only they have: what every object is and which cell it lies in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from parts import normalize_pixels
from torch.utils.data import Dataset

from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.drawing import CELL, COLORS, GRID, SHAPES, SIZES

MAX_OBJECTS = 10
ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES)}
CELLS = tuple("abcdefgh"[column] + str(row + 1) for row in range(GRID) for column in range(GRID))


class SceneSamples(Dataset):
    """Scene `i` of the training split as arrays; the same `i` gives the same sample in every process."""

    def __init__(self, num_samples: int, seed: int = 0):
        self.num_samples, self.seed = num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = scenes.sample("train", index, self.seed)
        table = np.full((MAX_OBJECTS, 4), -100, np.int64)  # color, shape, size, cell of each object
        for row, o in zip(table, scene.objects, strict=False):
            row[:3] = [values.index(getattr(o, name)) for name, values in ATTRIBUTES.items()]
            row[3] = o.row * GRID + o.column
        return {"image": scene.image, "ids": scene.ids, "objects": table}


def collate(samples: list[dict[str, Any]], image_processor: Any) -> dict[str, torch.Tensor]:
    """Stack samples; pixels scaled as an image processor does."""
    pixels = torch.from_numpy(np.stack([s["image"] for s in samples]))
    return {
        "pixel_values": normalize_pixels(pixels, image_processor.image_mean, image_processor.image_std),
        "ids": torch.from_numpy(np.stack([s["ids"] for s in samples])),
        "objects": torch.from_numpy(np.stack([s["objects"] for s in samples])),
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
