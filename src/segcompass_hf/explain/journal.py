# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Records of samples, kept as they are measured: started again, a measurement goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def measured_records(
    path: Path,
    settings: Mapping[str, Any],
    rows: Iterable[dict[str, Any]],
    measure: Callable[[int, dict[str, Any]], Any],
    report: Callable[[int], None] = lambda number: None,
) -> list[Any]:
    """Measure rows that have no record yet.

    Args:
        path (`Path`): JSON lines, one per row.
        settings (`Mapping[str, Any]`): What records depend on, JSON-ready; kept with each.
        rows (`Iterable[dict]`): In the row schema.
        measure (`Callable`): Number and row -> what to keep, JSON-ready.
        report (`Callable`): Told how many rows are done, after each.

    Returns:
        `list`: what was kept of every row, in their order.

    Raises:
        ValueError: The file holds records of other settings, or is none of these.
    """
    records = _kept(path, dict(settings))
    found = []
    with path.open("a", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            if number not in records:
                records[number] = measure(number, row)
                file.write(json.dumps({"sample": number, "settings": settings, "record": records[number]}) + "\n")
                file.flush()
            found.append(records[number])
            report(number + 1)
    return found


def _kept(path: Path, settings: dict[str, Any]) -> dict[int, Any]:
    if not path.is_file():
        return {}
    lines = path.read_text("utf-8").split("\n")
    if lines[-1]:  # a kill left half a line: measured again
        path.write_text("".join(line + "\n" for line in lines[:-1]), "utf-8")
    try:
        entries = [json.loads(line) for line in lines[:-1]]
        kept = {entry["sample"]: entry["record"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds other lines than records of samples; remove it or write elsewhere.") from error
    other = next((entry["settings"] for entry in entries if entry["settings"] != settings), None)
    if other is not None:
        changed = sorted(name for name in {*other, *settings} if other.get(name) != settings.get(name))
        raise ValueError(
            f"{path} holds records of other settings ({', '.join(changed)}); remove it or write elsewhere."
        )
    return kept


__all__ = ["measured_records"]
