# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The dictionary beside a checkpoint, in a folder or in the cache of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import store

_LAST_FOUND: dict[tuple, Any] = {}  # at most one: every explanation of a model asks for it


def newest(cls: type, folder: Path, model: Any) -> Any | None:
    """The dictionary of a folder, read again only where its files have changed."""
    files = [folder / name for name in (store.NUMBERS_FILE, store.TABLE_FILE)]
    present = [file for file in files if file.is_file()]
    if not present:
        return None
    key = tuple((str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in present)
    if key not in _LAST_FOUND:
        found = cls.load(folder)
        _LAST_FOUND.clear()
        _LAST_FOUND[key] = found
    if model is not None:
        _LAST_FOUND[key].check(model.sae)
    return _LAST_FOUND[key]


def from_cache(cls: type, repository: str, model: Any) -> Any | None:
    """The dictionary of a checkpoint that came from the Hub, from the same commit."""
    from transformers.utils import cached_file

    commit = getattr(model.config, "_commit_hash", None)
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    files = [
        cached_file(repository, name, revision=commit, **optional) for name in (store.NUMBERS_FILE, store.TABLE_FILE)
    ]
    return newest(cls, Path(files[0]).parent, model) if all(files) else None
