# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""An explanation as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from .payload import payload

if TYPE_CHECKING:
    from ..explanation import Explanation

_SCRIPTS = ("shapes.js", "parts.js", "report.js")
_MASKS_PER_TITLE = {0: "No object found", 1: "1 object found"}


def to_html(explanation: Explanation, path: str | os.PathLike) -> Path:
    """Write an explanation as one self-contained page.

    The page shows the image with its masks, words and patches lit by the concept that is chosen, heatmaps, ranked
    concepts, and what a mask becomes without a concept. It fetches nothing (its content policy forbids it), everything
    the user or the model wrote is shown as text, and it works with a keyboard, on a phone and in a dark room. Pictures
    are at most 1024 pixels wide or high on the page, masks 512 and heatmaps 256, whatever the image; see
    [`report_payload.payload`].

    Args:
        explanation ([`Explanation`]): From [`explain`].
        path (`str` or `os.PathLike`): File to write. It appears complete or not at all.

    Returns:
        `pathlib.Path`: the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    page = to_page(explanation).encode("utf-8", errors="replace")  # half of a surrogate pair has no bytes
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(page)
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp gives it to its owner alone
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def to_page(explanation: Explanation) -> str:
    """The page itself; see [`to_html`].

    Returns:
        `str`: HTML.
    """
    from ... import __version__

    content = payload(explanation)
    style, script = _template("report.css"), "\n".join(_template(name) for name in _SCRIPTS)
    found = sum(mask.kept for mask in explanation.masks)
    values = {
        "POLICY": escape(
            f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "TITLE": escape(f"Why: {' '.join(explanation.instruction.split())[:120]}"),
        "INSTRUCTION": escape(explanation.instruction),
        "FOUND": _MASKS_PER_TITLE.get(found, f"{found} objects found"),
        "MODEL": escape(explanation.model_name),
        "SIZE": f"{explanation.image.width} × {explanation.image.height} pixels",
        "IMAGE": content["image"]["src"],
        "WIDTH": str(explanation.image.width),
        "HEIGHT": str(explanation.image.height),
        "VERSION": __version__,
        "STYLE": style,
        "SCRIPT": script,
        # `<` escaped: nothing in the data can end the element that holds it.
        "DATA": json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _template("report.html"))


def _template(name: str) -> str:
    return (resources.files("segcompass_hf.explain") / "templates" / name).read_text("utf-8").strip()


def _hash(text: str) -> str:
    """The source of an inline element, as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
