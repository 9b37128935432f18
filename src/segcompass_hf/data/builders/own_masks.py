# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks as people write them down (polygons, RLE, PNG files) -> the RLE of the row schema."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from ..schema import encode_mask, merge_masks
from .build_report import RowProblem
from .mask_files import objects_of_values, read_mask_file
from .polygons import polygons_to_rle

FORMS = (
    "polygons [[[x0, y0, x1, y1, x2, y2, ...]], ...] in pixels with one list of polygons per object, COCO RLE "
    '[{"size": [height, width], "counts": "..."}, ...], or paths of PNG masks ["dog.png", ...]'
)


def objects_of(
    value: Any, size: tuple[int, int], find: Callable[[str], str], name: str = "masks"
) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The objects of a `masks` field.

    Args:
        value: One entry per object, each a list of polygons, a single polygon (`[x0, y0, ...]` or `[[x0, y0], ...]`),
            an RLE or the path of a PNG; or one of the last two, or one flat polygon, without the list. The only PNG of
            a field is one object per value above 0; each of several is one object. As text: JSON of these, or paths
            with `;` between. `None`, `""` and `[]` are no object.
        size (`tuple[int, int]`): (height, width) of the image as it is shown, in pixels.
        find (`Callable`): The file of a path, or a `RowProblem`.
        name (`str`): of the field, for messages.

    Returns:
        `tuple[list[dict], list[int] | None]`: RLEs, and the values of the objects in a PNG.

    Raises:
        RowProblem: With what is wrong, and in which object.
    """
    entries = _entries(value, name)
    if len(entries) == 1 and isinstance(entries[0], str):
        where = f"{name}: {entries[0]}"
        masks = objects_of_values(_values(entries[0], size, find, name), where)
        if not masks:
            raise RowProblem("empty_mask", f'{where} is all 0; where nothing is meant, write "{name}": [].')
        return [encode_mask(mask) for mask in masks.values()], list(masks)
    return [_object(entry, size, find, f"{name}[{place}]") for place, entry in enumerate(entries)], None


def union_of(rles: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any] | None:
    """One RLE of several; `None` where there is none."""
    return merge_masks(rles) if rles else None


def _entries(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = value.strip()
        if value[:1] not in ("[", "{"):
            return [path.strip() for path in value.split(";") if path.strip()]
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowProblem("bad_json", f"{name} is no complete JSON ({error}): {value[:60]}") from error
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise RowProblem("bad_annotation", f"{name} is {value!r:.60}; expected {FORMS}.")
    if value and all(_is_number(number) for number in value):
        return [value]  # one polygon
    if len(value) > 1 and all(_is_point(point) for point in value):
        raise RowProblem(
            "bad_annotation",
            f"{name} is {value!r:.40}, which looks like the corners of one polygon; {name} is a list of objects: "
            f"write [{value!r:.20}...]], with one more pair of brackets.",
        )
    return value


def _object(entry: Any, size: tuple[int, int], find: Callable[[str], str], where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        found = objects_of_values(_values(entry, size, find, where), f"{where}: {entry}")
        if len(found) > 1:
            raise RowProblem(
                "bad_annotation",
                f"{where}: {entry} has {len(found)} values above 0; among several files each is one object, of 0 and "
                "one other value. A file with one value per object must be the only one.",
            )
        if not found:
            raise RowProblem("empty_mask", f"{where}: {entry} is all 0.")
        return encode_mask(next(iter(found.values())))
    try:
        return polygons_to_rle(_polygons(entry, size) if isinstance(entry, list) else entry, *size)
    except RowProblem as problem:
        raise RowProblem(problem.kind, f"{where}: {problem}") from problem


def _polygons(entry: list, size: tuple[int, int]) -> list[Any]:
    """An object's polygons, each as `[x0, y0, x1, y1, ...]`."""
    if entry and all(_is_number(number) for number in entry):
        polygons = [entry]
    elif len(entry) > 1 and all(_is_point(point) for point in entry):
        polygons = [[number for point in entry for number in point]]
    else:
        polygons = [
            [number for point in polygon for number in point]
            if isinstance(polygon, list) and polygon and all(_is_point(point) for point in polygon)
            else polygon
            for polygon in entry
        ]
    flat = [number for polygon in polygons if isinstance(polygon, list) for number in polygon if _is_number(number)]
    if len(polygons) == 1 and len(flat) == 4:
        raise RowProblem("bad_annotation", f"four numbers {flat} are a box, not a mask; write its four corners.")
    if flat and max(flat) <= 1 and min(flat) >= 0 and min(size) > 2:
        raise RowProblem(
            "bad_annotation",
            f"all coordinates lie between 0 and 1: multiply x by the width {size[1]} and y by the height {size[0]}.",
        )
    return polygons


def _values(path: str, size: tuple[int, int], find: Callable[[str], str], where: str) -> np.ndarray:
    try:
        values = read_mask_file(find(path))
    except RowProblem as problem:
        raise RowProblem(problem.kind, f"{where}: {problem}") from problem
    if values.shape != tuple(size):
        hint = "" if values.shape == tuple(size)[::-1] else " Where it is to be resized, do so without smoothing."
        raise RowProblem(
            "wrong_size",
            f"{where}: {os.fspath(path)} is {values.shape} but its image is {tuple(size)} (height, width).{hint}",
        )
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(number) for number in value)
