# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the modules for `evaluate.load` lie."""

from pathlib import Path

FOLDER = Path(__file__).parent / "evaluate_modules"


def evaluate_module_path(name: str = "segmentation") -> str:
    """Path of a module of this package that `evaluate.load` takes; nothing is downloaded.

    Args:
        name (`str`, *optional*, defaults to `"segmentation"`): Its name.

    Raises:
        ValueError: there is no module of that name.

    Example:
        >>> import evaluate  # doctest: +SKIP
        >>> metric = evaluate.load(evaluate_module_path())  # doctest: +SKIP
    """
    known = sorted(path.parent.name for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name)
    if name not in known:
        raise ValueError(f"there is no evaluate module {name!r}; expected one of {known}")
    return str(FOLDER / name)
