# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Pickles of annotations, read without running anything: only Python's own containers, numbers and texts."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_GROWTH = 100  # values and characters per byte of a file; names of fields, stored once, make up to about 10
_CONTAINERS = (dict, list, tuple)


class RefusedPickleError(pickle.UnpicklingError, ValueError):
    """A pickle that asks for more than plain data, or is none."""


def _with_plain_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def checked(self: Any) -> None:
        for key in self.stack[keys]:
            if isinstance(key, tuple):  # hashed in full: tuples in tuples, each twice, never end
                raise RefusedPickleError("it asks for a dict with a tuple as its key")
        load(self)

    return checked


class _PlainUnpickler(pickle._Unpickler):
    """Containers, numbers and texts have opcodes of their own; whatever needs a name looked up is refused.

    Without a name there is no callable on the pickle's stack, so that nothing can be called. Python's own reader in
    place of the one in C, which fills gigabytes for one large number of a place in its memory (9 bytes of a file);
    `bytearray`s, whose memory is taken before they are read, and sets are no annotations.
    """

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in b"".join((pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET))
    }
    for _code, _keys in ((pickle.SETITEM, slice(-2, -1)), (pickle.SETITEMS, slice(0, None, 2))):
        dispatch[_code[0]] = _with_plain_keys(dispatch[_code[0]], _keys)
    dispatch[pickle.DICT[0]] = _with_plain_keys(dispatch[pickle.DICT[0]], slice(0, None, 2))

    def find_class(self, module: str, name: str) -> Any:
        raise RefusedPickleError(f"it asks for '{module}.{name}'")

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError(f"it asks for the outside object {pid!r:.60}")


def load_plain_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle that holds `dict`, `list`, `tuple`, `str`, `bytes`, numbers, `bool` and `None` only.

    Lists may stand in several places, but written out they must not be more than 100 times the file: a few bytes could
    stand for any number of values. Python 2's byte strings become `str`: UTF-8 where all of them are, else Latin-1.

    Args:
        path: of a file in any pickle protocol.

    Raises:
        RefusedPickleError: (a `ValueError`) The file names a class or function, which is not looked up and not run, or
            it is no complete pickle.
    """
    data = Path(path).read_bytes()
    try:
        try:
            value = _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:
            value = _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
        _check_written_out(value, MAX_GROWTH * len(data))
    except Exception as error:  # damaged pickles raise about anything
        raise _refused(path, error) from error
    return value


def _check_written_out(value: Any, most: int) -> None:
    """Refuse containers that hold themselves, or more values and characters than `most` where each place counts."""
    sizes: dict[int, int] = {}
    above: set[int] = set()
    stack = [value]
    while stack:
        container = stack[-1]
        place, inside = id(container), _values_in(container)
        if place in sizes:
            stack.pop()
        elif place in above:  # all that is in it has been counted
            above.remove(place)
            total = sum(sizes[id(one)] if isinstance(one, _CONTAINERS) else _length(one) for one in inside)
            if total > most:
                raise RefusedPickleError(f"its lists stand in so many places that they make more than {most} values")
            sizes[place] = 1 + total
        else:
            above.add(place)
            waiting = [one for one in inside if isinstance(one, _CONTAINERS) and id(one) not in sizes]
            if any(id(one) in above for one in waiting):
                raise RefusedPickleError("it has a list that holds itself")
            stack += waiting


def _values_in(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, _CONTAINERS) else []


def _length(value: Any) -> int:
    return 1 + (len(value) if isinstance(value, (str, bytes)) else 0)


def _refused(path: str | os.PathLike, error: Exception) -> RefusedPickleError:
    if isinstance(error, RefusedPickleError):
        return RefusedPickleError(
            f"{os.fspath(path)!r} is refused: {error}, but annotations are plain lists, dicts, numbers and texts. "
            "Nothing of it was run. Get the file from the benchmark's own source."
        )
    return RefusedPickleError(
        f"{os.fspath(path)!r} is no complete pickle ({type(error).__name__}: {error}); is the download cut short?"
    )
