# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Ids, flags and whole numbers as annotation tools write them: as numbers, as floats or as text."""

from __future__ import annotations

import json
import re
from typing import Any

from .build_report import RowProblem

FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}
_WHOLE = re.compile(r"[+-]?\d{1,30}(\.0*)?", re.ASCII)


def as_whole(value: Any) -> int | None:
    """A whole number: 9, 9.0, `"9"` and `"9.0"` are 9. `None` for anything else, booleans and infinities too."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    return None


def as_id(value: Any) -> int | str | None:
    """What an id says, so that 1, 1.0 and `"1"` are one: a whole number, or another text such as `"5f3a"`.

    Args:
        value: As it stands in the file; MongoDB's `{"$oid": "5f3a"}` is its text.

    Returns:
        `int`, `str` or `None`: `None` where it is no id, such as a list, a boolean, 1.5 or an infinity.
    """
    if isinstance(value, dict) and set(value) == {"$oid"}:
        value = value["$oid"]
    number = as_whole(value)
    if number is None and isinstance(value, str):
        return value.strip() or None
    return number


def as_flag(value: Any, name: str) -> bool:
    """A flag: true and false, 1 and 0, also as text; `None` and empty text are false.

    Args:
        value: As it stands in the file.
        name (`str`): What messages call it.

    Raises:
        RowProblem: `"bad_annotation"`: it is none.
    """
    text = "" if value is None else str(value).strip().lower()
    if isinstance(value, float) and value.is_integer():
        text = str(int(value))
    if text not in FLAGS:
        raise RowProblem("bad_annotation", f"{name} is {value!r:.40}; expected true or false.")
    return FLAGS[text]


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, for which a file that is nested too deeply is a broken one as well.

    Raises:
        ValueError: It is no complete json, or lists stand in lists more than some hundred deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
