# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors on disk in safetensors shards, each there whole or not at all: under the caches of embeddings and states."""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..files import PART_SUFFIX, SAFETENSORS_PART, free_space, read_json_object, whole_file, write_whole

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREFIX, SUFFIX = "shard-", ".safetensors"
ABANDONED_AFTER = 24 * 3600  # seconds; an unfinished file that old has no writer any more


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is not stored.

    Raises:
        ValueError: It is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; expected one of {', '.join(DTYPES)}.")


def gib(num_bytes: int) -> str:
    """A number of bytes as memory and disks of tensors are counted: in MiB, or in GiB from a quarter of one on."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"


def write_shard(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, min_free_bytes: int = 0
) -> None:
    """Write one shard aside and rename it when it is whole and on the disk: a kill leaves no half of it.

    Args:
        path (`Path`): Of the shard; its folder is made where it is missing.
        tensors (`dict[str, torch.Tensor]`): What it holds.
        metadata (`dict[str, str]`, *optional*): For its header.
        min_free_bytes (`int`, *optional*, defaults to 0): Space on the disk that is left alone.

    Raises:
        OSError: There is not enough space, or the file cannot be written.
    """
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), free_space(path.parent)
    if free - needed < min_free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{free:,} bytes are free, {needed:,} are needed, {min_free_bytes:,} stay free",
            os.fspath(path.parent),
        )
    with whole_file(path, durable=True) as part:
        save_file(tensors, part, metadata=metadata)


class TensorShards:
    """Tensors by name in a folder of shards that several processes may fill and read at once.

    The store only grows: a kill loses what was not yet written and breaks nothing. A file that is no whole shard of
    this store is left out.

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
        self._place: dict[str, str] = {}  # name of a tensor -> file
        self._handles: dict[str, Any] = {}
        self._known_files: set[str] = set()
        self._remove_abandoned()
        self.refresh()

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
        try:
            handle = safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            logger.warning(
                f"{os.fspath(self.folder / file)!r} is not a whole shard ({error}) and is left out; what it held is "
                "made again. Delete the file to be rid of this message."
            )
            return
        if (handle.metadata() or {}).get("identity") != self.identity:
            logger.warning(f"{os.fspath(self.folder / file)!r} is of another store ({self.identity}) and is left out.")
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
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self.shard_bytes:
            self.flush()

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
        file = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}{SUFFIX}"
        write_shard(self.folder / file, self._pending, {"identity": self.identity}, self.min_free_bytes)
        self._pending = {}
        self.refresh()

    def _remove_abandoned(self) -> None:
        """What killed processes left behind."""
        for path in itertools.chain(self.folder.glob(f"{PREFIX}*{PART_SUFFIX}"), self.folder.glob(SAFETENSORS_PART)):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                continue


class NumberedShards:
    """Shards in an order, in a folder with an index: one process writes them one after another and goes on later.

    The folder holds `shard-00000.safetensors` and so on, and `index.json`. A shard is written before the index that
    names it: whenever the process dies, the index names whole shards only.

    Args:
        folder (`Path`): Where; made when the first shard is written.
        key (`dict`): What the tensors depend on.
        **index: What the index of an empty folder says beside `key` and `shards`.

    Raises:
        ValueError: The folder was filled under another key; says what differs.
    """

    def __init__(self, folder: Path, key: dict[str, Any], **index: Any):
        self.folder = Path(folder)
        key = json.loads(json.dumps(key))  # as it comes back from the index
        self.index = {"key": key, "shards": [], **index}
        if self._index_path.is_file():
            remedy = f"delete the folder {self.folder}, or give another one"
            found = read_json_object(self._index_path, remedy)
            wrong = [name for name, value in self.index.items() if not isinstance(found.get(name), type(value))]
            if wrong or not all(isinstance(shard, dict) and "file" in shard for shard in found["shards"]):
                raise ValueError(f"{self._index_path} is damaged ({', '.join(wrong) or 'shards'}); {remedy}.")
            self._check_key(key, found["key"])
            self.index = found

    @property
    def _index_path(self) -> Path:
        return self.folder / "index.json"

    def _check_key(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        other = [name for name in {**key, **found} if key.get(name) != found.get(name)]
        if other:
            shown = "; ".join(f"{name} is {found.get(name)!r} there and {key.get(name)!r} here" for name in other)
            raise ValueError(
                f"the cache {self.folder} was made for something else: {shown}. Delete the folder or give another one."
            )

    def append(self, tensors: dict[str, torch.Tensor] | None, entry: dict[str, Any], **index: Any) -> None:
        """Write a shard and what the index says of it and of the whole; without tensors the index alone.

        Raises:
            OSError: There is not enough space, or a file cannot be written.
        """
        if tensors is not None:
            file = f"{PREFIX}{len(self.index['shards']):05d}{SUFFIX}"
            write_shard(self.folder / file, tensors)
            self.index["shards"].append({"file": file, **entry})
        self.index |= index
        write_whole(self._index_path, json.dumps(self.index, indent=1))

    def read(self, shard: dict[str, Any], start: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of an entry of `index["shards"]`, from row `start` on; only those bytes are read."""
        with safe_open(self.folder / shard["file"], framework="pt") as tensors:
            return {name: tensors.get_slice(name)[start:] for name in tensors.keys()}  # noqa: SIM118 - no mapping
