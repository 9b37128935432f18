"""The one row format of every segcompass_hf data set, and its masks as COCO run-length encodings."""

from __future__ import annotations

from typing import Any

import numpy as np


def _pycocotools():
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "masks are COCO run-length encodings, which needs pycocotools: pip install 'segcompass_hf[data]'."
        ) from error
    return coco_mask


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode one binary mask.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): boolean, or 0 / non-zero.

    Returns:
        `dict`: COCO RLE `{"size": [height, width], "counts": str}`.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask has two dimensions (height, width); got shape {mask.shape}.")
    rle = _pycocotools().encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode one COCO RLE to a boolean array of shape `(height, width)`."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(
            f"a mask is a COCO RLE with the keys 'size' and 'counts'; got {type(rle).__name__}: {rle!r:.80}."
        )
    counts = rle["counts"].encode("ascii") if isinstance(rle["counts"], str) else rle["counts"]
    return _pycocotools().decode({"size": list(rle["size"]), "counts": counts}).astype(bool)


def decode_masks(rles: list[dict[str, Any]] | None, size: tuple[int, int]) -> np.ndarray:
    """Decode a list of RLEs.

    Args:
        rles (`list[dict]`, *optional*): COCO RLEs, all of `size`; `None` and the empty list mean no object.
        size (`tuple[int, int]`): (height, width) of the image in pixels.

    Returns:
        `np.ndarray` of shape `(num_objects, height, width)`, bool.
    """
    masks = np.zeros((len(rles or []), *size), dtype=bool)
    for index, rle in enumerate(rles or []):
        if tuple(rle["size"]) != tuple(size):
            raise ValueError(f"mask {index} is {tuple(rle['size'])} but its image is {tuple(size)} (height, width).")
        masks[index] = decode_mask(rle)
    return masks


def row_features():
    """`datasets.Features` of a row; every builder returns exactly these columns."""
    from datasets import Features, Image, List, Value

    rle = {"size": List(Value("int32")), "counts": Value("string")}
    return Features(
        {
            "image": Image(),
            "instruction": Value("string"),
            "masks": List(rle),  # one per object meant; empty = no target
            "distractor_masks": List(rle),  # other known objects; null where they are not known
            "ignore": rle,  # left out of metrics
            "instance_ids": List(Value("int64")),
            "sample_id": Value("string"),
            "image_id": Value("string"),
            "source": Value("string"),
            "split": Value("string"),
            "kind": Value("string"),
            "is_reasoning": Value("bool"),
            "reasoning": Value("string"),
        }
    )
