"""The one row format of every segcompass_hf data set, and its masks as COCO run-length encodings."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..image_files_segcompass import PIXELS_SETTING, max_image_pixels

MASKS_IN_MEMORY = 20  # of the largest size; smaller ones as many more


def _pycocotools() -> Any:
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "masks are COCO run-length encodings, which needs pycocotools: pip install pycocotools."
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


def merge_masks(rles: list[dict[str, Any]]) -> dict[str, Any]:
    """The union of COCO RLEs of one size, as such an RLE; none of them is decoded."""
    rle = _pycocotools().merge(rles)
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def run_lengths(counts: bytes) -> np.ndarray:
    """The runs of COCO's compressed counts: 5 bits per character, from the fourth run on differences to the one before
    the last.

    Args:
        counts (`bytes`): ASCII.

    Returns:
        `np.ndarray` of shape `(num_runs,)`: int64, background first. Damaged counts may have negative ones.

    Raises:
        ValueError: A character that is none of COCO's, or the end in the middle of a number.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    odd = np.flatnonzero((digits < 0) | (digits >= 64))
    if odd.size:
        raise ValueError(f"RLE counts hold {chr(counts[odd[0]])!r}, which no COCO RLE does.")
    if not digits.size:
        return digits
    ends = np.flatnonzero(digits < 32)
    if not ends.size or ends[-1] != len(digits) - 1:
        raise ValueError("RLE counts end in the middle of a number: is the string cut short?")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits
        raise ValueError("RLE counts hold a number of more than 35 bits, which no image has pixels for.")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def rle_runs(rle: dict[str, Any]) -> tuple[tuple[int, int], np.ndarray]:
    """Size and runs of a COCO RLE in either form, which agree with each other.

    Args:
        rle (`dict`): `size`, [height, width] in pixels, and `counts`: a text or `bytes` (compressed), or the run
            lengths as a list or an array (uncompressed).

    Returns:
        `tuple`: (height, width), and the lengths of the runs, background first, as `np.ndarray` of shape
        `(num_runs,)`, int64.

    Raises:
        ValueError: It is none, its runs do not cover the image, or it has more pixels than an image may have.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(
            f"a mask is a COCO RLE with the keys 'size' and 'counts'; got {type(rle).__name__}: {rle!r:.80}."
        )
    size, counts = _whole_numbers(rle["size"]), rle["counts"]
    if size is None or size.shape != (2,) or (size < 0).any():
        raise ValueError(f"the size of an RLE is {rle['size']!r:.60}; expected [height, width] in whole pixels.")
    if isinstance(counts, str):
        if not counts.isascii():
            raise ValueError(f"RLE counts hold {next(c for c in counts if not c.isascii())!a}, which is not ASCII.")
        counts = counts.encode()
    runs = run_lengths(counts) if isinstance(counts, bytes) else _whole_numbers(counts)
    if runs is None:
        raise ValueError(f"RLE counts are {rle['counts']!r:.60}; expected a text or a list of whole numbers.")
    height, width = size.tolist()
    check_mask_pixels(1, height, width)
    # Numbers beyond the image are looked at one by one, for their sum may overflow.
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(
            f"the runs of the mask cover {sum(runs.tolist())} pixels, the shortest {runs.min(initial=0)}; expected "
            f"{height} x {width} = {height * width} pixels in runs of 0 or more."
        )
    return (height, width), runs


def _whole_numbers(values: Any) -> np.ndarray | None:
    """A list of whole numbers, also such as 3.0, as int64 `(n,)`; `None` where it is none."""
    try:
        found = np.asarray(values) if len(values) else np.zeros(0, dtype=np.int64)
    except (TypeError, ValueError):
        return None
    if found.ndim != 1 or found.dtype.kind not in "iuf" or (found != np.rint(found)).any():
        return None
    return found.astype(np.int64) if (np.abs(found) < 2**62).all() else None


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode one COCO RLE, compressed or not (see [`rle_runs`]), to a boolean array of shape `(height, width)`.

    Raises:
        ValueError: It is none, or its runs do not cover the image.
    """
    return _painted(*rle_runs(rle))


def _painted(size: tuple[int, int], runs: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T  # COCO goes down the columns


def compressed(rle: dict[str, Any]) -> dict[str, Any]:
    """A COCO RLE in either form as the row schema stores it, with its counts as text.

    Raises:
        ValueError: An uncompressed one whose runs do not cover the image.
    """
    is_stored = isinstance(rle, dict) and isinstance(rle.get("counts"), str)
    return rle if is_stored else encode_mask(decode_mask(rle))


def decode_masks(rles: list[dict[str, Any]] | None, size: tuple[int, int]) -> np.ndarray:
    """Decode a list of RLEs.

    Args:
        rles (`list[dict]`, *optional*): COCO RLEs, all of `size`; `None` and the empty list mean no object.
        size (`tuple[int, int]`): (height, width) of the image in pixels.

    Returns:
        `np.ndarray` of shape `(num_objects, height, width)`, bool.

    Raises:
        ValueError: One is none, or of another size; says which. Or together they have more pixels than 20 images of
            the largest size.
    """
    check_mask_pixels(len(rles or []), *size)
    masks = np.zeros((len(rles or []), *size), dtype=bool)
    for index, rle in enumerate(rles or []):
        try:
            own_size, runs = rle_runs(rle)
        except ValueError as error:
            raise ValueError(f"mask {index}: {error}") from error
        if own_size != tuple(size):
            raise ValueError(f"mask {index} is {own_size} but its image is {tuple(size)} (height, width).")
        masks[index] = _painted(own_size, runs)
    return masks


def check_mask_pixels(count: int, height: int, width: int) -> None:
    """Refuse more masks than fit in memory, before any is taken: a few bytes may stand for any number of pixels.

    Raises:
        ValueError: One has more pixels than an image may have, or all together 20 times as many.
    """
    most = max_image_pixels()
    if height * width > most or count * height * width > MASKS_IN_MEMORY * most:
        raise ValueError(
            f"{count} masks of {height} x {width} pixels are more than is decoded: {most} pixels each and "
            f"{MASKS_IN_MEMORY} times as many together; {PIXELS_SETTING} in the environment raises both."
        )


def row_features() -> Any:
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
