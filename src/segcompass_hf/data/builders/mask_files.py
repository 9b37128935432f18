# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks stored as images (PNG), with everything that makes such a file something else than a mask named."""

from __future__ import annotations

import os

import numpy as np
from PIL import ImageOps

from ...image_files_segcompass import open_image
from ..schema import check_mask_pixels
from .build_report import RowProblem

MAX_VALUES = 128  # more objects than any instruction means: such a file is a picture
VOID_VALUES = (255, 65535)  # borders and what is not annotated, as in Pascal VOC and Cityscapes


def read_mask_file(image: str | os.PathLike | bytes) -> np.ndarray:
    """The values of a mask stored as an image, where 0 is background.

    Args:
        image: Path, or the content of a file. Of palettes the indices count; colour images must be grey.

    Returns:
        `np.ndarray` of shape `(height, width)`, integer or bool.

    Raises:
        RowProblem: `"missing_mask"`, `"unreadable_mask"`, or `"bad_annotation"` where it is an image but no mask.
    """
    encoded = isinstance(image, bytes)
    name = f"the mask of {len(image)} bytes" if encoded else f"mask {os.fspath(image)!r}"
    if not encoded and not os.path.isfile(image):
        raise RowProblem("missing_mask", f"there is no file {os.fspath(image)!r}.")
    try:
        with open_image(image, "mask") as opened:
            form = opened.format
            opened = ImageOps.exif_transpose(opened)
            values = np.asarray(opened.convert("RGBA") if opened.mode == "PA" else opened)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise about anything
        raise RowProblem("unreadable_mask", f"{name} cannot be read as an image ({error}).") from error
    if form in ("JPEG", "MPO"):
        raise RowProblem("bad_annotation", f"{name} is a JPEG, which changes values at edges; save masks as PNG.")
    if values.ndim == 3:
        values = _grey(values, name)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise RowProblem("bad_annotation", f"{name} has values of type {values.dtype}; expected integers.")
    if values.min(initial=0) < 0:
        raise RowProblem("bad_annotation", f"{name} has values down to {values.min()}; expected 0 for background.")
    return values


def _grey(values: np.ndarray, name: str) -> np.ndarray:
    """(height, width) of grey values saved with several equal channels."""
    channels = values.shape[-1]
    colours = values[..., : channels - 1] if channels in (2, 4) else values  # the last is alpha
    if channels in (2, 4) and values[..., -1].min() < 255:
        raise RowProblem("bad_annotation", f"{name} is partly transparent; save it without alpha, as one channel.")
    if (colours != colours[..., :1]).any():
        raise RowProblem(
            "bad_annotation",
            f"{name} has colours; save one channel where 0 is background and every other value is one object.",
        )
    return colours[..., 0]


def split_void(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Tell objects from the void: 255 beside other values marks what is neither object nor background.

    Alone or beside the shades of its own smooth edge, 255 is the object; among evenly spaced shades such as 0, 128,
    255 and at the end of a numbering (..., 254, 255) it is one of them.

    Args:
        values (`np.ndarray` of shape `(height, width)`): as `read_mask_file` returns.
        name (`str`): what messages call it.

    Returns:
        `tuple[np.ndarray, np.ndarray | None]`: The values, with 0 for the void, and the void as a bool mask.

    Raises:
        RowProblem: `"bad_annotation"`: there is no background but the void.
    """
    found = [int(value) for value in np.unique(values)]
    objects, top = [value for value in found[:-1] if value], found[-1]
    if top not in VOID_VALUES or not objects or objects[-1] == top - 1 or _are_even([*objects, top]):
        return values, None
    if len(objects) > MAX_VALUES or _are_edges(objects, values):
        return values, None
    if found[0] != 0:
        raise RowProblem(
            "bad_annotation",
            f"{name} has no 0 but {top} beside {_some(objects)}: save the background as 0, and what is neither object "
            f"nor background as {top}.",
        )
    void = values == top
    return np.where(void, 0, values), void


def _are_even(shades: list[int]) -> bool:
    """Whether these are shades from black to white at equal distances."""
    step = shades[-1] / len(shades)
    return all(abs(shade - step * place) <= 1 for place, shade in enumerate(shades, 1))


def objects_of_values(values: np.ndarray, name: str) -> dict[int, np.ndarray]:
    """One mask per value above 0.

    Args:
        values (`np.ndarray` of shape `(height, width)`): as `read_mask_file` returns.
        name (`str`): what messages call it.

    Returns:
        `dict[int, np.ndarray]`: value -> bool mask, in increasing order; empty where all is 0.

    Raises:
        RowProblem: `"bad_annotation"`: the values are shades of a smooth edge, of a picture or of a map of scores.
    """
    found = [int(value) for value in np.unique(values) if value]
    if len(found) > MAX_VALUES:
        raise RowProblem(
            "bad_annotation",
            f"{name} has {len(found)} different values; expected 0 for background and one value per object. Is it a "
            "picture, or was the mask resized with smoothing?",
        )
    numbered = found == list(range(1, len(found) + 1))
    if found and not numbered and found not in ([255], [65535]) and values.all():
        raise RowProblem(
            "bad_annotation",
            f"{name} has the values {_some(found)} and nowhere 0, which is the background: is it a map of scores? "
            "Save 0 and one value per object.",
        )
    try:
        check_mask_pixels(len(found), *values.shape)
    except ValueError as error:
        raise RowProblem("bad_annotation", f"{name}: {error}") from error
    masks = {value: values == value for value in found}
    of_two = len(found) == 2 and not numbered and _is_outline(*masks.values())
    if of_two or (len(found) > 2 and _are_edges(found, values)):
        thin = sum(not _has_inside(mask) for mask in masks.values())
        raise RowProblem(
            "bad_annotation",
            f"{name} has the values {_some(found)}, and {thin} of these {len(found)} are only lines: the mask "
            "seems to have smooth edges. Save it without smoothing, as 0 and one value per object.",
        )
    return masks


def _are_edges(found: list[int], values: np.ndarray) -> bool:
    """Whether most of these values are only lines; smooth edges have shades up to the object's own, no numbers."""
    thin = sum(not _has_inside(values == value) for value in found)
    return 2 * thin > len(found) and found != list(range(1, len(found) + 1))


def _is_outline(mask: np.ndarray, other: np.ndarray) -> bool:
    """Whether a mask is a line along most of another one's outside, and nothing else."""
    height, width = mask.shape
    padded = np.pad(other, 1)
    near = np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
    outside = near & ~other
    return not _has_inside(mask) and not (mask & ~outside).any() and 2 * mask.sum() > outside.sum()


def _has_inside(mask: np.ndarray) -> bool:
    """Whether some pixel has all four neighbours in the mask."""
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return bool(inner.any())


def _some(numbers: list[int], shown: int = 6) -> str:
    return ", ".join(map(str, numbers[:shown])) + (", ..." if len(numbers) > shown else "")
