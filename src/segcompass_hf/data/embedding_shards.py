# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors by name in a folder of safetensors shards that several processes may fill and read at once."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

PREFIX, SUFFIX, UNFINISHED = "shard-", ".safetensors", ".part"
ABANDONED_AFTER = 24 * 3600  # seconds; an unfinished file that old has no writer any more


class EmbeddingShards:
    """A store that only grows. Every shard is written aside by one process and renamed when it is whole, so a kill
    loses what was not yet written and breaks nothing. A file that is no whole shard of this store is left out.

    Args:
        folder (`Path`): Where the shards are; made when the first is written.
        identity (`str`): What the shards belong to. Shards of another identity are left out.
        shard_bytes (`int`): So many bytes are collected before a shard is written.
        min_free_bytes (`int`): A shard that would leave less space on the disk is not written.
    """

    def __init__(self, folder: Path, identity: str, shard_bytes: int, min_free_bytes: int):
        self.folder, self.identity = Path(folder), identity
        self.shard_bytes, self.min_free_bytes = shard_bytes, min_free_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._forget_files()
        self._remove_abandoned()
        self.refresh()

    def _forget_files(self) -> None:
        self._place: dict[str, str] = {}  # name of a tensor -> file
        self._handles: dict[str, Any] = {}
        self._known_files: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads the same files, and has nothing of its own to write."""
        return self.__dict__ | {"_pending": {}, "_place": {}, "_handles": {}, "_known_files": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._pending or name in self._place

    def __len__(self) -> int:
        return len(self._pending.keys() | self._place.keys())

    def refresh(self) -> None:
        """Look for shards that other processes have finished. Only the headers of new ones are read."""
        try:
            files = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return
        for file in files:
            if file.startswith(PREFIX) and file.endswith(SUFFIX) and file not in self._known_files:
                self._known_files.add(file)
                self._open(file)

    def _open(self, file: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            logger.warning(
                f"embedding cache: {os.fspath(self.folder / file)!r} is not a whole shard ({error}) and is left out; "
                "its images are encoded again. Delete the file to be rid of this message."
            )
            return
        if (handle.metadata() or {}).get("identity") != self.identity:
            logger.warning(
                f"embedding cache: {os.fspath(self.folder / file)!r} was made by another encoder and is left out."
            )
            return
        self._handles[file] = handle
        for name in handle.keys():  # noqa: SIM118 - no mapping
            self._place.setdefault(name, file)

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name; only its own bytes are read.

        Raises:
            KeyError: there is none.
        """
        if name in self._pending:
            return self._pending[name]
        return self._handles[self._place[name]].get_tensor(name)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor; writes a shard when enough has come together.

        Raises:
            OSError: the shard cannot be written; it is kept in memory, and the next `flush` tries again.
        """
        self._pending[name] = tensor.contiguous()
        if self.pending_bytes >= self.shard_bytes:
            self.flush()

    @property
    def pending_bytes(self) -> int:
        """Bytes kept in memory, not yet written."""
        return sum(tensor.nbytes for tensor in self._pending.values())

    def discard_pending(self) -> None:
        """Forget what is not yet written."""
        self._pending.clear()

    def flush(self) -> None:
        """Write what is pending as one shard.

        Raises:
            OSError: there is not enough space, or the file cannot be written.
        """
        if not self._pending:
            return
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free - self.pending_bytes < self.min_free_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{free:,} bytes are free, {self.pending_bytes:,} are needed, {self.min_free_bytes:,} stay free",
                os.fspath(self.folder),
            )
        file = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}{SUFFIX}"
        unfinished = self.folder / f"{file}{UNFINISHED}"
        try:
            save_file(self._pending, unfinished, metadata={"identity": self.identity})
            _to_disk(unfinished)
            os.replace(unfinished, self.folder / file)
        finally:
            unfinished.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere folders cannot be opened
            _to_disk(self.folder)
        self._pending = {}
        self.refresh()

    def _remove_abandoned(self) -> None:
        """What killed processes left behind."""
        for path in self.folder.glob(f"{PREFIX}*{UNFINISHED}"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                continue


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
