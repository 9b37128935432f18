# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Pickles of annotations, read without running anything: only Python's own containers, numbers and texts."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any


class RefusedPickleError(pickle.UnpicklingError, ValueError):
    """A pickle that asks for more than plain data, or is none."""


class _PlainUnpickler(pickle.Unpickler):
    """Containers, numbers and texts have opcodes of their own; whatever needs a name looked up is refused.

    Without a name there is no callable on the pickle's stack, so that nothing can be called.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise RefusedPickleError(f"it asks for '{module}.{name}'")

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError(f"it asks for the outside object {pid!r:.60}")


def load_plain_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle that holds `dict`, `list`, `tuple`, `str`, `bytes`, numbers, `bool` and `None` only.

    Python 2's byte strings become `str`: UTF-8 where all of them are, else Latin-1.

    Args:
        path: of a file in any pickle protocol.

    Raises:
        RefusedPickleError: (a `ValueError`) The file names a class or function, which is not looked up and not run, or
            it is no complete pickle.
    """
    data = Path(path).read_bytes()
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except UnicodeDecodeError:
        pass
    except Exception as error:  # damaged pickles raise about anything
        raise _refused(path, error) from error
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:
        raise _refused(path, error) from error


def _refused(path: str | os.PathLike, error: Exception) -> RefusedPickleError:
    if isinstance(error, RefusedPickleError):
        return RefusedPickleError(
            f"{os.fspath(path)!r} is refused: {error}, but annotations are plain lists, dicts, numbers and texts. "
            "Nothing of it was run. Get the file from the benchmark's own source."
        )
    return RefusedPickleError(
        f"{os.fspath(path)!r} is no complete pickle ({type(error).__name__}: {error}); is the download cut short?"
    )
