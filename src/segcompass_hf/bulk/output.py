# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run, on a disk or behind a URL: whole shards or none, and what the run was begun with."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..evaluation.run_settings import check_same_run
from ..files import PART_SUFFIX, json_digest, write_whole
from ..locks import alone_with
from .rows import counts_of

RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"
DATA_FOLDER = "data"
_SHARD = re.compile(r"part-(\d+)-of-(\d+)\.parquet")
FOOTERS_AT_A_TIME = 16


class OutputFolder:
    """Where the shards of a run go.

    Args:
        target (`str`): Folder, or URL of whatever fsspec writes.

    Raises:
        ValueError: fsspec does not know the kind of URL, or lacks a package for it.
    """

    def __init__(self, target: str):
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.target = os.fspath(target)
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(os.path.expanduser(self.target))
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.target!r} cannot be written to: {error}") from error
        self._local = Path(self._root) if isinstance(self._filesystem, LocalFileSystem) else None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write a file aside, then give it its name: it is there whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        if self._local is not None:
            write_whole(self._local / name, content, durable=True)
            return
        part = self._path(f"{name}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
        self._filesystem.makedirs(os.path.dirname(part), exist_ok=True)
        self._filesystem.pipe_file(part, content)
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))
        self._filesystem.mv(part, self._path(name))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A file of the run; `None` where there is none.

        Raises:
            ValueError: It is damaged.
        """
        try:
            content = json.loads(self._filesystem.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{self._path(name)} is damaged ({error}); choose another folder.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self._path(name)} is damaged: it holds no object; choose another folder.")
        return content

    def _found(self) -> dict[str, tuple[int, int]]:
        """Names of the shards that are there, with number and total."""
        try:
            self._filesystem.invalidate_cache()
            listed = self._filesystem.ls(self._path(DATA_FOLDER), detail=False)
        except FileNotFoundError:
            return {}
        matches = ((path, _SHARD.fullmatch(path.rsplit("/", 1)[-1])) for path in listed)
        return {path: (int(match[1]), int(match[2])) for path, match in matches if match is not None}

    def shards_there(self) -> set[int]:
        """Numbers of the shards that are written."""
        return {number for number, _ in self._found().values()}

    def write_shard(self, number: int, total: int, content: bytes) -> None:
        """Write the Parquet file of a shard; see `write`."""
        self.write(f"{DATA_FOLDER}/part-{number:06d}-of-{total:06d}.parquet", content)

    def begin(self, settings: dict[str, Any], resume: bool) -> set[int]:
        """Make ready for writing; numbers of the shards that are there already.

        Raises:
            ValueError: The folder holds results of other settings, or shards of no known run.
        """
        if not resume:
            for path in (*self._found(), self._path(SUMMARY_FILE), self._path(RUN_FILE)):
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(path)
        settings = json.loads(json.dumps(settings))
        before = self.read_json(RUN_FILE)
        if before is not None:
            check_same_run(self.target, before, settings)
        elif self.shards_there():
            raise ValueError(
                f"{self.target!r} holds shards but no {RUN_FILE}, so that it is not known what they are; choose "
                "another folder, or drop them with --restart."
            )
        else:
            self.write(RUN_FILE, (json.dumps(settings, indent=1) + "\n").encode())
        return self.shards_there()

    @contextmanager
    def alone(self, share: tuple[int, int]) -> Iterator[None]:
        """Refuse a second run of one share, where the folder is on a disk.

        Raises:
            FileExistsError: There is one.
        """
        if self._local is None:
            yield
            return
        self._local.mkdir(parents=True, exist_ok=True)
        name = f".share-{share[0]}-of-{share[1]}.lock"
        refusal = f"another process is writing into {self.target}; wait for it, or choose another folder."
        with alone_with(self._local / name, refusal):
            yield

    def counts(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What shards hold together: `shards`, `rows`, `errors`, and `digest`, of all rows in order.

        Raises:
            ValueError: One is damaged.
        """
        paths = {number: path for path, (number, _) in self._found().items()}
        with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            found = list(pool.map(self._counts, [paths[number] for number in sorted(numbers)]))
        return {
            "shards": len(found),
            "rows": sum(counts["rows"] for counts in found),
            "errors": sum(counts["errors"] for counts in found),
            "digest": json_digest([counts["digest"] for counts in found]),
        }

    def _counts(self, path: str) -> dict[str, Any]:
        with self._filesystem.open(path, "rb") as file:
            try:
                return counts_of(file)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; delete it, and the same command writes it anew.") from error
