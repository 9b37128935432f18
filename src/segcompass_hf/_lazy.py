# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Public names of a package, each loaded when first used (PEP 562), and what to install where that fails."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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


def lazy_names(
    package: str, exports: Mapping[str, Collection[str]], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package (`str`): Its `__name__`.
        exports (`Mapping[str, Collection[str]]`): Module, relative to the package -> public names that it defines.
        modules (`Collection[str]`): Submodules that are public by themselves.
    """
    namespace = vars(sys.modules[package])
    module_of = {name: module for module, names in exports.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in module_of:
            module = module_of[name]
            relative = module if module.startswith(".") else f".{module}"
            with named_extras():
                value = getattr(importlib.import_module(relative, package), name)
            namespace[name] = value  # the next access does not come here
            return value
        if name in modules:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*namespace, *module_of, *modules})

    return __getattr__, __dir__
