# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What mkdocstrings cannot read by itself: links in docstrings as Hugging Face writes them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

import griffe

_LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")  # [`Name`] or [`~Name.method`], with no target of its own


class HuggingFaceLinks(griffe.Extension):
    """`[`Name`]` in a docstring links to the name where users import it from."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        public = {}
        for module in (pkg, *pkg.modules.values()):
            if module.is_init_module:
                names = getattr(importlib.import_module(module.path), "__all__", ())
                public |= {name: f"{module.path}.{name}" for name in names}
        for owner in _documented(pkg):
            owner.docstring.value = prepared(owner.docstring.value, public)


def prepared(text: str, public: dict[str, str]) -> str:
    """A docstring as Markdown.

    Args:
        text (`str`): As the code has it.
        public (`dict[str, str]`): Public name -> the path that it is documented under.
    """

    def linked(found: re.Match) -> str:
        name, _, rest = found[1].partition(".")
        shown = found[1].rpartition(".")[2] if "~" in found[0] else found[1]
        if name not in public:
            return f"`{shown}`"
        return f"[`{shown}`][{public[name]}{'.' + rest if rest else ''}]"

    text = re.sub(r"::$", ":", _LINK.sub(linked, text), flags=re.M)  # `::` announces a block in reStructuredText
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)  # the section's name, so that `>>>` is code


def _documented(owner: griffe.Object) -> Iterator[griffe.Object]:
    if owner.docstring is not None:
        yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _documented(member)
