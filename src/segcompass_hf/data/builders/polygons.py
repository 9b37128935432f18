# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""COCO segmentations (polygons, RLE in either form) -> the RLE of the row schema, with every oddity named."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..schema import _pycocotools, run_lengths
from .build_report import RowProblem


def polygons_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """One object's segmentation as one mask: the union of its polygons, as the benchmarks' own code draws it.

    Args:
        segmentation (`list[list[float]]` or `dict`): Polygons as `[x0, y0, x1, y1, ...]` in pixels, or an RLE
            `{"size": [height, width], "counts": ...}` whose counts are a list of run lengths, `str` or `bytes`.
            Polygons of one or two points enclose nothing and are passed over where there are others.
        height (`int`), width (`int`): of the image, in pixels.

    Returns:
        `dict`: COCO RLE `{"size": [height, width], "counts": str}` with at least one pixel.

    Raises:
        RowProblem: A `ValueError` with `kind`: `"bad_annotation"`, `"wrong_size"`, or `"empty_mask"` where there is no
            polygon or no pixel.
    """
    if isinstance(segmentation, dict):
        rle = _checked_rle(segmentation, height, width)
    elif isinstance(segmentation, (list, tuple)):
        rle = _drawn(segmentation, height, width)
    else:
        raise RowProblem(
            "bad_annotation",
            f"the segmentation is {segmentation!r:.60}; expected polygons [[x0, y0, x1, y1, ...], ...] or an RLE "
            '{"size": [height, width], "counts": ...}.',
        )
    if _pycocotools().area(rle) == 0:
        raise RowProblem("empty_mask", f"the mask has no pixel inside the image of {height} x {width}.")
    return {"size": [int(height), int(width)], "counts": rle["counts"].decode("ascii")}


def _drawn(polygons: list, height: int, width: int) -> dict[str, Any]:
    if polygons and not isinstance(polygons[0], (list, tuple)):
        polygons = [polygons]  # one polygon without the outer list
    checked = [_checked_polygon(polygon, index, height, width) for index, polygon in enumerate(polygons)]
    # Four numbers would be read as a box by pycocotools.
    enclosing = [polygon.tolist() for polygon in checked if polygon.size >= 6]
    if not enclosing:
        raise RowProblem("empty_mask", f"there is no polygon of three or more points among {len(polygons)}.")
    coco_mask = _pycocotools()
    return coco_mask.merge(coco_mask.frPyObjects(enclosing, height, width))


def _checked_polygon(polygon: Any, index: int, height: int, width: int) -> np.ndarray:
    try:
        values = np.asarray(polygon if isinstance(polygon, (list, tuple)) else None)
    except ValueError:
        values = np.asarray(None)  # lists of different lengths inside
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise RowProblem("bad_annotation", f"polygon {index} is no list of finite numbers: {polygon!r:.60}.")
    if values.size % 2:
        raise RowProblem("bad_annotation", f"polygon {index} has {values.size} numbers; x and y come in pairs.")
    # Points a little outside are cut off at the border. Far away ones make pycocotools allocate their whole outline.
    for places, side, name in ((values[::2], width, "x"), (values[1::2], height, "y")):
        if places.size and not (-side <= places.min() and places.max() <= 2 * side):
            raise RowProblem(
                "bad_annotation",
                f"polygon {index} has {name} from {places.min():g} to {places.max():g} but the image is {height} x "
                f"{width} (height x width): is it of another image, or in other units than pixels?",
            )
    return values.astype(float)


def _checked_rle(rle: dict, height: int, width: int) -> dict[str, Any]:
    try:
        size, counts = [int(side) for side in rle["size"]], rle["counts"]
    except (KeyError, TypeError, ValueError) as error:
        raise RowProblem(
            "bad_annotation", f'an RLE has "size" (two integers) and "counts"; got {rle!r:.80}.'
        ) from error
    if size != [height, width]:
        hint = " It looks transposed." if size == [width, height] else ""
        raise RowProblem(
            "wrong_size", f"the RLE is {size} but its image is [{height}, {width}] (height, width).{hint}"
        )
    if isinstance(counts, (str, bytes)):
        compressed = _ascii(counts)
        try:
            runs = run_lengths(compressed).tolist()
        except ValueError as error:
            raise RowProblem("bad_annotation", str(error)) from error
    elif isinstance(counts, (list, tuple)) and all(type(run) is int for run in counts):
        compressed, runs = None, list(counts)
    else:
        raise RowProblem("bad_annotation", f"RLE counts are {counts!r:.60}; expected run lengths or a string.")
    # pycocotools does not check this and would leave memory as it is behind the last run.
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise RowProblem(
            "wrong_size" if min(runs, default=0) >= 0 else "bad_annotation",
            f"the runs of the RLE cover {sum(runs)} pixels, the shortest {min(runs, default=0)}; expected "
            f"{height} x {width} = {height * width} pixels in runs of 0 or more.",
        )
    if compressed is not None:
        return {"size": size, "counts": compressed}
    return _pycocotools().frPyObjects({"size": size, "counts": runs}, height, width)


def _ascii(counts: str | bytes) -> bytes:
    try:
        return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    except UnicodeEncodeError as error:
        raise RowProblem("bad_annotation", "RLE counts hold characters other than ASCII.") from error
