# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Pixels in, masks out: any image becomes RGB, object masks soft targets, and maps return to the image's size."""

import base64
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .image_files_segcompass import FORMATS, check_size, fetch_image, read_image

LONGEST_NAME = 255  # characters of a file's name; what is longer and holds no separator is no path
_FILE_STARTS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # of the formats of the web
_FILE_ALPHABET = bytes.maketrans(b"-_", b"+/")  # from that of base64 for URLs


def to_rgb_image(image: Any, name: str = "image") -> Image.Image:
    """Read or convert one image to 8-bit RGB, upright.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `os.PathLike`, `bytes` or `dict`):
            Array layouts `(H, W)`, `(H, W, C)` and `(C, H, W)` with C in 1, 3, 4; values 0..255, 0..65535 (16 bit) or
            floats in [0, 1], each clipped where resizing has overshot. A `dict` is a `datasets` image, with `bytes` or
            `path`. Addresses starting with `http` are fetched; base64, also as a `data:` URL, is decoded.
        name (`str`, *optional*, defaults to `"image"`):
            What error messages call it.

    Returns:
        `PIL.Image.Image`: mode RGB, EXIF orientation applied, transparency laid over white.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file or the array is no image, an address gives none within 30 seconds, or the image has more
            pixels than `max_image_pixels()`.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str):
        image = _decode_text(image, name)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        image = fetch_image(image, name)
    if isinstance(image, (str, os.PathLike, bytes)):
        image = read_image(image, name)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = _from_array(image, name)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"{name} is a {type(image).__name__}; expected a PIL image, an array or tensor of shape (height, width), "
            "(height, width, channels) or (channels, height, width), a path, or the bytes of an image file."
        )
    if image.format not in (None, "MPO", *FORMATS):  # opened, and perhaps not yet decoded, by somebody else
        raise ValueError(
            f"{name} is an open {image.format} file; files of {', '.join(FORMATS)} are read. Pass "
            'image.convert("RGB") if you trust it.'
        )
    check_size(image, name)
    return _to_rgb(_upright(image, name), name)


def _decode_text(text: str, name: str) -> str | bytes:
    """The bytes of an image that is written as base64, alone or in a `data:` URL; a path or an address as it is."""
    head, comma, encoded = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if head and not (comma and head.lower().endswith(";base64")):
        raise ValueError(f"{name} is a data URL without base64; expected data:image/png;base64,...")
    try:
        plain = encoded.encode("ascii").translate(_FILE_ALPHABET, b" \t\r\n")
        data = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:  # no base64
        data = b""
    if head or ((data.startswith(_FILE_STARTS) or data[4:8] == b"ftyp") and not os.path.isfile(text)):
        return data
    if max(map(len, text.replace(os.sep, "/").split("/"))) > LONGEST_NAME and not text.startswith("http"):
        raise ValueError(
            f"{name} is a text of {len(text)} characters that starts with {text[:20]!r}; expected a path, an address "
            "or the base64 of an image file."
        )
    return text


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # of a lazily read or damaged file: about anything
        raise ValueError(f"{name} cannot be read ({error}); is the file damaged?") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """PIL's own conversion clips 16-bit and float images to white and drops transparency: both are handled here."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values, clear = np.asarray(image), image.info.get("transparency")
        grey = _to_uint8(values, name)
        if isinstance(clear, int):
            grey = np.where(values == clear, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)  # each library's habit decides where both readings are possible
    if channels_first:
        array = array.detach().cpu()
        has_small_floats = array.is_floating_point() and array.element_size() < 4  # numpy lacks most of them
        array = (array.float() if has_small_floats else array).numpy()
    shape, channels = array.shape, (1, 3, 4)
    if array.ndim == 3:
        first, last = shape[0] in channels, shape[-1] in channels
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
        elif not last:
            array = array[None]  # no channel axis at all: the check below refuses it
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"{name} is an array of shape {tuple(shape)}; expected (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels and at least one pixel. Pass several images as a list."
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name} is an array of dtype {array.dtype}; expected integers, floats or bools.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} is an array holding NaN or infinity; expected finite values.")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(_to_uint8(array, name))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """The range is the smallest of [0, 1] (floats and bools), 0..255 and 0..65535 whose double holds all values.

    What resizing overshoots is cut off, and twice a range holds it: a picture of the next range so dark is none.
    """
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    lowest, highest = float(array.min()), float(array.max())
    is_float = array.dtype.kind == "f"
    ranges = (1, 255, 65535)[0 if array.dtype.kind in "bf" else 1 :]
    top = next((top for top in ranges if highest <= 2 * top), None)
    # Floats around 0 are normalised, and of any scale: undershooting stays small beside the brightest value.
    if top is None or lowest < -(max(highest, 1) if is_float else top) / 2:
        raise ValueError(
            f"{name} is an array of values from {lowest:g} to {highest:g}; expected 0 to 1 (floats), 0 to 255 or 0 to "
            "65535. Undo a normalisation first."
        )
    return np.clip(np.rint(array * (255 / top)), 0, 255).astype(np.uint8)


def resized_size(size: tuple[int, int], canvas: int, fit: Literal["pad", "stretch"] = "pad") -> tuple[int, int]:
    """(height, width) of an image of `size` on a segmenter's canvas.

    With `"pad"` the longest side becomes `canvas`, by SAM's rounding rule and never below one pixel; with `"stretch"`
    both do.
    """
    if fit == "stretch":
        return canvas, canvas
    scale = canvas / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def check_masks(masks: Any, size: tuple[int, int], name: str) -> torch.Tensor:
    """Object masks of one image as a bool tensor.

    Args:
        masks (array-like of shape `(n, H, W)` or `(H, W)`, or `None` or an empty list for no object):
            Bool, or 0 outside the object (floats: at most 0.5).
        size (`tuple[int, int]`): (height, width) the masks must have.
        name (`str`): what error messages call them.

    Returns:
        `torch.Tensor` of shape `(n, H, W)`, bool.

    Raises:
        `ValueError`: a mask does not have the image's size.
    """
    if masks is None or len(masks) == 0:
        return torch.zeros(0, *size, dtype=torch.bool)
    if isinstance(masks, (list, tuple)):
        shapes = {np.shape(mask) for mask in masks}
        if len(shapes) > 1:
            raise ValueError(f"{name}: the masks have shapes {sorted(shapes)}; each must be {size} (height, width).")
        masks = np.stack([np.asarray(mask) for mask in masks])
    masks = np.asarray(masks)
    if masks.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} are no arrays of numbers; expected (n, {size[0]}, {size[1]}). Decode COCO RLE first, for example "
            "with segcompass_hf.data.schema.decode_masks(row['masks'], (height, width))."
        )
    if masks.dtype.kind == "i" and masks.min() < 0:
        raise ValueError(f"{name} hold values below 0, down to {masks.min()}; expected 0 outside the object.")
    masks = torch.as_tensor(masks)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or tuple(masks.shape[-2:]) != tuple(size):
        hint = ""
        if size[0] != size[1] and tuple(masks.shape[-2:]) == tuple(size)[::-1]:
            hint = " They look transposed: masks are (height, width), and belong to the image after its EXIF rotation."
        raise ValueError(
            f"{name}: the masks have shape {tuple(masks.shape)}; expected (n, {size[0]}, {size[1]}): one (height, "
            f"width) mask per object, of the image's own size.{hint}"
        )
    return masks > 0.5 if masks.is_floating_point() else masks != 0


def fit_objects_to_slots(
    masks: torch.Tensor, num_slots: int, overflow: Literal["error", "merge", "drop"], name: str
) -> torch.Tensor:
    """At most `num_slots` object masks.

    Args:
        masks (`torch.Tensor` of shape `(n, H, W)`): bool.
        num_slots (`int`): how many slots the model has.
        overflow (`"error"`, `"merge"` or `"drop"`):
            With more objects than slots: raise; keep the `num_slots - 1` largest and unite the rest in one more mask
            (the union of all objects stays the same); or keep the `num_slots` largest.
        name (`str`): what error messages call the sample.

    Returns:
        `torch.Tensor` of shape `(min(n, num_slots), H, W)`: in the order given, united objects last.
    """
    if overflow not in ("error", "merge", "drop"):
        raise ValueError(f'overflow={overflow!r} is not known; expected "error", "merge" or "drop".')
    count = masks.shape[0]
    if count <= num_slots:
        return masks
    if overflow == "error":
        raise ValueError(
            f'{name} has {count} target objects but the model has {num_slots} slots; pass overflow="merge" (unite the '
            'smallest objects), overflow="drop" (leave them out), or use a model with more slots.'
        )
    order = masks.flatten(1).sum(1).argsort(descending=True, stable=True)
    kept = order[: num_slots - 1 if overflow == "merge" else num_slots].sort().values
    if overflow == "drop":
        return masks[kept]
    rest = torch.ones(count, dtype=torch.bool)
    rest[kept] = False
    return torch.cat([masks[kept], masks[rest].any(0, keepdim=True)])


def soft_mask_targets(
    masks: torch.Tensor, canvas: int, map_size: int, fit: Literal["pad", "stretch"] = "pad"
) -> torch.Tensor:
    """Soft low-resolution targets: the share of each map cell that the object covers, on the canvas.

    The longest side is resized to the canvas (bilinear, antialiased), the rest padded at the bottom and right, and the
    canvas resized to the map (bilinear): the steps of the original's target preparation. With `"stretch"` both sides
    are resized and nothing is padded.

    Args:
        masks (`torch.Tensor` of shape `(n, H, W)`): bool.
        canvas (`int`): side of the segmenter's input, in pixels.
        map_size (`int`): side of the low-resolution maps, in cells.
        fit (`str`): see `resized_size`.

    Returns:
        `torch.Tensor` of shape `(n, map_size, map_size)`: float32 in [0, 1].
    """
    height, width = resized_size(tuple(masks.shape[-2:]), canvas, fit)
    targets = torch.zeros(masks.shape[0], map_size, map_size)
    for index, mask in enumerate(masks):  # one at a time: a photograph's worth of float canvases is large
        resized = F.interpolate(mask[None, None].float(), (height, width), mode="bilinear", antialias=True)
        padded = F.pad(resized, (0, canvas - width, 0, canvas - height))  # (1, 1, canvas, canvas)
        targets[index] = F.interpolate(padded, (map_size, map_size), mode="bilinear")[0, 0].clamp(0, 1)
    return targets


def restore_map(
    low_resolution: torch.Tensor, canvas: int, reshaped_size: Sequence[int], original_size: Sequence[int]
) -> torch.Tensor:
    """One map back at its image's size: enlarged to the canvas, cropped of the padding, resized (bilinear).

    Args:
        low_resolution (`torch.Tensor` of shape `(h, w)`): logits on the canvas.
        canvas (`int`): side of the segmenter's input, in pixels.
        reshaped_size (`Sequence[int]`): (height, width) of the image on the canvas.
        original_size (`Sequence[int]`): (height, width) of the image.

    Returns:
        `torch.Tensor` of shape `(height, width)`: float32 logits.
    """
    enlarged = F.interpolate(low_resolution[None, None].float(), (canvas, canvas), mode="bilinear")
    cropped = enlarged[..., : reshaped_size[0], : reshaped_size[1]]
    return F.interpolate(cropped, tuple(original_size), mode="bilinear")[0, 0]
