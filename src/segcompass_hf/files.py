# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGED_SUFFIX = ".unfinished"


def check_new_folder(output: str | os.PathLike) -> Path:
    """The path of a folder to be made; one that is there and empty will do.

    Raises:
        FileExistsError: Something is there already.
    """
    output = Path(output).expanduser()
    if output.is_dir() and not any(output.iterdir()):
        return output
    if output.is_symlink() or output.exists():
        what = f"holds {sum(1 for _ in output.iterdir())} files" if output.is_dir() else "is a file"
        raise FileExistsError(f"{output} {what} already, and nothing is overwritten; name another folder.")
    return output


@contextmanager
def staged_folder(output: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output` when the block ends, and goes when it fails.

    A kill leaves `<output>.unfinished` behind, which the next start replaces.

    Args:
        output (`str` or `os.PathLike`): What the folder is called in the end; must not exist, or be empty.

    Raises:
        FileExistsError: Something is there already.
    """
    output = check_new_folder(output)
    staged = output.with_name(output.name + STAGED_SUFFIX)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if output.is_dir():
            output.rmdir()
        os.replace(staged, output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Refuse to start writing what does not fit.

    Args:
        folder (`Path`): Where to write; it exists.
        num_bytes (`int`): What will be written.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and {num_bytes / 1e9:.1f} GB are to be written; make room, "
            "or name a folder on another disk."
        )


__all__ = ["check_disk_space", "check_new_folder", "staged_folder"]
