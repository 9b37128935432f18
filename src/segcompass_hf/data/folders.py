# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A folder on a disk, or behind a URL of whatever fsspec reads and writes."""

from __future__ import annotations

import errno
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..files import PART_SUFFIX, write_whole


class AnyFolder:
    """A folder whose files are there whole or not at all, wherever it lies.

    Args:
        target (`str` or `os.PathLike`): Path, or URL of whatever fsspec reads and writes.

    Raises:
        ValueError: fsspec does not know the kind of URL, or lacks a package for it.
    """

    def __init__(self, target: str | os.PathLike):
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.target = os.fspath(target)
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(os.path.expanduser(self.target))
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.target!r} cannot be written to: {error}") from error
        self.local = Path(self._root) if isinstance(self._filesystem, LocalFileSystem) else None

    def path(self, name: str) -> str:
        """Of a file, as the filesystem calls it."""
        return f"{self._root.rstrip('/')}/{name}"

    def open(self, name: str) -> BinaryIO:
        """A file to read from.

        Raises:
            FileNotFoundError: There is none.
        """
        try:
            return self._filesystem.open(self.path(name), "rb")
        except FileNotFoundError:  # written since the folder was listed
            self._filesystem.invalidate_cache()
            return self._filesystem.open(self.path(name), "rb")

    def holds(self, name: str) -> bool:
        """Whether a file is there."""
        self._filesystem.invalidate_cache()
        return self._filesystem.exists(self.path(name))

    def find(self, pattern: str) -> list[str]:
        """Paths of the files that a pattern finds in the folder."""
        self._filesystem.invalidate_cache()
        return sorted(self._filesystem.glob(self.path(pattern)))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file aside, then give it its name: it is there whole or not at all, on a disk after a power cut too.

        Args:
            name (`str`): Of the file.
            content (`bytes`): Of the file.

        Raises:
            OSError: It cannot be written.
        """
        if self.local is not None:
            write_whole(self.local / name, content, durable=True)
            return
        part = self.path(f"{name}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
        self._filesystem.makedirs(os.path.dirname(part), exist_ok=True)
        self._filesystem.pipe_file(part, content)
        try:
            self._filesystem.mv(part, self.path(name))
        except OSError as error:
            if not (isinstance(error, FileExistsError) or error.errno == errno.EEXIST):
                raise
            self.remove(name)  # of a kind that renames over nothing
            self._filesystem.mv(part, self.path(name))

    def read_json(self, name: str, remedy: str = "choose another folder") -> dict[str, Any] | None:
        """A JSON object; `None` where there is no such file.

        Args:
            name (`str`): Of the file.
            remedy (`str`, *optional*): What the message says to do about a damaged one.

        Raises:
            ValueError: It is damaged.
        """
        try:
            content = json.loads(self._filesystem.cat_file(self.path(name)))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path(name)} is damaged ({error}); {remedy}.") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{self.path(name)} is damaged (it holds a {type(content).__name__}, expected an object); {remedy}."
            )
        return content


__all__ = ["AnyFolder"]
