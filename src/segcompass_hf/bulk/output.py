# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run, on a disk or behind a URL: whole shards or none, and what the run was begun with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from ..data.folders import AnyFolder
from ..evaluation.run_settings import check_same_run
from ..files import json_digest
from ..locks import alone_with
from .rows import counts_of

RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"
DATA_FOLDER = "data"
_SHARD = re.compile(r"part-(\d+)-of-(\d+)\.parquet")
FOOTERS_AT_A_TIME = 16


class OutputFolder(AnyFolder):
    """Where the shards of a run go: an [`AnyFolder`]."""

    def _found(self) -> dict[str, tuple[int, int]]:
        """Names of the shards that are there, with number and total."""
        try:
            self._filesystem.invalidate_cache()
            listed = self._filesystem.ls(self.path(DATA_FOLDER), detail=False)
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
            for path in (*self._found(), self.path(SUMMARY_FILE), self.path(RUN_FILE)):
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
        if self.local is None:
            yield
            return
        self.local.mkdir(parents=True, exist_ok=True)
        name = f".share-{share[0]}-of-{share[1]}.lock"
        refusal = f"another process is writing into {self.target}; wait for it, or choose another folder."
        with alone_with(self.local / name, refusal):
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
