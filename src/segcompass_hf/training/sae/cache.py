"""Activations kept in a folder or behind a URL: read once from the VLM, trained on many times."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ...data.tensor_shards import NumberedShards, check_dtype
from .activations import HarvestedTokens, Place, TokenStates
from .cache_filling import fill_cache, state_name

READ_TOKENS = 8192  # read at a time
SETTINGS = {"layers": [], "rows_per_shard": 0, "next_shard": 0, "ended_sections": [], "complete": False}


class ActivationCache:
    """States of one pass over the data, as a [`TokenSource`].

    The folder holds [`NumberedShards`] of the states of one layer or several and of `modality_ids`. A shard has the
    tokens of so many rows, so that what is in it does not depend on how many processes filled the cache: of the shards
    that are missing, process r of n makes every n-th. Whenever one dies, the index names whole shards only, and
    [`~ActivationCache.fill`] goes on after the last of them, with whatever number of processes. Any number of
    processes reads a cache, see [`CacheShare`].

    Args:
        folder (`str` or `os.PathLike`): Path, or URL of whatever fsspec reads and writes; made when missing.
        key (`dict`): From [`cache_key`]; its `layer` is the one that is read. A folder filled under another key is
            refused.
        dtype (`str`, defaults to `"bfloat16"`): `float32`, `float16` or `bfloat16`.
        shard_tokens (`int`, defaults to 65536): Tokens of a shard, about.
        layers (`Sequence[int]`, *optional*): All layers whose states a new cache keeps, out of the same passes.

    Raises:
        ValueError: The folder holds activations of another VLM, layer, data set or setting (says which), is damaged,
            or was filled by an older version.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        key: dict[str, Any],
        dtype: str = "bfloat16",
        shard_tokens: int = 65_536,
        layers: Sequence[int] = (),
    ):
        check_dtype(dtype)
        self.dtype, self.shard_tokens, self.layer = dtype, shard_tokens, key["layer"]
        self._wanted = sorted({self.layer, *layers})
        key = {name: value for name, value in key.items() if name != "layer"} | {"dtype": dtype}
        self.shards = NumberedShards(folder, key, **SETTINGS | {"layers": self._wanted})
        self.folder = self.shards.folder.target
        self._checked: set[str] = set()  # files that hold what the index says
        self._check_index()

    def read_index(self) -> None:
        """Take the index as it is in the folder now; raises what the constructor does."""
        self.shards.read_index()
        self._check_index()

    def _check_index(self) -> None:
        remedy = f"Delete the folder {self.folder} or give another one"
        missing = [layer for layer in self._wanted if layer not in self.index["layers"]]
        if missing:
            raise ValueError(
                f"the cache {self.folder} holds the states of layer {_listed(self.index['layers'])}, and those of "
                f"layer {_listed(missing)} are wanted. {remedy}; cache_layers names several layers for one harvest."
            )
        if not self.index["shards"] and (old := self.shards.folder.find("process-*/index.json")):
            raise ValueError(
                f"{old[0]} is part of a cache of an older version, which had a folder for each process and cannot be "
                f"read any more. {remedy}."
            )

    @property
    def index(self) -> dict[str, Any]:
        """What `index.json` says: `key`, `layers`, `shards` with their `tokens`, `complete`, and where to fill on."""
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
        """Harvest what is still missing of the first epoch, or of its first `max_tokens`; see [`fill_cache`].

        Filled before up to a smaller limit, it goes on after that; filled beyond `max_tokens`, it stays as it is.
        With several processes every one calls this, and all return when the cache is filled.
        """
        fill_cache(self, source, d_in, max_tokens)

    def holds(self, max_tokens: float) -> bool:
        """Whether the cache has the whole epoch, or so many tokens of it at least as were asked for."""
        stopped_at = self.index.get("stopped_at")  # a limit, where one came before the end of the epoch
        return self.complete and (stopped_at is None or max_tokens <= max(stopped_at, self.num_tokens))

    def batches(self, place: Place) -> Iterator[tuple[Place, TokenStates]]:
        """The cached tokens, epoch after epoch."""
        start = place[0] * self.num_tokens + place[1]
        for first in itertools.count(start, READ_TOKENS):
            yield from self.tokens(first, first + READ_TOKENS)

    def tokens(self, start: int, stop: int) -> Iterator[tuple[Place, TokenStates]]:
        """Tokens `start` to `stop` of the endless sequence of epochs, at most `READ_TOKENS` at a time.

        Raises:
            ValueError: The cache holds none, or a shard is not what the index says.
        """
        if not self.num_tokens:
            raise ValueError(f"the cache {self.folder} holds no token; fill it first.")
        epoch, place = divmod(start, self.num_tokens)
        wanted = stop - start
        while wanted > 0:
            first = 0
            for shard in self.index["shards"]:
                while wanted > 0 and place < first + shard["tokens"]:
                    inside = place - first
                    taken = min(wanted, READ_TOKENS, shard["tokens"] - inside)
                    yield (epoch, place), self._read(shard, inside, inside + taken)
                    place, wanted = place + taken, wanted - taken
                first += shard["tokens"]
            epoch, place = epoch + 1, 0

    def _read(self, shard: dict[str, Any], start: int, stop: int) -> TokenStates:
        names = state_name(self.layer), "modality_ids"
        if shard["file"] not in self._checked:
            held = [self.shards.num_rows(shard, name) for name in names]
            if held != [shard["tokens"]] * 2:
                raise ValueError(
                    f"{shard['file']} of the cache {self.folder} holds {held[0]} states and {held[1]} modality ids, "
                    f"and its index says {shard['tokens']} tokens; delete the folder, or give another one."
                )
            self._checked.add(shard["file"])
        found = self.shards.read(shard, start, stop, names)
        return TokenStates(*(found[name] for name in names))


class CacheShare:
    """One process's part of a cache, as a [`TokenSource`] of an [`ActivationBuffer`].

    Blocks are runs of `world_size * block_tokens` tokens of the cache, one after another, and process r reads the r-th
    part of each and nothing else. The buffer mixes so that the parts of a batch that the processes serve are together
    the batch that one process would serve: what is trained on does not depend on the number of processes, as long as
    batches and blocks are as large together.

    Args:
        cache ([`ActivationCache`]): Filled.
        rank, world_size (`int`): Which process of how many.
        block_tokens (`int`): Tokens of this process's part of a block.
    """

    def __init__(self, cache: ActivationCache, rank: int, world_size: int, block_tokens: int):
        self.cache, self.rank, self.world_size, self.block_tokens = cache, rank, world_size, block_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, of all processes."""
        return self.cache.num_tokens

    def batches(self, place: Place) -> Iterator[tuple[Place, TokenStates]]:
        """Tokens of this process's parts from `place` on, which no batch reaches across."""
        position = place[0] * self.num_tokens + place[1]
        for block in itertools.count(position // (self.world_size * self.block_tokens)):
            own = (block * self.world_size + self.rank) * self.block_tokens
            yield from self.cache.tokens(max(position, own), own + self.block_tokens)

    def first(self, tokens: int) -> TokenStates:
        """The beginning of the first block of all processes, the same in every process."""
        tokens = min(tokens, self.world_size * self.block_tokens)
        return TokenStates.joined([part for _, part in self.cache.tokens(0, tokens)])


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


__all__ = ["ActivationCache", "CacheShare"]
