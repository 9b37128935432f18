# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The record of `gpu.py` as tables for people."""

from __future__ import annotations

from typing import Any

from segcompass_hf.pages import markdown_table


def to_markdown(record: dict[str, Any]) -> str:
    """What ran, what it ran on, what was left out and why, and the figures of every part."""
    machine = next((part["rows"][0] for part in record["parts"] if part["name"] == "machine" and part["rows"]), {})
    has = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lacks = ", ".join(name for name, version in record["versions"].items() if not version)
    lines = [
        "# What a GPU does with this package" if record["device_kind"] != "cpu" else "# `gpu.py`, tried on a CPU",
        "",
        f"`{record['command']}`",
        "",
        f"{machine.get('device', 'A device that could not be asked')}"
        + (f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine.get("memory_bytes") else "")
        + f"; {has}." + (f" Not installed: {lacks}." if lacks else ""),
        "",
        *([f"Carried packages: {record['wheels'].rstrip('.')}.", ""] if record["wheels"] else []),
        *(["Sizes are small, as for any run on a CPU: figures show that the parts run, and nothing about a GPU.", ""]
          if record["device_kind"] == "cpu" else []),
        f"At most {record['minutes']:g} minutes"
        + (f", of which {record['seconds']:.0f} s were used" if "seconds" in record else ", in progress")
        + ". Models at real shapes have random weights; `layers` says how many of the language model's there are. "
        "Seconds are wall time on a GPU and CPU time elsewhere, but for batches of pictures, which are always wall "
        "time; medians after a warm-up. Memory is what the measured code adds at its fullest, in MiB.",
        "",
        markdown_table(
            ["part", "outcome", "seconds", "limit", "rows", "why"],
            [[part["name"], part["outcome"], f"{part['seconds']:.0f}", f"{part['limit']:.0f}", len(part["rows"]),
              part["reason"] or ""] for part in record["parts"]],
        ),
        "",
    ]  # fmt: skip
    for part in record["parts"]:
        lines += _section(part)
    return "\n".join(lines)


def _section(part: dict[str, Any]) -> list[str]:
    """Tables of the rows with figures, one for each `what` they are about; and what was left out."""
    if not part["rows"]:
        return []
    lines, tables = [f"## {part['title']}", ""], {}
    measured = [row for row in part["rows"] if "left_out" not in row]
    if part["name"] == "tests":
        lines += [f"{sum(row['outcome'] == 'passed' for row in measured)} of {len(measured)} passed.", ""]
        measured = [row for row in measured if row["outcome"] != "passed"]
    for row in measured:
        tables.setdefault(row.get("what", ""), []).append({key: row[key] for key in row if key != "what"})
    for what, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"### {what}", ""] if what else []
        cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
        lines += [markdown_table([_name(column) for column in columns], cells), ""]
    for row in part["rows"]:
        if "left_out" in row:
            setting = ", ".join(
                f"{_name(key)} {value}" for key, value in row.items() if key not in ("left_out", "what")
            )
            lines.append(f"- Left out: {' '.join(filter(None, [row.get('what'), setting]))}: {row['left_out']}")
    return [*lines, ""]


def _name(column: str) -> str:
    return column.removesuffix("_bytes").replace("_", " ") + (" MiB" if column.endswith("_bytes") else "")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column.endswith("_bytes"):
        return f"{value / 2**20:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
