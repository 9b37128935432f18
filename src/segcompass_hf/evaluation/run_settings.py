# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A folder of results is continued only by the run that began it."""

from __future__ import annotations

import os
from typing import Any


def check_same_run(output_dir: str | os.PathLike, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to add to the results of another run.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the results, for the message.
        before, now (`dict`): Settings that the results were begun with, and those of this run, as json holds them.

    Raises:
        ValueError: They differ; says in what.
    """
    before, now = _flat(before), _flat(now)
    changed = [
        f"{name} was {before.get(name)!r:.60}, is {now.get(name)!r:.60}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{os.fspath(output_dir)!r} holds results of another run; choose another folder, or drop them with "
            f"resume=False (--restart). What differs: {'; '.join(changed)}."
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


__all__ = ["check_same_run"]
