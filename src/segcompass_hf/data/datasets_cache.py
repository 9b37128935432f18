# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The cache of `datasets`: where it cannot be written, the error names it and says how to move it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, *_FULL}


@contextmanager
def named_cache() -> Iterator[None]:
    """What builds or loads a data set stands inside; `datasets` writes it to its cache, which not everybody may.

    Raises:
        OSError: The cache cannot be written, with what to do; other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        refusal = _refusal_behind(error)
        if refusal is None:
            raise
        import datasets

        raise OSError(
            refusal.errno,
            f"the cache of `datasets`, {datasets.config.HF_DATASETS_CACHE}, cannot be written ({refusal.strerror}"
            f"{f': {refusal.filename}' if refusal.filename else ''}); name a folder on a disk with space that you may "
            "write to in the environment variable HF_HOME (or HF_DATASETS_CACHE, for data sets alone)",
        ) from error


def _refusal_behind(error: BaseException | None) -> OSError | None:
    """The refusal of the cache that led to an error, which `datasets` may have wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED and _is_of_cache(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_of_cache(error: OSError) -> bool:
    import datasets

    if not isinstance(error.filename, (str, os.PathLike)):
        return error.errno in _FULL  # in the middle of writing
    path = Path(os.path.abspath(error.filename))
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_MODULES_CACHE, datasets.config.HF_CACHE_HOME)
    return any(path.is_relative_to(one) or Path(one).is_relative_to(path) for one in map(os.path.abspath, caches))


__all__ = ["named_cache"]
