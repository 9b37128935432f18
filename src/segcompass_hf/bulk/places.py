# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of a data set wherever they lie: on a disk, on the Hub, in a bucket, through fsspec."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..files import json_digest

TRIES, PAUSE = 3, 1.0  # of a file that is far away, and seconds between; each pause is twice the one before


@dataclass
class Place:
    """Files of one kind under one root.

    Args:
        filesystem (`fsspec.AbstractFileSystem`): Reads them.
        root (`str`): Their folder, as the filesystem calls it.
        sizes (`dict[str, int]`): Name from the root on, with slashes -> bytes; sorted by name.
        is_local (`bool`): Whether they lie on this machine's disks.
    """

    filesystem: Any
    root: str
    sizes: dict[str, int]
    is_local: bool

    @property
    def name(self) -> str:
        """Of the folder, for reports."""
        return PurePosixPath(self.root).name or self.root

    def path(self, name: str) -> str:
        """Of a file, as the filesystem calls it."""
        return f"{self.root.rstrip('/')}/{name}"

    def open(self, name: str) -> Any:
        """A file to read from, in bytes."""
        return self.filesystem.open(self.path(name), "rb")

    def address(self, name: str) -> str:
        """Path or URL of a file, for [`read_file`]."""
        path = self.path(name)
        return path if self.is_local else self.filesystem.unstrip_protocol(path)

    def description(self) -> dict[str, Any]:
        """What changes when a file is added, goes, or has another size."""
        return {"name": self.name, "files": len(self.sizes), "names_and_sizes": json_digest(self.sizes)}


def find_files(where: str, suffixes: Collection[str]) -> Place:
    """The files of some kinds in a folder and its folders, by a pattern, or one file.

    Args:
        where (`str`): Path, pattern or URL.
        suffixes (`Collection[str]`): Of the files that are meant, in small letters. Hidden ones are left alone.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: fsspec does not know the kind of URL, or lacks a package to read it.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(where))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{where!r} cannot be opened: {error}") from error
    if any(character in path for character in "*?["):
        found, root = filesystem.glob(path, detail=True), _before_pattern(path)
    elif filesystem.isfile(path):
        found, root = {path: filesystem.info(path)}, str(PurePosixPath(path).parent)
    elif filesystem.exists(path):
        found, root = filesystem.find(path, detail=True), path
    else:
        raise FileNotFoundError(f"there is no file or folder {where!r}.")
    root = root.rstrip("/")
    files = {name.removeprefix(root).lstrip("/"): info for name, info in found.items() if info["type"] != "directory"}
    sizes = {
        name: int(info.get("size") or 0)
        for name, info in sorted(files.items())
        if PurePosixPath(name).suffix.lower() in suffixes and not any(p.startswith(".") for p in name.split("/"))
    }
    return Place(filesystem, root, sizes, isinstance(filesystem, LocalFileSystem))


def _before_pattern(path: str) -> str:
    """The folder above the first part of a path that is a pattern."""
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if any(character in part for character in "*?["))
    return "/".join(parts[:first])


def read_file(address: str) -> bytes:
    """The content of a file; one that is far away is asked for again where the network fails.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
    """
    if "://" not in address:
        with open(address, "rb") as file:
            return file.read()
    import fsspec

    for attempt in range(TRIES):
        try:
            with fsspec.open(address, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise
        except Exception as error:  # each filesystem has its own
            if attempt + 1 == TRIES:
                raise ConnectionError(f"{address} cannot be read ({type(error).__name__}: {error}).") from error
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")
