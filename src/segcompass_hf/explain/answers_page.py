# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Several answers on one HTML page: pictures, reasoning and the concepts behind every mask, without network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from ..figure import slot_colour
from ..pages import fill_page, picture_address
from .dictionary.families import group_concepts
from .report.picture import paint

if TYPE_CHECKING:
    from .explanation import Explanation

NUM_CONCEPTS = 6  # of a mask, those of one name as one
MAX_SIDE = 640  # pixels of a picture
_LETTER = 4.5  # height of a cell's name on the picture, in percent of the picture's width


@dataclass
class ShownAnswer:
    """One answer of the page.

    Args:
        explanation ([`Explanation`]): The answer.
        grid (`int`, *optional*): Cells per side of the grid whose names (`a1`, `b1`, ...) the reasoning uses.
        notes (`list[str]`): Sentences under it.
        address (`str`, *optional*): Of the page of its whole explanation, from this page.
    """

    explanation: Explanation
    grid: int | None = None
    notes: list[str] = field(default_factory=list)
    address: str | None = None


def answers_page(title: str, sections: Sequence[tuple[str, Sequence[ShownAnswer]]]) -> str:
    """Make the page.

    Args:
        title (`str`): Of the page.
        sections (`Sequence[tuple[str, Sequence[ShownAnswer]]]`): A sentence above answers, and these.

    Returns:
        `str`: HTML that needs no other file, but for the explanations that it links to.
    """
    from .. import __version__

    parts = [
        f"<section><p>{escape(about)}</p>{''.join(map(_answer, answers))}</section>" for about, answers in sections
    ]
    values = {"TITLE": escape(title), "ANSWERS": "\n".join(parts), "VERSION": __version__}
    return fill_page("segcompass_hf.explain", "answers.html", "answers.css", (), None, values)


def _answer(shown: ShownAnswer) -> str:
    explanation = shown.explanation
    kept = [mask for mask in explanation.masks if mask.kept]
    masks = [mask.mask for mask in kept]
    colours = [slot_colour(mask.slot) for mask in kept]
    found = f"{len(kept)} mask{'s' * (len(kept) > 1)}" if kept else "nothing found"
    pictures = _picture(paint(explanation.image, (), ()), "picture", shown.grid)
    pictures += _picture(paint(explanation.image, masks, colours), found)
    notes = "".join(f"<p>{escape(note)}</p>" for note in shown.notes)
    whole = f'<p><a href="{escape(shown.address)}">The whole explanation</a></p>' if shown.address else ""
    return (
        f'<article><h2 dir="auto">{escape(explanation.instruction)}</h2><div class="pictures">{pictures}</div>'
        f'<div class="words"><p class="reasoning" dir="auto">{escape(explanation.reasoning or "(no reasoning)")}</p>'
        f"{''.join(map(_mask, explanation.masks))}{notes}{whole}</div></article>"
    )


def _picture(picture: Any, caption: str, grid: int | None = None) -> str:
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    width, height = picture.size
    letters = "" if grid is None else _letters(grid, 100 * height / width)
    address = picture_address(picture, "JPEG", quality=88)
    return (
        f'<figure><div><img src="{address}" width="{width}" height="{height}" alt="{escape(caption)}">{letters}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _letters(grid: int, height: float) -> str:
    """Names of rows and columns along the edges of a picture 100 wide and `height` high."""
    names = []
    for cell in range(grid):
        centre = (cell + 0.5) / grid
        names.append(f'<text x="{100 * centre:.1f}" y="{height - 1:.1f}">{chr(ord("a") + cell)}</text>')
        names.append(f'<text x="{_LETTER / 2}" y="{(1 - centre) * height + _LETTER / 3:.1f}">{cell + 1}</text>')
    size = f'viewBox="0 0 100 {height:.1f}" font-size="{_LETTER}" text-anchor="middle"'
    return f'<svg aria-hidden="true" {size}>{"".join(names)}</svg>'


def _mask(mask: Any) -> str:
    """The largest concepts of a mask as bars: shares of it, or contributions where shares would say nothing."""
    families = group_concepts(mask.concepts)[:NUM_CONCEPTS]
    largest = max((abs(family.contribution) for family in families), default=0.0) or 1.0
    rows = []
    for family in families:
        first = family.concepts[0].feature
        name = f"concept {first}" if family.name is None else family.name
        part = f"{100 * family.share:+.0f} %" if mask.in_shares else f"{family.contribution:+.2f}"
        length = 100 * abs(family.contribution) / largest
        kind = "for" if family.contribution > 0 else "against"
        bar = f'<svg aria-hidden="true" viewBox="0 0 100 8" preserveAspectRatio="none" class="{kind}">'
        bar += f'<rect width="{length:.0f}" height="8"/></svg>'
        rows.append(f"<tr><th>{escape(name)}</th><td>{bar}</td><td>{part}</td></tr>")
    title = f"mask of slot {mask.slot}" if mask.kept else f"slot {mask.slot}, not kept"
    dot = f'<circle cx="4" cy="4" r="4" fill="{slot_colour(mask.slot)}"/>'
    dot = f'<svg aria-hidden="true" class="dot" viewBox="0 0 8 8">{dot}</svg>'
    return f"<h3>{dot} Concepts behind the {title}, confidence {mask.score:.2f}</h3><table>{''.join(rows)}</table>"


__all__ = ["ShownAnswer", "answers_page"]
