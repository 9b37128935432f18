# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Cells and tables that pages, cards and the command line share."""

from __future__ import annotations

from html import escape
from typing import Any

from ..pages import markdown_table

SELECTION_HOW = (
    "Choosing against drawing, where all objects of an image are known. Every mask counts as a choice of the known "
    "objects whose union fits it best. The oracle draws that choice with their true masks; what it lacks is lost to "
    "selection, what it has more than the prediction is lost to masks: 1 = gIoU + lost to selection + lost to masks. "
    "Right choice: share of samples where the choice is just what was asked for."
)
SELECTION_TITLES = {
    "gIoU": "gIoU",
    "oracle_gIoU": "gIoU of the oracle",
    "lost_to_selection": "lost to selection",
    "lost_to_masks": "lost to masks",
    "right_choice": "right choice",
}


def figure_cell(figure: dict[str, float] | None) -> str:
    """A figure and its interval for a table; a dash where there is none or no sample bears on it."""
    if not figure or not figure["num_samples"]:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def selection_rows(figures: dict[str, Any]) -> list[list[Any]]:
    """What is lost to choosing and what to drawing: all samples, then each kind where there are several.

    Args:
        figures (`dict`): Of a run, see `figures.summarize`; also of a version that did not say so.

    Returns:
        `list[list]`: per row its name, the number of samples, and a cell for each of [`SELECTION_TITLES`]; `[]` where
        the objects of no image are known.
    """
    selection = figures.get("selection")
    if selection is None:
        return []
    kinds = selection["by_kind"] if len(selection["by_kind"]) > 1 else {}
    groups = {"all": selection["all"]} | {f"kind: {name}": entry for name, entry in kinds.items()}
    return [
        [name, entry["gIoU"]["num_samples"], *(figure_cell(entry[column]) for column in SELECTION_TITLES)]
        for name, entry in groups.items()
    ]


def selection_markdown(*runs: dict[str, Any]) -> list[str]:
    """How it is meant, and the [`selection_rows`] of runs, as paragraphs of Markdown; `[]` where there are none.

    Of several runs each row begins with the data set.
    """
    lead = ["data set"] * (len(runs) > 1)
    rows = [[run["dataset"]] * len(lead) + row for run in runs for row in selection_rows(run)]
    return [SELECTION_HOW, markdown_table([*lead, "", "samples", *SELECTION_TITLES.values()], rows)] if rows else []


def selection_html(figures: dict[str, Any]) -> str:
    """The same of one run, as a paragraph and a table; empty where there are none."""
    rows = selection_rows(figures)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(title)}</th>" for title in ("", "samples", *SELECTION_TITLES.values()))
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<p>{escape(SELECTION_HOW)}</p>\n<table>\n<tr>{head}</tr>\n{body}</table>\n"
