# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""An explanation as one HTML page that needs no other file and no network."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from ...files import write_whole
from ...pages import fill_page
from .payload import payload

_SCRIPTS = ("shapes.js", "parts.js", "report.js")
_MASKS_PER_TITLE = {0: "No object found", 1: "1 object found"}


def to_html(explanation: Any, path: str | os.PathLike) -> Path:
    """Write an explanation as one self-contained page.

    The page shows the image with its masks, words and patches lit by the concept that is chosen, heatmaps, ranked
    concepts, and what a mask becomes without a concept. It fetches nothing (its content policy forbids it), everything
    the user or the model wrote is shown as text, and it works with a keyboard, on a phone and in a dark room. Pictures
    are at most 1024 pixels wide or high on the page, masks 512 and heatmaps 256, whatever the image; see
    [`~report.payload.payload`].

    Args:
        explanation ([`Explanation`]): From [`explain`].
        path (`str` or `os.PathLike`): File to write. It appears complete or not at all.

    Returns:
        `pathlib.Path`: the file.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the page; make it first.")
    page = to_page(explanation).encode("utf-8", errors="replace")  # half of a surrogate pair has no bytes
    write_whole(path, page)
    return path


def to_page(explanation: Any) -> str:
    """The page itself; see [`to_html`].

    Returns:
        `str`: HTML.
    """
    from ... import __version__

    content = payload(explanation)
    found = sum(mask.kept for mask in explanation.masks)
    values = {
        "TITLE": escape(f"Why: {' '.join(explanation.instruction.split())[:120]}"),
        "INSTRUCTION": escape(explanation.instruction),
        "FOUND": _MASKS_PER_TITLE.get(found, f"{found} objects found"),
        "MODEL": escape(explanation.model_name),
        "SIZE": f"{explanation.image.width} × {explanation.image.height} pixels",
        "IMAGE": content["image"]["src"],
        "WIDTH": str(explanation.image.width),
        "HEIGHT": str(explanation.image.height),
        "VERSION": __version__,
    }
    return fill_page("segcompass_hf.explain", "report.html", "report.css", _SCRIPTS, content, values)
