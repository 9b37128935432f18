# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors on disk in safetensors shards, each there whole or not at all: under the caches of embeddings and states."""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from transformers.utils import logging

from ..files import PART_SUFFIX, SAFETENSORS_PART, free_space, json_digest, whole_file
from .folders import AnyFolder

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I64": torch.int64,
}
PREFIX, SUFFIX, INDEX = "shard-", ".safetensors", "index.json"
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
    """Shards in an order, with an index, in a folder or behind a URL; whoever writes them goes on later.

    The folder holds `shard-00000.safetensors` and so on, and `index.json`. A shard is written before the index that
    names it: whenever the process dies, the index names whole shards only. Each shard says under which key it was
    made, so that none is read as another's where two runs wrote one folder.

    Args:
        folder (`str` or `os.PathLike`): Path, or URL of whatever fsspec reads and writes; made when the first shard is
            written.
        key (`dict`): What the tensors depend on.
        **index: What the index of an empty folder says beside `key` and `shards`.

    Raises:
        ValueError: The folder was filled under another key; says what differs.
    """

    def __init__(self, folder: str | os.PathLike, key: dict[str, Any], **index: Any):
        self.folder = AnyFolder(folder)
        key = json.loads(json.dumps(key))  # as it comes back from the index
        self.index = self._empty = {"key": key, "shards": [], **index}
        self._metadata = {"key": json_digest(key)}
        self._headers: dict[str, tuple[dict[str, Any], int]] = {}
        self.read_index()

    def read_index(self) -> None:
        """Take the index as it is in the folder now, where there is one.

        Raises:
            ValueError: It is damaged, or belongs to another key.
        """
        remedy = f"delete the folder {self.folder.target}, or give another one"
        found = self.folder.read_json(INDEX, remedy)
        if found is None:
            return
        wrong = [name for name, value in self._empty.items() if not isinstance(found.get(name), type(value))]
        if wrong or not all(isinstance(shard, dict) and "file" in shard for shard in found["shards"]):
            raise ValueError(
                f"{self.folder.path(INDEX)} is damaged ({', '.join(wrong) or 'shards'}), or was written by another "
                f"version; {remedy}."
            )
        self._check_key(self._empty["key"], found["key"])
        self.index = found

    def _check_key(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        other = [name for name in {**key, **found} if key.get(name) != found.get(name)]
        if other:
            shown = "; ".join(f"{name} is {found.get(name)!r} there and {key.get(name)!r} here" for name in other)
            raise ValueError(
                f"the cache {self.folder.target} was made for something else: {shown}. Delete the folder or give "
                "another one."
            )

    def write(self, number: int, tensors: dict[str, torch.Tensor]) -> str:
        """Write a shard that the index does not name yet, and return the name of its file.

        Raises:
            OSError: There is not enough space, or the file cannot be written.
        """
        file = f"{PREFIX}{number:05d}{SUFFIX}"
        if self.folder.local is not None:
            write_shard(self.folder.local / file, tensors, self._metadata)
        else:
            self.folder.write(file, save(tensors, self._metadata))
        return file

    def name(self, entries: list[dict[str, Any]], **index: Any) -> None:
        """Name written shards in the index, and what it says of the whole.

        Args:
            entries (`list[dict]`): `file`, from [`~NumberedShards.write`], and whatever is to be said of a shard.
            **index: What else changes.

        Raises:
            OSError: The index cannot be written, or a shard is not there: another process sees another folder.
        """
        for entry in entries:
            if not self.folder.holds(entry["file"]):
                raise FileNotFoundError(
                    errno.ENOENT,
                    "a shard that another process has written is not there for this one; all processes must see the "
                    "same folder: name one on a disk that they share, or a URL",
                    self.folder.path(entry["file"]),
                )
        self.index = self.index | index | {"shards": [*self.index["shards"], *entries]}
        self.folder.write(INDEX, json.dumps(self.index, indent=1).encode())

    def remove_unnamed(self) -> None:
        """Remove shards that the index does not name, and parts of shards: a killed run left them."""
        named = {shard["file"] for shard in self.index["shards"]}
        found = {path.rsplit("/", 1)[-1] for path in self.folder.find(f"{PREFIX}*{SUFFIX}")}
        for file in found - named:
            self.folder.remove(file)
        if self.folder.local is not None:
            for path in self.folder.local.glob(SAFETENSORS_PART):
                path.unlink(missing_ok=True)

    def read(
        self, shard: dict[str, Any], start: int = 0, stop: int | None = None, names: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Rows `start` to `stop` of the tensors of an entry of `index["shards"]`; only those bytes are read.

        Args:
            names (`Collection[str]`, *optional*): Of the tensors that are wanted; all when left out.

        Raises:
            ValueError: The shard that the index names is not there, or is no whole one.
        """
        file = shard["file"]
        try:
            with self.folder.open(file) as stream:
                header, first_byte = self._header(file, stream)
                names = header.keys() - {"__metadata__"} if names is None else names
                return {name: _read_rows(stream, header[name], first_byte, start, stop) for name in names}
        except (FileNotFoundError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"{self.folder.path(file)}, which the index names, cannot be read ({type(error).__name__}: {error}); "
                f"delete the folder {self.folder.target}, or give another one."
            ) from error

    def num_rows(self, shard: dict[str, Any], name: str) -> int:
        """Rows of a tensor of a shard, by the shard itself."""
        self.read(shard, 0, 0, [name])
        return self._headers[shard["file"]][0][name]["shape"][0]

    def _header(self, file: str, stream: BinaryIO) -> tuple[dict[str, Any], int]:
        """What a safetensors file says of its tensors, and where the first byte of them is."""
        if file not in self._headers:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            if not isinstance(header, dict) or header.get("__metadata__") != self._metadata:
                raise ValueError("it was made for something else than the index says")
            self._headers[file] = header, 8 + length
        return self._headers[file]


def _read_rows(
    stream: BinaryIO, tensor: dict[str, Any], first_byte: int, start: int, stop: int | None
) -> torch.Tensor:
    """Rows of a tensor of a safetensors file, by its entry in the header."""
    num_rows, *row = tensor["shape"]
    start, stop, _ = slice(start, stop).indices(num_rows)
    rows = torch.empty(max(0, stop - start), *row, dtype=STORED_DTYPES[tensor["dtype"]])
    if rows.numel():
        stream.seek(first_byte + tensor["data_offsets"][0] + start * rows[0].nbytes)
        room = memoryview(rows.view(-1).view(torch.uint8).numpy())
        while room:
            count = stream.readinto(room)
            if not count:
                raise EOFError(f"{len(room):,} bytes are missing")
            room = room[count:]
    return rows


__all__ = ["NumberedShards", "TensorShards", "check_dtype", "gib", "write_shard"]
