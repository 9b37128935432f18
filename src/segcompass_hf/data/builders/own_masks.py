# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks as people write them down (polygons, RLE, PNG files) -> the RLE of the row schema."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from ..schema import encode_mask, merge_masks
from .build_report import RowProblem
from .mask_files import objects_of_values, read_mask_file, split_void
from .polygons import check_no_grid, flat_polygons, polygons_to_rle
from .values import parse_json

FORMS = (
    "polygons [[[x0, y0, x1, y1, x2, y2, ...]], ...] in pixels with one list of polygons per object, COCO RLE "
    '[{"size": [height, width], "counts": "..."}, ...], or paths of PNG masks ["dog.png", ...]'
)


class Objects(NamedTuple):
    """What a field of masks holds.

    Args:
        masks (`list[dict]`): RLE of every object.
        values (`list[int]`, *optional*): Of the objects, where they stand in one PNG.
        void (`list[dict]`): RLE of what PNGs say is neither object nor background.
    """

    masks: list[dict[str, Any]]
    values: list[int] | None
    void: list[dict[str, Any]]


def objects_of(value: Any, size: tuple[int, int], find: Callable[[str], str], name: str = "masks") -> Objects:
    """The objects of a `masks` field.

    Args:
        value: One entry per object, each a list of polygons, a single polygon (`[x0, y0, ...]` or `[[x0, y0], ...]`),
            an RLE or the path of a PNG; or one of the last two, or one flat polygon, without the list. The only PNG of
            a field is one object per value above 0; each of several is one object. Beside other values 255 is no
            object but void, see `split_void`. As text: JSON of these, or paths with `;` between. `None`, `""` and `[]`
            are no object.
        size (`tuple[int, int]`): (height, width) of the image as it is shown, in pixels.
        find (`Callable`): The file of a path, or a `RowProblem`.
        name (`str`): of the field, for messages.

    Returns:
        [`Objects`]

    Raises:
        RowProblem: With what is wrong, and in which object.
    """
    entries, found = _entries(value, name), Objects([], None, [])
    check_no_grid(entries, *size)
    if len(entries) == 1 and isinstance(entries[0], str):
        where = f"{name}: {entries[0]}"
        masks = _masks_of_file(entries[0], size, find, name, where, found.void)
        if not masks:
            raise RowProblem("empty_mask", f'{where} is all 0; where nothing is meant, write "{name}": [].')
        return found._replace(masks=[encode_mask(mask) for mask in masks.values()], values=list(masks))
    for place, entry in enumerate(entries):
        found.masks.append(_object(entry, size, find, f"{name}[{place}]", found.void))
    return found


def union_of(rles: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any] | None:
    """One RLE of several; `None` where there is none."""
    return merge_masks(rles) if rles else None


def _entries(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = value.strip()
        if value[:1] not in ("[", "{"):
            return [path.strip() for path in value.split(";") if path.strip()]
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowProblem("bad_json", f"{name} is no complete JSON ({error}): {value[:60]}") from error
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise RowProblem("bad_annotation", f"{name} is {value!r:.60}; expected {FORMS}.")
    if value and all(is_number(number) for number in value):
        return [value]  # one polygon
    if len(value) > 1 and all(_is_point(point) for point in value):
        raise RowProblem(
            "bad_annotation",
            f"{name} is {value!r:.40}, which looks like the corners of one polygon; {name} is a list of objects: "
            f"write [{value!r:.20}...]], with one more pair of brackets.",
        )
    return value


def _masks_of_file(
    path: str, size: tuple[int, int], find: Callable[[str], str], where: str, name: str, void: list[dict[str, Any]]
) -> dict[int, np.ndarray]:
    """Value -> mask of a PNG; its void is added to `void`."""
    values, left = split_void(_values(path, size, find, where), name)
    if left is not None:
        void.append(encode_mask(left))
    return objects_of_values(values, name)


def _object(
    entry: Any, size: tuple[int, int], find: Callable[[str], str], where: str, void: list[dict[str, Any]]
) -> dict[str, Any]:
    if isinstance(entry, str):
        found = _masks_of_file(entry, size, find, where, f"{where}: {entry}", void)
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
        if isinstance(entry, list):
            _refuse_box(entry)
        return polygons_to_rle(entry, *size)
    except RowProblem as problem:
        raise RowProblem(problem.kind, f"{where}: {problem}") from problem


def _refuse_box(entry: list) -> None:
    polygons = flat_polygons(entry)
    if len(polygons) == 1 and isinstance(polygons[0], list) and len(polygons[0]) == 4:
        detail = f"four numbers {polygons[0]} are a box, not a mask; write its four corners."
        raise RowProblem("bad_annotation", detail)


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


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(number) for number in value)
