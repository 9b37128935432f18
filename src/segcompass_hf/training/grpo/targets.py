# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From rows of a data set to what joint training needs of them: prompt, SAM features, mask targets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ...data.schema import decode_masks
from ...image_features_segcompass import ImageFeatures, join_rows
from ...images_segcompass import fit_objects_to_slots, to_rgb_image

IMAGES_AT_A_TIME = 4  # through SAM's encoder


@dataclass
class SegmentationTargets:
    """Targets of a batch of rows. Rows of one group share their tensors, so lists cost one image per prompt.

    Args:
        image_embeddings (`list[torch.Tensor]` of shape `(channels, h, w)`, or of [`ImageFeatures`] of one image).
        mask_labels (`list[torch.Tensor]` of shape `(num_slots, 4h, 4w)`): Soft targets in [0, 1].
        num_objects (`torch.LongTensor` of shape `(batch_size,)`): Objects per row.
        original_sizes, reshaped_input_sizes (`torch.LongTensor` of shape `(batch_size, 2)`): (height, width).
        num_dropped (`list[int]`): Objects beyond the number of slots that were left out, per row.
        image_numbers (`torch.LongTensor` of shape `(batch_size,)`): Equal where rows show the same image.
        image_token_grids (`torch.LongTensor` of shape `(batch_size, 6)`, *optional*): See [`SequenceStates`].
    """

    image_embeddings: list[torch.Tensor | ImageFeatures]
    mask_labels: list[torch.Tensor]
    num_objects: torch.Tensor
    original_sizes: torch.Tensor
    reshaped_input_sizes: torch.Tensor
    num_dropped: list[int]
    image_numbers: torch.Tensor
    image_token_grids: torch.Tensor | None = None

    def columns(self) -> dict[str, Any]:
        """What goes with TRL's own inputs through shuffling and splitting."""
        names = ("image_embeddings", "mask_labels", "num_objects", "reshaped_input_sizes", "image_numbers")
        names += ("image_token_grids",)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def take(self, rows: Sequence[int]) -> SegmentationTargets:
        """Those of some rows, in this order; a row may come several times."""
        taken = {}
        for name, value in vars(self).items():
            if isinstance(value, list):
                taken[name] = [value[row] for row in rows]
            else:
                taken[name] = None if value is None else value[list(rows)]
        return SegmentationTargets(**taken)

    @classmethod
    def joined(cls, parts: Sequence[SegmentationTargets]) -> SegmentationTargets:
        """Rows of several, one after the other; images of different parts count as different."""
        joined = {}
        for name, first in vars(parts[0]).items():
            values = [getattr(part, name) for part in parts]
            if isinstance(first, list):
                joined[name] = [entry for value in values for entry in value]
            else:
                joined[name] = None if first is None else torch.cat(values)
        taken = [0, *torch.tensor([int(part.image_numbers.max()) + 1 for part in parts]).cumsum(0).tolist()]
        joined["image_numbers"] = torch.cat(
            [part.image_numbers + offset for part, offset in zip(parts, taken, strict=False)]
        )
        return cls(**joined)


def check_num_rows(rows: Any, args: Any) -> None:
    """Refuse, with a `ValueError`, too few rows for one generation: TRL leaves them out, and would train no step.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): To train on; of a stream the first ones are counted.
        args ([`SegCompassGRPOConfig`]): Sizes of a generation.
    """
    needed = args.generation_batch_size // args.num_generations
    found = len(rows) if hasattr(rows, "__len__") else sum(1 for _ in islice(rows, needed))
    if found < needed:
        raise ValueError(
            f"train_dataset has {found} rows, but one generation takes {needed} prompts: generation_batch_size="
            f"{args.generation_batch_size} completions (per_device_train_batch_size x processes x "
            f"steps_per_generation) / num_generations={args.num_generations}. Give more rows, or lower the batch "
            "size, gradient_accumulation_steps or steps_per_generation."
        )


def prompt_of(row: dict[str, Any], processor: Any) -> list[dict[str, str]]:
    """The conversation TRL starts from: the row's own `prompt`, or the template with its `instruction`."""
    if row.get("prompt") is not None:
        return row["prompt"]
    if row.get("instruction") is None:
        raise ValueError(f"a row has neither `instruction` nor `prompt`; its columns are {sorted(row)}.")
    _, text = processor.build_messages(row["instruction"])[0]["content"]
    return [{"role": "user", "content": text["text"]}]


@torch.no_grad()
def segmentation_targets(
    rows: Sequence[dict[str, Any]], processor: Any, model: Any, device: torch.device, overflow: str = "drop"
) -> SegmentationTargets:
    """Encode images and masks of rows in the row schema; equal rows (the completions of a group) only once.

    Args:
        rows (`Sequence[dict]`): With `image` and `masks` (RLE).
        processor ([`SegCompassProcessor`]): Canvas and map size; a `caching_processor` gives embeddings of its cache.
        model (`SegCompassForReasoningSegmentation`): Its SAM encodes the images.
        device (`torch.device`): Where the tensors go.
        overflow (`str`): `"drop"`, `"merge"` or `"error"`, see `fit_objects_to_slots`.

    Returns:
        [`SegmentationTargets`], one entry per row.

    Raises:
        ValueError: a mask does not fit its image, or there are too many and `overflow` is `"error"`.
    """
    for row in rows:
        missing = [name for name in ("image", "masks") if name not in row]
        if missing:
            raise ValueError(
                f"{_name(row)} has no {' and no '.join(missing)}; its columns are {sorted(row)}. Rows are in the row "
                "schema: bring your data into it with a builder of segcompass_hf.data."
            )
    images = [to_rgb_image(row["image"], f"image of {_name(row)}") for row in rows]
    keys = [_key(row, image) for row, image in zip(rows, images, strict=True)]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}  # key -> first row that has it
    unique = sorted(first.values())
    place = {keys[index]: number for number, index in enumerate(unique)}

    sam = processor._sam_inputs([images[index] for index in unique])
    if "image_embeddings" in sam:
        embeddings = sam["image_embeddings"].to(device)
    else:
        pixels = sam["sam_pixel_values"].to(device).split(IMAGES_AT_A_TIME)
        embeddings = join_rows([model.encode_image(some) for some in pixels], torch.cat)
    labels, counts, dropped = [], [], []
    for index in unique:
        size = (images[index].height, images[index].width)
        objects = torch.from_numpy(decode_masks(rows[index]["masks"], size))
        kept = fit_objects_to_slots(objects, processor.num_slots, overflow, _name(rows[index]))
        target = torch.zeros(processor.num_slots, processor.mask_size, processor.mask_size)
        target[: len(kept)] = processor.geometry.soft_mask_targets(kept)
        labels.append(target.to(device))
        counts.append(len(kept))
        dropped.append(len(objects) - len(kept) if overflow == "drop" else 0)
    order = [place[key] for key in keys]
    return SegmentationTargets(
        image_embeddings=[embeddings[number] for number in order],
        mask_labels=[labels[number] for number in order],
        num_objects=torch.tensor([counts[number] for number in order], device=device),
        original_sizes=sam["original_sizes"][order].to(device),
        reshaped_input_sizes=sam["reshaped_input_sizes"][order].to(device),
        num_dropped=[dropped[number] for number in order],
        image_numbers=torch.tensor(order, device=device),
        image_token_grids=sam["image_token_grids"][order].to(device) if "image_token_grids" in sam else None,
    )


def _name(row: dict[str, Any]) -> str:
    return f"sample {row.get('sample_id', '(without sample_id)')}"


def _key(row: dict[str, Any], image: Any) -> str:
    digest = hashlib.sha256(image.tobytes())
    digest.update(repr((image.size, row["masks"])).encode())
    return digest.hexdigest()
