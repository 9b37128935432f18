# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Public names of a package, each loaded when first used (PEP 562), and what to install where that fails."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What only an extra of setup.py installs -> the extra.
_EXTRA_OF = {
    **dict.fromkeys(("trl", "peft", "accelerate", "bitsandbytes"), "train"),
    **dict.fromkeys(("datasets", "evaluate"), "data"),
    **dict.fromkeys(("gradio", "pyarrow"), "explain"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    "matplotlib": "demo",
    "ray": "ray",
}


class MissingExtraError(ModuleNotFoundError):
    """Something is used that a plain `pip install segcompass_hf` leaves out."""


@contextmanager
def named_extras() -> Iterator[None]:
    """A module that is missing inside is named with the extra of this package that installs it.

    Raises:
        MissingExtraError: It is one of an extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None or isinstance(error, MissingExtraError):
            raise
        message = f"this needs {error.name}, which is not installed: pip install 'segcompass_hf[{extra}]'."
        raise MissingExtraError(message, name=error.name, path=error.path) from error


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package whose public names stand in the stub beside it.

    The stub, `__init__.pyi`, says `from .module import Name as Name` of every name, and `from . import module as
    module` of submodules that are public by themselves, which `__all__` leaves out. Type checkers and editors read
    the same file.

    Args:
        package (`str`): Its `__name__`.
    """
    namespace = vars(sys.modules[package])
    module_of, modules = _names_of_stub(Path(namespace["__file__"]).with_suffix(".pyi"))

    def __getattr__(name: str) -> Any:
        if name in module_of:
            with named_extras():
                value = getattr(importlib.import_module(module_of[name], package), name)
            namespace[name] = value  # the next access does not come here
            return value
        if name in modules:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*namespace, *module_of, *modules})

    return __getattr__, __dir__, list(module_of)


def _names_of_stub(stub: Path) -> tuple[dict[str, str], list[str]]:
    """Of every public name the module that defines it, `.x` or `..x`, and the names of public submodules."""
    module_of: dict[str, str] = {}
    modules: list[str] = []
    for node in ast.parse(stub.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [alias.asname for alias in node.names if alias.asname]  # without `as` it is the stub's own
            if node.module is None:
                modules += names
            else:
                module_of |= dict.fromkeys(names, "." * node.level + node.module)
    return module_of, modules
