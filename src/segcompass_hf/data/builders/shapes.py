# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Shapes as LabelMe stores them, read and drawn."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .build_report import RowProblem
from .mask_files import read_mask_file
from .polygons import check_pixels, checked_polygon
from .values import parse_json


def read_shapes(path: Path) -> dict[str, Any]:
    """A json with a list `shapes`, in UTF-8 or, as some of ReasonSeg's files, cp1252.

    Raises:
        RowProblem: `"bad_json"`, or `"bad_annotation"` where it is not of this form.
    """
    data = path.read_bytes()
    try:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        content = parse_json(text)
    except ValueError as error:
        raise RowProblem("bad_json", f"{path.name} is no complete json in UTF-8 or cp1252 ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise RowProblem("bad_annotation", f'{path.name} is no object with a list "shapes".')
    return content


def shape_points(points: Any, index: int, size: tuple[int, int]) -> np.ndarray:
    """The points of a shape, as far as they may be of this image.

    Args:
        points: As they stand in the file.
        index (`int`): What messages call the shape.
        size (`tuple[int, int]`): (height, width) of the image in pixels.

    Returns:
        `np.ndarray` of shape `(num_points, 2)`, float: (x, y) in pixels.

    Raises:
        RowProblem: `"bad_annotation"`, or `"empty_mask"` where all of it lies outside of the image.
    """
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        detail = f"shape {index} has points {points!r:.60}; expected [[x, y], ...] in pixels."
        raise RowProblem("bad_annotation", detail)
    values = checked_polygon([number for point in points for number in point], index, *size)
    check_pixels(values, *size)
    return values.reshape(-1, 2)


def draw_shape(shape: dict[str, Any], points: np.ndarray, index: int, size: tuple[int, int]) -> np.ndarray | None:
    """Draw a shape as LabelMe does; polygons and rectangles as ReasonSeg's own code does.

    Args:
        shape (`dict`): `shape_type`, by default a polygon, and `mask` where that is a mask.
        points (`np.ndarray` of shape `(num_points, 2)`): (x, y) in pixels; two corners of a rectangle, the centre of a
            circle and a point on it, or the first and last pixel of a mask.
        index (`int`): What messages call it.
        size (`tuple[int, int]`): (height, width) of the image in pixels.

    Returns:
        `np.ndarray` of shape `(height, width)`, bool, or `None` for a polygon of fewer than three points.

    Raises:
        RowProblem: `"bad_annotation"`, `"unreadable_mask"` or `"wrong_size"`: it has no area, or not the form it says.
    """
    kind = shape.get("shape_type") or "polygon"
    corners = points.astype(np.int64)  # cut as the benchmark does
    if kind == "polygon":
        return draw_polygon(corners, *size) if len(points) >= 3 else None
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = corners
        return draw_polygon(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), *size)
    if kind in ("rectangle", "oriented_rectangle") and len(points) == 4:
        return draw_polygon(corners, *size)
    if kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        drawn = Image.new("1", size[::-1])
        ImageDraw.Draw(drawn).ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
        return np.asarray(drawn)
    if kind == "mask" and len(points) == 2:
        return _placed_mask(shape.get("mask"), corners, index, size)
    raise RowProblem(
        "bad_annotation",
        f"shape {index} is a {kind!r:.40} of {len(points)} points; expected a polygon, a rectangle or circle of two "
        "points, or a mask: lines and points have no area.",
    )


def _placed_mask(encoded: Any, corners: np.ndarray, index: int, size: tuple[int, int]) -> np.ndarray:
    """LabelMe's mask: a PNG in base64 of the box whose first and last pixel are `corners` (x, y)."""
    try:
        values = read_mask_file(base64.b64decode(encoded, validate=True)) != 0
    except (TypeError, ValueError) as error:
        raise RowProblem("unreadable_mask", f"shape {index} has no mask that can be read ({error}).") from error
    (x, y), (height, width) = corners[0], values.shape
    box = corners[1] - corners[0] + 1
    if np.abs(box - (width, height)).max() > 1:  # some versions write the pixel behind the last
        detail = f"shape {index} has a mask of {height} x {width} for a box of {box[1]} x {box[0]} (height x width)."
        raise RowProblem("wrong_size", detail)
    if min(x, y) < 0 or y + height > size[0] or x + width > size[1]:
        detail = f"shape {index} has a mask of {height} x {width} at ({x}, {y}), which is not inside the image of "
        raise RowProblem("wrong_size", f"{detail}{size[0]} x {size[1]} (height x width).")
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = values
    return mask


def draw_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """A filled polygon with its outline, pixel for pixel as `cv2.fillPoly` draws one inside the image.

    Args:
        points (`np.ndarray` of shape `(num_points, 2)`, integer): corners (x, y); the last is joined to the first.
        height (`int`), width (`int`): of the image, in pixels.

    Returns:
        `np.ndarray` of shape `(height, width)`, bool.
    """
    ends = np.roll(points, -1, axis=0)
    (x0, y0), (x1, y1) = points.T, ends.T
    rows = np.arange(height)[:, None]
    row, edge = np.nonzero((rows >= np.minimum(y0, y1)) & (rows < np.maximum(y0, y1)))
    crossing = x0[edge] + (row - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    turns = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(turns, (row, np.clip(np.ceil(crossing), 0, width).astype(np.int64)), 1)
    mask = turns.cumsum(axis=1)[:, :width] % 2 == 1  # inside after an odd number of crossings
    for start, end in zip(points, ends, strict=True):
        x, y = _line(start, end)
        seen = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        mask[y[seen], x[seen]] = True
    return mask


def _line(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bresenham's line from left to right, with halves rounded towards its start."""
    if start[0] > end[0]:
        start, end = end, start
    length = np.abs(end - start)
    long = int(length.argmax())  # the axis on which every pixel is visited
    steps = np.arange(length[long] + 1)
    short_steps = -((length[long] - 2 * length[1 - long] * steps) // max(2 * length[long], 1))
    signs = np.sign(end - start)
    line = [None, None]
    line[long] = start[long] + signs[long] * steps
    line[1 - long] = start[1 - long] + signs[1 - long] * short_steps
    return line[0], line[1]
