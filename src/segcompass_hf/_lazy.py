# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Public names of a package, each loaded when first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    package: str, exports: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package (`str`): Its `__name__`.
        exports (`Mapping[str, str]`): Public name -> module that defines it, relative to the package.
        modules (`Collection[str]`): Submodules that are public by themselves.
    """
    namespace = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name in exports:
            module = exports[name]
            relative = module if module.startswith(".") else f".{module}"
            value = getattr(importlib.import_module(relative, package), name)
            namespace[name] = value  # the next access does not come here
            return value
        if name in modules:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*namespace, *exports, *modules})

    return __getattr__, __dir__
