# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""COCO segmentations (polygons, RLE in either form) -> the RLE of the row schema, with every oddity named."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..schema import _pycocotools, run_lengths
from .build_report import RowProblem
from .values import as_whole

MARGIN, MARGIN_SHARE = 5, 0.1  # pixels, and part of the side: how far outside of the image drawn corners may lie


def polygons_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """One object's segmentation as one mask: the union of its polygons, as the benchmarks' own code draws it.

    Args:
        segmentation (`list` or `dict`): Polygons in pixels, see `flat_polygons`, or an RLE `{"size": [height, width],
            "counts": ...}` whose counts are a list of run lengths, `str` or `bytes`. Polygons of one or two points
            enclose nothing and are passed over where there are others.
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
    check_no_grid(polygons, height, width)
    polygons = flat_polygons(polygons)
    checked = [checked_polygon(polygon, index, height, width) for index, polygon in enumerate(polygons)]
    check_pixels(np.concatenate(checked) if checked else np.zeros(0), height, width)
    # Four numbers would be read as a box by pycocotools.
    enclosing = [polygon.tolist() for polygon in checked if polygon.size >= 6]
    if not enclosing:
        raise RowProblem("empty_mask", f"there is no polygon of three or more points among {len(polygons)}.")
    coco_mask = _pycocotools()
    return coco_mask.merge(coco_mask.frPyObjects(enclosing, height, width))


def flat_polygons(polygons: list | tuple) -> list[Any]:
    """An object's polygons, each as `[x0, y0, x1, y1, ...]`.

    Args:
        polygons (`list`): Such lists, or each as points `[[x0, y0], [x1, y1], ...]`, or one polygon of either form.
    """
    if polygons and not isinstance(polygons[0], (list, tuple)):
        return [polygons]
    if len(polygons) > 1 and _are_points(polygons):
        return [_flat(polygons)]
    return [_flat(polygon) if _are_points(polygon) else polygon for polygon in polygons]


def _are_points(entries: Any) -> bool:
    """Whether these are pairs, of whatever."""
    pairs = isinstance(entries, (list, tuple)) and all(isinstance(entry, (list, tuple)) for entry in entries)
    return bool(pairs and entries) and all(len(entry) == 2 and not isinstance(entry[0], list) for entry in entries)


def _flat(points: list) -> list:
    return [number for point in points for number in point]


def check_no_grid(rows: list | tuple, height: int, width: int) -> None:
    """Refuse a mask that is written out row by row, whose numbers would pass for coordinates.

    Raises:
        RowProblem: `"bad_annotation"`.
    """
    lengths = {len(row) if isinstance(row, (list, tuple)) else None for row in rows}
    if len(rows) == height > 1 and lengths == {width} and np.ndim(rows[0][:1]) == 1:
        raise RowProblem(
            "bad_annotation",
            f"{height} rows of {width} numbers are a mask written out; expected polygons in pixels, or a COCO RLE "
            '{"size": [height, width], "counts": ...} for each object.',
        )


def check_pixels(coordinates: np.ndarray, height: int, width: int) -> None:
    """Refuse an object of which all coordinates lie between 0 and 1, or little beyond: those are shares of the sides.

    Raises:
        RowProblem: `"bad_annotation"`.
    """
    if not coordinates.size or min(height, width) <= 2:
        return
    if -MARGIN_SHARE <= coordinates.min() and coordinates.max() <= 1 + MARGIN_SHARE:
        raise RowProblem(
            "bad_annotation",
            f"all coordinates lie between 0 and 1 or close to it: multiply x by the width {width} and y by the height "
            f"{height}.",
        )


def checked_polygon(polygon: Any, index: int, height: int, width: int) -> np.ndarray:
    """A polygon that is one of this image, as far as its numbers tell.

    Args:
        polygon: `[x0, y0, x1, y1, ...]` in pixels.
        index (`int`): What messages call it.
        height (`int`), width (`int`): of the image, in pixels.

    Returns:
        `np.ndarray` of shape `(2 * num_points,)`, float.

    Raises:
        RowProblem: `"bad_annotation"`: these are no pairs of finite numbers, or lie far outside of the image.
            `"empty_mask"`: all of it does.
    """
    try:
        values = np.asarray(polygon if isinstance(polygon, (list, tuple)) else None)
    except ValueError:
        values = np.asarray(None)  # lists of different lengths inside
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise RowProblem("bad_annotation", f"polygon {index} is no list of finite numbers: {polygon!r:.60}.")
    if values.size % 2:
        raise RowProblem("bad_annotation", f"polygon {index} has {values.size} numbers; x and y come in pairs.")
    # Points a little outside are cut off at the border. Further away the annotation is of another size or image.
    for places, side, name in ((values[::2], width, "x"), (values[1::2], height, "y")):
        if not places.size:
            continue
        low, high, margin = places.min(), places.max(), max(MARGIN, MARGIN_SHARE * side)
        extent = f"polygon {index} has {name} from {low:g} to {high:g}"
        near = -side <= low and high <= 2 * side
        if near and (high < -margin or low > side + margin):
            raise RowProblem("empty_mask", f"{extent}: no pixel inside the image of {height} x {width}.")
        if not (-margin <= low and high <= side + margin):
            raise RowProblem(
                "bad_annotation",
                f"{extent} but the image is {height} x {width} (height x width): is it of another image, of the "
                "image in another size, or in other units than pixels?",
            )
    return values.astype(float)


def _checked_rle(rle: dict, height: int, width: int) -> dict[str, Any]:
    try:
        size, counts = [as_whole(side) for side in rle["size"]], rle["counts"]
    except (KeyError, TypeError):
        size, counts = [None], None
    if None in size:
        raise RowProblem("bad_annotation", f'an RLE has "size" (two integers) and "counts"; got {rle!r:.80}.')
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
    elif isinstance(counts, (list, tuple)) and None not in (wholes := [as_whole(run) for run in counts]):
        compressed, runs = None, wholes
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
