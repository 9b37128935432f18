# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What to compare with: answers that need no understanding, and SAM told where the objects are.

Unlike models, baselines look at the rows' own masks. `make_baseline("random-object")` makes one by its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...data.schema import decode_masks
from ...segmenters_segcompass import geometry_of, to_sam_image_processor
from ..prediction import Prediction, Predictor
from .sam_prompts import PromptedSam, SamPrompt


class EverythingPredictor:
    """Every pixel of the image."""

    name = "everything"

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        return [Prediction(np.ones((1, *_size(row)), dtype=bool)) for row in rows]


class NothingPredictor:
    """Always no object: right where nothing is meant, and only there."""

    name = "nothing"

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        return [Prediction(np.zeros((0, *_size(row)), dtype=bool)) for row in rows]


class _KnownObjects:
    """Answers out of the objects that rows know: targets and distractors."""

    name: str

    def __init__(self, unknown: Literal["error", "empty"] = "error"):
        if unknown not in ("error", "empty"):
            raise ValueError(f"unknown is {unknown!r}; it must be 'error' or 'empty'.")
        self.unknown, self.num_unknown = unknown, 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"unknown": self.unknown}

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        return [self._answer(row) for row in rows]

    def _answer(self, row: dict[str, Any]) -> Prediction:
        if row.get("distractor_masks") is not None:
            objects = [decode_masks(row[name], _size(row)) for name in ("masks", "distractor_masks")]
            return Prediction(self._choose(np.concatenate(objects), row))
        if self.unknown == "error":
            raise ValueError(
                f"the baseline {self.name!r} needs all objects of an image, and row {row.get('sample_id')!r} knows "
                'its targets only (distractor_masks is None). Predict nothing for such rows with unknown="empty".'
            )
        self.num_unknown += 1
        return Prediction(np.zeros((0, *_size(row)), dtype=bool), text="[other objects unknown]")

    def _choose(self, objects: np.ndarray, row: dict[str, Any]) -> np.ndarray:
        """Masks `(n, height, width)` out of those of all objects, targets first."""
        raise NotImplementedError


class AllObjectsPredictor(_KnownObjects):
    """Targets and distractors together: every known object of the image, whatever is asked.

    Args:
        unknown (`str`, *optional*, defaults to `"error"`): Rows whose `distractor_masks` are `None`, where the other
            objects of the image are not known: `"error"` stops; `"empty"` predicts nothing and counts the row in
            `num_unknown` (of this process; in the records, `text` says it).
    """

    name = "all-objects"

    def _choose(self, objects: np.ndarray, row: dict[str, Any]) -> np.ndarray:
        return objects


class LargestObjectPredictor(_KnownObjects):
    """The largest of the known objects, whatever is asked; none where there is none.

    Args:
        unknown (`str`, *optional*, defaults to `"error"`): As for `AllObjectsPredictor`.
    """

    name = "largest-object"

    def _choose(self, objects: np.ndarray, row: dict[str, Any]) -> np.ndarray:
        if not len(objects):
            return objects
        largest = int(objects.sum((1, 2)).argmax())
        return objects[largest : largest + 1]


class RandomObjectPredictor(_KnownObjects):
    """One object of those known, each with the same chance; none where there is none.

    The draw depends on the seed and the row's `sample_id` (its instruction and masks, where it has none), not on
    batches or order.

    Args:
        seed (`int`, *optional*, defaults to 0): Another seed, another draw.
        unknown (`str`, *optional*, defaults to `"error"`): As for `AllObjectsPredictor`.
    """

    name = "random-object"

    def __init__(self, seed: int = 0, unknown: Literal["error", "empty"] = "error"):
        super().__init__(unknown)
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"seed": self.seed}

    def _choose(self, objects: np.ndarray, row: dict[str, Any]) -> np.ndarray:
        if not len(objects):
            return objects
        key = row.get("sample_id")
        if key is None:
            key = json.dumps([row["instruction"], row["masks"], row["distractor_masks"]], default=repr)
        digest = hashlib.sha256(f"{self.seed}\0{key}".encode()).digest()
        chosen = int(np.random.default_rng(int.from_bytes(digest[:16], "big")).integers(len(objects)))
        return objects[chosen : chosen + 1]


class SamBoxCentrePredictor:
    """SAM shown where each target is: what its masks allow when the objects meant are known.

    Every target's bounding box is taken from its true mask, and SAM is asked for one mask (its single-mask output, not
    the best of three) at the centre of that box, in the box, or both. The centre of a ring's box is not on the ring:
    the point alone is no strict upper bound, the box is closer to one. A target without a pixel gets no mask.

    The SAM must know points and boxes, as the published ones do. One that only ever saw heatmaps, such as that of the
    bundled `scenes-tiny`, answers them with next to nothing: `"ideal-masks"` bounds such a model.

    Args:
        sam (`PreTrainedModel`): transformers' SAM or another segmenter, such as the `sam` of a SegCompass model.
        processor: The model's or the segmenter's; see `to_sam_image_processor`.
        prompt (`str`, *optional*, defaults to `"centre"`): `"centre"`, `"box"` or `"both"`.
    """

    def __init__(self, sam: Any, processor: Any, prompt: Literal["centre", "box", "both"] = "centre"):
        names = {"centre": "sam-box-centre", "box": "sam-box", "both": "sam-box-and-centre"}
        if prompt not in names:
            raise ValueError(f"prompt is {prompt!r}; it must be one of {list(names)}.")
        self.name, self.prompt, self._sam = names[prompt], prompt, PromptedSam(sam, processor)

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt, **self._sam.settings}

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        prompts = []
        for row in rows:
            targets = decode_masks(row["masks"], _size(row))
            prompts.append([self._prompt(mask) for mask in targets if mask.any()])
        return [Prediction(*result) for result in self._sam.segment([row["image"] for row in rows], prompts)]

    def _prompt(self, mask: np.ndarray) -> SamPrompt:
        x1, y1, x2, y2 = box = mask_box(mask)
        centre = ((x1 + x2) / 2, (y1 + y2) / 2)
        return SamPrompt(
            box=None if self.prompt == "centre" else box, points=() if self.prompt == "box" else (centre,)
        )


class IdealMasksPredictor:
    """The targets at the resolution of the model's low-resolution maps: what no heatmap or mask of it can exceed.

    Every target becomes a soft low-resolution map, as in training, and goes the way back to the image's size. The
    number of slots is no limit here.

    Args:
        processor: The model's or the segmenter's; see `to_sam_image_processor`.
    """

    name = "ideal-masks"

    def __init__(self, processor: Any):
        self.geometry = geometry_of(to_sam_image_processor(processor))

    @property
    def settings(self) -> dict[str, Any]:
        stretched = {} if self.geometry.fit == "pad" else {"fit": self.geometry.fit}
        return {"canvas": self.geometry.canvas, "map_size": self.geometry.map_size, **stretched}

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        return [Prediction(self._through_maps(decode_masks(row["masks"], _size(row)))) for row in rows]

    def _through_maps(self, masks: np.ndarray) -> np.ndarray:
        size, restored = masks.shape[1:], np.zeros_like(masks)
        maps = self.geometry.soft_mask_targets(torch.from_numpy(masks)).clamp(0.02, 0.98)
        for index, values in enumerate(maps):  # logits are interpolated, as a model's are
            logits = self.geometry.restore_map(values.logit(), size)
            restored[index] = (logits > 0).numpy()
        return restored


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """`(x1, y1, x2, y2)`: the first and last column and row of a mask `(height, width)` with at least one pixel."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["image"].height, row["image"].width


# Name -> what makes it from SAM, its processor, a seed and what to do where objects are unknown.
BASELINES: dict[str, Callable[[Any, Any, int, Any], Predictor]] = {
    "all-objects": lambda sam, processor, seed, unknown: AllObjectsPredictor(unknown),
    "everything": lambda sam, processor, seed, unknown: EverythingPredictor(),
    "ideal-masks": lambda sam, processor, seed, unknown: IdealMasksPredictor(processor),
    "largest-object": lambda sam, processor, seed, unknown: LargestObjectPredictor(unknown),
    "nothing": lambda sam, processor, seed, unknown: NothingPredictor(),
    "random-object": lambda sam, processor, seed, unknown: RandomObjectPredictor(seed, unknown),
    "sam-box": lambda sam, processor, seed, unknown: SamBoxCentrePredictor(sam, processor, "box"),
    "sam-box-and-centre": lambda sam, processor, seed, unknown: SamBoxCentrePredictor(sam, processor, "both"),
    "sam-box-centre": lambda sam, processor, seed, unknown: SamBoxCentrePredictor(sam, processor),
}
# Those that need a model's SAM and processor.
SAM_BASELINES = frozenset({"ideal-masks", "sam-box", "sam-box-and-centre", "sam-box-centre"})


def make_baseline(
    name: str,
    sam: Any = None,
    processor: Any = None,
    seed: int = 0,
    unknown: Literal["error", "empty"] = "error",
) -> Predictor:
    """A baseline by its name in `BASELINES`.

    Args:
        name (`str`): One of `BASELINES`.
        sam (`PreTrainedModel`, *optional*), processor (*optional*): See `SamBoxCentrePredictor`; `SAM_BASELINES` need
            both.
        seed (`int`, *optional*, defaults to 0): Of `"random-object"`.
        unknown (`str`, *optional*, defaults to `"error"`): Of the baselines that need all objects of an image.

    Raises:
        ValueError: there is no such baseline, or it needs SAM.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; choose one of {', '.join(BASELINES)}.")
    if name in SAM_BASELINES and (sam is None or processor is None):
        raise ValueError(f"the baseline {name!r} needs `sam` and `processor`; pass, for instance, those of a model.")
    return BASELINES[name](sam, processor, seed, unknown)
