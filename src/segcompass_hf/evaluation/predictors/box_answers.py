# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Boxes and points that a model wrote as JSON, whatever it wrote around them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .sam_prompts import SamPrompt

_BOX_KEYS = ("bbox_2d", "bbox", "box")  # x1, y1, x2, y2; `box_2d` is y first by its models' habit and not read
_POINT_KEY = re.compile(r"points?(_\d+d?)?$")  # point_2d, point, points, points_2d, points_1, ...
_LONGEST_ANSWER = 100_000  # characters; beyond that a text is no answer, and looking through it takes long


@dataclass(frozen=True)
class Location:
    """One object as a model named it, in the model's own coordinates.

    Args:
        box (`tuple[float, float, float, float]`, *optional*): `(x1, y1, x2, y2)`.
        points (`tuple[tuple[float, float], ...]`): `(x, y)`.
        label (`str`, *optional*): What it was called.
    """

    box: tuple[float, ...] | None = None
    points: tuple[tuple[float, ...], ...] = ()
    label: str | None = None

    def to_prompt(self, scale: tuple[float, float], size: tuple[int, int]) -> SamPrompt | None:
        """The same place in pixels of the image.

        Corners are put in order and cut off at the image's border, points outside it are left out.

        Args:
            scale (`tuple[float, float]`): Pixels of the image per unit, along x and y.
            size (`tuple[int, int]`): (height, width) of the image.

        Returns:
            `SamPrompt`, or `None` where nothing of it is inside the image.
        """
        height, width = size
        points = tuple((x * scale[0], y * scale[1]) for x, y in self.points)
        points = tuple((x, y) for x, y in points if 0 <= x <= width and 0 <= y <= height)
        box = None
        if self.box is not None:
            x1, x2 = (min(max(x * scale[0], 0.0), float(width)) for x in sorted(self.box[::2]))
            y1, y2 = (min(max(y * scale[1], 0.0), float(height)) for y in sorted(self.box[1::2]))
            box = (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
        return SamPrompt(box, points) if box or points else None


def parse_answer(text: str) -> list[Location] | None:
    """Read the objects out of an answer.

    What counts is what stands after the last `</think>` and inside the last `<answer>`, where there are such tags. In
    it, JSON may stand in code fences or between words, use single quotes, have trailing commas, or be cut short: whole
    entries are used. Of several lists the last is the answer. Understood are entries with a box (`bbox_2d`, `bbox` or
    `box`), points (`point_2d`, `points`, `points_1`, ...) or both, on their own, in a list, or inside another object;
    and, where there are none of these, bare lists of four numbers as boxes and of two as points.

    Args:
        text (`str`): As the model wrote it.

    Returns:
        `list[Location]`: empty where the answer is an empty list; `None` where it cannot be understood.

    Example:

    ```python
    >>> parse_answer('<think>left</think> ```json\\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\\n``` There it is.')
    [Location(box=(1.0, 2.0, 3.0, 4.0), points=(), label='cat')]
    ```
    """
    text = text.rpartition("</think>")[2]
    _, tag, inside = text.rpartition("<answer>")
    text = inside.split("</answer>")[0] if tag else text
    if len(text) > _LONGEST_ANSWER:
        return None
    try:
        return _read(text)
    except RecursionError:  # brackets by the hundred inside each other: looping generation, no answer
        return None


def _read(text: str) -> list[Location] | None:
    entries, lists, bare = [], [], []
    for value in _json_values(text):
        found = list(_entries(value))
        if found and isinstance(value, list):
            lists.append(found)
        elif found:
            entries += found
        elif value == [] or isinstance(value, dict) and [] in value.values():
            lists.append([])
        else:
            bare += _bare(value)
    if lists:
        return lists[-1]
    if entries:
        return entries
    boxes = [location for location in bare if location.box is not None]
    return boxes or bare or None


def _json_values(text: str) -> Iterator[Any]:
    """Outermost lists and objects of a text, from left to right."""
    closing, end = _closing_brackets(text), 0
    for match in re.finditer(r"[\[{]", text):
        start = match.start()
        if start < end:
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            value = _repaired(text[start : closing[start] + 1]) if start in closing else None
            if value is None:
                continue
            end = closing[start] + 1
        yield value


def _repaired(text: str) -> Any:
    """JSON without its trailing commas, and if need be with single quotes made double; `None` where that is none."""
    text = re.sub(r",\s*(?=[\]}])", "", text)
    for candidate in (text, text.replace("'", '"')):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return None


def _closing_brackets(text: str) -> dict[int, int]:
    """Place of each opening bracket that is closed -> place where it is."""
    opened, closing = [], {}
    for match in re.finditer(r"[\[{\]}]", text):
        if match[0] in "[{":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing


def _entries(value: Any) -> Iterator[Location]:
    """Objects with a box or points, in order, however deep."""
    if isinstance(value, dict):
        label = value.get("label")
        label = label if isinstance(label, str) else None
        boxes = [box for key in _BOX_KEYS if key in value for box in _boxes(value[key])]
        points = [
            point for key in value if isinstance(key, str) and _POINT_KEY.match(key) for point in _points(value[key])
        ]
        if len(boxes) > 1:
            yield from (Location(box, (), label) for box in boxes)  # which point is whose is not said
        elif boxes or points:
            yield Location(boxes[0] if boxes else None, tuple(points), label)
        else:
            yield from _entries([*value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part)


def _bare(value: Any) -> list[Location]:
    """Lists of numbers without names."""
    box, point = _numbers(value, 4), _numbers(value, 2)
    if box or point:
        return [Location(box, (point,) if point else ())]
    return [location for part in value for location in _bare(part)] if isinstance(value, list) else []


def _boxes(value: Any) -> list[tuple[float, ...]]:
    """A box, a pair of corners, or a list of boxes."""
    if isinstance(value, list) and len(value) == 2 and all(_numbers(corner, 2) for corner in value):
        value = [*value[0], *value[1]]
    box = _numbers(value, 4)
    if box:
        return [box]
    return [box for part in value if (box := _numbers(part, 4))] if isinstance(value, list) else []


def _points(value: Any) -> list[tuple[float, ...]]:
    """A point or a list of points."""
    point = _numbers(value, 2)
    if point:
        return [point]
    return [point for part in value if (point := _numbers(part, 2))] if isinstance(value, list) else []


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers as floats, or `None`."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value):
        return None
    try:
        numbers = tuple(map(float, value))
    except OverflowError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
