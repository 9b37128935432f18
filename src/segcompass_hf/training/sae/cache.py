"""Activations kept on disk: read once from the VLM, trained on many times."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...data.tensor_shards import DTYPES, NumberedShards, check_dtype
from ...files import free_space, weights_digest
from ...locks import alone_with
from .activations import HarvestedTokens, Place, TokenStates

logger = logging.get_logger(__name__)

SAMPLE_ROWS = 32  # rows read to estimate the tokens of a row


def cache_bytes(num_tokens: int, d_in: int, dtype: str = "bfloat16") -> int:
    """Size on disk of the states of so many tokens, with one byte each for the modality.

    Example:

    >>> cache_bytes(1_000_000, d_in=4096, dtype="bfloat16")
    8193000000
    """
    return num_tokens * (d_in * DTYPES[dtype].itemsize + 1)


def estimate_tokens(source: HarvestedTokens) -> int | None:
    """Tokens of one epoch of one process, from the mean of its first rows; `None` for a stream without a length."""
    num_rows = source.stream.rows_per_epoch
    if num_rows is None:
        return None
    counts = []
    for row in itertools.islice(source.stream.rows(0), SAMPLE_ROWS):
        inputs = source.harvester.encoder([row])
        counts.append(0 if inputs is None else int(source.harvester.counted_tokens(inputs).sum()))
    return round(sum(counts) / max(1, len(counts)) * num_rows)


def cache_key(source: HarvestedTokens) -> dict[str, Any]:
    """What the cached states depend on: VLM and all its weights, layer, data set, and how rows become inputs.

    Of a data set that has no fingerprint and is no list of rows, the length and the first row must do.
    """
    harvester, stream = source.harvester, source.stream
    first = next(iter(stream.rows(0)), None)
    inputs = None if first is None else harvester.encoder([first])
    return {
        "vlm": getattr(harvester.vlm.config, "_name_or_path", "") or type(harvester.vlm).__name__,
        "vlm_weights": weights_digest(harvester.vlm),
        "layer": harvester.layer,
        "dataset": _dataset_digest(stream.dataset) or str(stream.rows_per_epoch),
        "first_row": None if inputs is None else _inputs_digest(inputs),
        "order_seed": stream.seed,
        "hold_out_every": stream.hold_out_every,
        "process": f"{stream.rank} of {stream.world_size}",
        "drop_first_token": harvester.drop_first_token,
        "max_length": harvester.encoder.max_length,
    }


def _dataset_digest(dataset: Any) -> str | None:
    """The fingerprint of a `datasets` data set, or what comes to the same for a list of rows."""
    fingerprint = getattr(dataset, "_fingerprint", None)
    if fingerprint or not isinstance(dataset, (list, tuple)):
        return fingerprint
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    for row in dataset:
        hasher.update(row)
    return hasher.hexdigest()


def _inputs_digest(inputs: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(inputs.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


class ActivationCache:
    """States of one pass over the data on disk, as a [`TokenSource`].

    The folder holds [`NumberedShards`] of `states` and `modality_ids`: whenever the process dies, the index names
    whole shards only, and [`~ActivationCache.fill`] goes on after the last of them.

    Args:
        folder (`str` or `os.PathLike`): Where; made when missing.
        key (`dict`): From [`cache_key`]. A folder filled under another key is refused.
        dtype (`str`, defaults to `"bfloat16"`): `float32`, `float16` or `bfloat16`.
        shard_tokens (`int`, defaults to 65536): Tokens of a shard, at least; a harvested batch is never split.

    Raises:
        ValueError: The folder holds activations of another VLM, layer, data set or setting; says which.
    """

    def __init__(
        self, folder: str | os.PathLike, key: dict[str, Any], dtype: str = "bfloat16", shard_tokens: int = 65_536
    ):
        check_dtype(dtype)
        self.folder, self.dtype, self.shard_tokens = Path(folder), dtype, shard_tokens
        self.shards = NumberedShards(self.folder, key | {"dtype": dtype}, next_row=0, complete=False)

    @property
    def index(self) -> dict[str, Any]:
        """What `index.json` says: `key`, `shards` with their `tokens`, `next_row`, `complete`."""
        return self.shards.index

    @property
    def complete(self) -> bool:
        """Whether everything that was to be cached is."""
        return self.index["complete"]

    @property
    def num_tokens(self) -> int:
        """Tokens in whole shards."""
        return sum(shard["tokens"] for shard in self.index["shards"])

    def fill(self, source: HarvestedTokens, d_in: int, max_tokens: int | None = None) -> None:
        """Harvest what is still missing of the first epoch, or of its first `max_tokens`.

        Filled before up to a smaller limit, it goes on after that; filled beyond `max_tokens`, it stays as it is. The
        size is announced before anything is written.

        Raises:
            OSError: The disk has less space than the states will take.
            ValueError: Neither the data set's length nor `max_tokens` is known, or `dtype` cannot hold the states.
            FileExistsError: Another process is filling it.
        """
        if self.complete and not self._reaches_further(max_tokens):
            return
        self._announce(source, d_in, max_tokens)
        self.folder.mkdir(parents=True, exist_ok=True)
        refusal = (
            f"another process is filling the activation cache {self.folder}; wait for it, or name another folder."
        )
        with alone_with(self.folder / ".lock", refusal):
            self._fill(source, max_tokens)

    def _fill(self, source: HarvestedTokens, max_tokens: int | None) -> None:
        parts: list[TokenStates] = []
        limit = float("inf") if max_tokens is None else max_tokens
        row, stopped_at = self.index["next_row"], None
        for (_, row), batch in source.epoch_batches(0, self.index["next_row"]):  # noqa: B007, needed after the loop
            if sum(map(len, parts)) >= self.shard_tokens:
                self._write_shard(parts, next_row=row)
                parts = []
            if self.num_tokens + sum(map(len, parts)) >= limit:
                stopped_at = max_tokens
                break
            parts.append(batch)
        self.index["stopped_at"] = stopped_at
        self._write_shard(parts, next_row=row, complete=True)

    def _reaches_further(self, max_tokens: int | None) -> bool:
        """Whether a complete cache was stopped by a limit before the end of the epoch, and this one is beyond it."""
        stopped_at = self.index.get("stopped_at")  # caches of older versions do not say; they stay as they are
        return stopped_at is not None and (max_tokens is None or max_tokens > max(stopped_at, self.num_tokens))

    def batches(self, place: Place) -> Iterator[tuple[Place, TokenStates]]:
        """The cached tokens, epoch after epoch, a shard at a time."""
        if not self.num_tokens:
            raise ValueError(f"the cache {self.folder} holds no token; fill it first.")
        for epoch in itertools.count(place[0]):
            skip, first = (place[1] if epoch == place[0] else 0), 0
            for shard in self.index["shards"]:
                inside = max(0, skip - first)
                if inside < shard["tokens"]:
                    yield (epoch, first + inside), TokenStates(**self.shards.read(shard, inside))
                first += shard["tokens"]

    def _announce(self, source: HarvestedTokens, d_in: int, max_tokens: int | None) -> None:
        estimate = estimate_tokens(source)
        expected = min((n for n in (estimate, max_tokens) if n is not None), default=None)
        if expected is None:
            raise ValueError(
                "the data set is a stream without a length, so the size of its cache is unknown; set "
                "cache_max_tokens, or train without a cache."
            )
        missing = cache_bytes(max(0, expected - self.num_tokens), d_in, self.dtype)
        free = free_space(self.folder)
        logger.warning(
            f"activation cache {self.folder}: about {expected:,} tokens of {d_in} x {self.dtype}, "
            f"{cache_bytes(expected, d_in, self.dtype) / 2**30:.2f} GiB, of which {missing / 2**30:.2f} GiB are still "
            f"to be written; {free / 2**30:.2f} GiB are free."
        )
        if missing > free:
            raise OSError(
                f"the activation cache still needs about {missing / 2**30:.2f} GiB and {self.folder} has "
                f"{free / 2**30:.2f} GiB; free space, lower cache_max_tokens, use another cache_dir, or train without."
            )

    def _write_shard(self, parts: list[TokenStates], next_row: int, complete: bool = False) -> None:
        tensors, entry = None, {}
        if parts:
            states = torch.cat([part.states for part in parts]).to(DTYPES[self.dtype])  # (tokens, d_in)
            if not states.isfinite().all():
                raise ValueError(
                    f"{int((~states.isfinite()).any(1).sum())} states are not finite in {self.dtype}: use "
                    "cache_dtype='bfloat16' or 'float32', or look for NaN in the VLM's weights."
                )
            tensors = {"states": states, "modality_ids": torch.cat([part.modality_ids for part in parts])}
            entry = {"tokens": len(states)}
        self.shards.append(tensors, entry, next_row=next_row, complete=complete)


__all__ = ["ActivationCache", "cache_bytes", "cache_key", "estimate_tokens"]
