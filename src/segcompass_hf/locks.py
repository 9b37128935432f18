# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Of two processes that write one output the second is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone_with(lock_file: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file while the block runs; it is free again when the process ends, however it ends.

    Args:
        lock_file (`Path`): In a folder that is there; goes with the block. On a disk without locks nothing is held.
        refusal (`str`): What to say where another process, or another block of this one, holds it.

    Raises:
        FileExistsError: Somebody does.
    """
    lock = FileLock(lock_file)
    try:
        while True:
            before = _status(lock_file)
            lock.acquire(timeout=0)
            after = _status(lock_file)
            if after is not None and (before is None or os.path.samestat(before, after)):
                break
            lock.release()  # its holder has just removed the file; what was locked is no file's any more
    except Timeout as error:
        raise FileExistsError(refusal) from error
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            lock_file.unlink(missing_ok=True)
        lock.release()


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


__all__ = ["alone_with"]
