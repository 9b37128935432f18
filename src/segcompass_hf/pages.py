# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Pages for readers: HTML that needs no other file and no network, and tables in Markdown."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from PIL import Image

from .printable import printable


def read_template(package: str, name: str) -> str:
    """Text of a file in the folder `templates` of a package, without blank lines at its ends."""
    return (resources.files(package) / "templates" / name).read_text("utf-8").strip()


def fill_template(text: str, values: Mapping[str, str]) -> str:
    """Put values in place of `{{NAME}}`; what they hold is not looked through again.

    Raises:
        KeyError: the text asks for a value that is not there.

    ```python
    >>> fill_template("{{A}} and {{B}}", {"A": "{{B}}", "B": "2"})
    '{{B}} and 2'
    ```
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)


def fill_page(
    package: str, name: str, style: str, scripts: Sequence[str], data: Any, values: Mapping[str, str]
) -> str:
    """A page with its style, its scripts and its data inside.

    The page's content policy allows that style, that script and pictures within the page, nothing else. In the data,
    which stand in a JSON element, `<` is escaped, so that nothing in them can end the element.

    Args:
        package (`str`): Whose templates are used.
        name (`str`): Template of the page: `{{POLICY}}`, `{{STYLE}}`, `{{SCRIPT}}`, `{{DATA}}` and the values' names.
        style, scripts (`str`, `Sequence[str]`): Templates that go into it.
        data: What JSON can hold, without NaN.
        values (`Mapping[str, str]`): Everything else, escaped where it is somebody's words.
    """
    css, script = read_template(package, style), "\n".join(read_template(package, script) for script in scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(css)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    own = {"POLICY": escape(policy), "STYLE": css, "SCRIPT": script, "DATA": encoded}
    return fill_template(read_template(package, name), {**values, **own})


def _source(text: str) -> str:
    """An inline element, as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def picture_address(picture: Image.Image, form: str, **options: Any) -> str:
    """A picture as a `data:` address; `options` are those of `PIL.Image.Image.save` for the form, PNG or JPEG."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return data_address(file.getvalue(), form)


def data_address(encoded: bytes, form: str) -> str:
    """The bytes of a PNG or JPEG file as a `data:` address."""
    return f"data:image/{form.lower()};base64,{base64.b64encode(encoded).decode('ascii')}"


def code_block(text: str, language: str = "") -> str:
    """A block of code in Markdown, whose fence is longer than any inside the text.

    ```python
    >>> code_block("```", "yaml").splitlines()
    ['````yaml', '```', '````']
    ```
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, one line per row; a `|` and a line break inside a cell are escaped.

    ```python
    >>> print(markdown_table(["split", "samples"], [["val", 1500]]))
    | split | samples |
    | --- | --- |
    | val | 1500 |
    ```
    """
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
