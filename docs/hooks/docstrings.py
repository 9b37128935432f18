# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What mkdocstrings cannot read by itself: links in docstrings as Hugging Face writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import griffe

_LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")  # [`Name`] or [`~Name.method`], with no target of its own


class HuggingFaceLinks(griffe.Extension):
    """`[`Name`]` in a docstring links to the name where users import it from."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        public = {name: f"{module.path}.{name}" for module in _modules(pkg) for name in _public_names(module)}
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


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for member in list(module.members.values()):
        if not member.is_alias and member.is_module:
            yield from _modules(member)


def _public_names(module: griffe.Module) -> list[str]:
    """Those that a package takes from its files, as its `__init__` or the stub beside it says."""
    if "__all__" not in module.members:
        return []
    inside = module.package.path + "."
    return [
        name
        for name, member in module.members.items()
        if member.is_alias and member.target_path.startswith(inside) and "._" not in member.target_path
    ]


def _documented(owner: griffe.Object) -> Iterator[griffe.Object]:
    if owner.docstring is not None:
        yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _documented(member)
