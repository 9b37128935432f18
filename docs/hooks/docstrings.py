# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What mkdocstrings cannot read by itself: names that a package loads lazily, links in Hugging Face's form."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import griffe

_LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")  # [`Name`] or [`~Name.method`], with no target of its own


class LazyNames(griffe.Extension):
    """Public names stand where users import them from; `[`Name`]` in a docstring links to such a name."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        public = {}
        for module in _modules(pkg):
            for name, target in _exports(module).items():
                module.set_member(name, griffe.Alias(name, target, parent=module))
                public[name] = f"{module.path}.{name}"
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


def _exports(module: griffe.Module) -> dict[str, str]:
    """Name -> full path of its definition, of what a package loads lazily; see `lazy_names` of `_lazy.py`."""
    if "_EXPORTS" not in module.members:
        return {}
    listed = ast.literal_eval(str(module["_EXPORTS"].value))
    return {name: f"{_absolute(module, path)}.{name}" for path, names in listed.items() for name in names}


def _absolute(module: griffe.Module, relative: str) -> str:
    dots = len(relative) - len(relative.lstrip("."))  # none or one is the package itself, two its parent
    parts = module.path.split(".")
    return ".".join([*parts[: len(parts) - max(dots - 1, 0)], relative.lstrip(".")])


def _documented(owner: griffe.Object) -> Iterator[griffe.Object]:
    if owner.docstring is not None:
        yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _documented(member)
