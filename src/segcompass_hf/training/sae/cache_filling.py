# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How an activation cache is filled: its key, its size, and its shards, which processes share out."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from ...data.tensor_shards import DTYPES
from ...files import free_space, weights_digest
from ...locks import alone_with
from .activations import HarvestedTokens, TokenStates
from .rows import RowStream

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
SAMPLE_ROWS = 32  # rows read to estimate the tokens of a row
FEWEST_SHARDS = 16  # of a data set that has so many batches of rows: as many processes can share them out


def cache_bytes(num_tokens: int, d_in: int, dtype: str = "bfloat16", num_layers: int = 1) -> int:
    """Size on disk of the states of so many tokens at so many layers, with one byte each for the modality.

    Example:

    >>> cache_bytes(1_000_000, d_in=4096, dtype="bfloat16")
    8193000000
    """
    return num_tokens * (d_in * DTYPES[dtype].itemsize * num_layers + 1)


def state_name(layer: int) -> str:
    """Of the tensor of a shard that holds a layer's states."""
    return f"states_{layer}"


def tokens_per_row(source: HarvestedTokens) -> float:
    """Mean of the first rows of the data set, whichever process reads them."""
    counts = []
    for row in source.stream.section_rows(0, epoch=0, stop=SAMPLE_ROWS):
        inputs = source.harvester.encoder([row])
        counts.append(0 if inputs is None else int(source.harvester.counted_tokens(inputs).sum()))
    return sum(counts) / max(1, len(counts))


def estimate_tokens(source: HarvestedTokens) -> int | None:
    """Tokens of one epoch of all processes, from the mean of its first rows; `None` for a stream without a length."""
    num_rows = source.stream.num_rows
    return None if num_rows is None else round(tokens_per_row(source) * num_rows)


def cache_key(source: HarvestedTokens) -> dict[str, Any]:
    """What the cached states depend on: VLM and all its weights, layer, data set, and how rows become inputs.

    Of a data set that has no fingerprint and is no list of rows, the length and the first row must do.
    """
    harvester, stream = source.harvester, source.stream
    first = next(stream.section_rows(0, epoch=0), None)
    inputs = None if first is None else harvester.encoder([first])
    origin = harvester.state_source.origin
    return {
        "vlm": getattr(harvester.vlm.config, "_name_or_path", "") or type(harvester.vlm).__name__,
        "vlm_weights": weights_digest(harvester.vlm),
        "layer": harvester.layer,
        "dataset": _dataset_digest(stream.dataset) or str(stream.num_rows),
        "first_row": None if inputs is None else _inputs_digest(inputs),
        "sections": stream.num_sections,
        "order_seed": stream.seed,
        "hold_out_every": stream.hold_out_every,
        "drop_first_token": harvester.drop_first_token,
        "max_length": harvester.encoder.max_length,
        **({} if origin is None else {"state_source": origin}),
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


def fill_cache(cache: Any, source: HarvestedTokens, d_in: int, max_tokens: int | None) -> None:
    """Harvest the shards that are missing of a cache; every process calls this, and they share the shards out.

    The main process decides whether any are, and the others go on from the index that it has read. The size is
    announced before anything is written.

    Args:
        cache ([`ActivationCache`]): To be filled.
        source ([`HarvestedTokens`]): Rows, VLM, and which process of how many this is.
        d_in (`int`): Width of a state.
        max_tokens (`int`, *optional*): Stop with the shard that reaches so many.

    Raises:
        OSError: The disk has less space than the states will take, or the processes see different folders.
        ValueError: Neither the data set's length nor `max_tokens` is known, or the dtype cannot hold the states.
        FileExistsError: Another run is filling it.
        RuntimeError: It failed in another process.
    """
    with ExitStack() as held:
        filling = _Filling(cache, source, math.inf if max_tokens is None else max_tokens)
        (cache.shards.index, *_) = in_every_process(lambda: filling.begin(d_in, held), source.stream.world_size)
        while not cache.complete:
            filling.go_on()


class _Filling:
    """The rounds in which a cache is filled: one shard of each process, then the index."""

    def __init__(self, cache: Any, source: HarvestedTokens, max_tokens: float):
        self.cache, self.source, self.max_tokens = cache, source, max_tokens
        self.stream, self.rows = source.stream, _SectionRows(source.stream)

    def begin(self, d_in: int, held: ExitStack) -> dict[str, Any] | None:
        """The index to go on from, from the main process; if there is something to fill, it then holds the cache."""
        cache, folder = self.cache, self.cache.shards.folder
        if self.stream.rank != 0:
            return None
        if cache.holds(self.max_tokens):
            return cache.index
        row_tokens = tokens_per_row(self.source)
        self._announce(row_tokens, d_in)  # before a folder is made
        if folder.local is not None:
            folder.local.mkdir(parents=True, exist_ok=True)
            refusal = (
                f"another process is filling the activation cache {folder.target}; wait for it, or name another "
                "folder."
            )
            held.enter_context(alone_with(folder.local / ".lock", refusal))
        cache.read_index()  # another run may have filled it meanwhile
        if cache.holds(self.max_tokens):
            return cache.index
        rows_per_shard = cache.index["rows_per_shard"] or self._rows_per_shard(row_tokens)
        return cache.index | {"rows_per_shard": rows_per_shard, "complete": False}

    def _rows_per_shard(self, row_tokens: float) -> int:
        """So many batches of rows that a shard has about `shard_tokens` tokens, and all processes have one."""
        batch = self.source.rows_per_batch
        batches = max(1, round(self.cache.shard_tokens / (row_tokens * batch))) if row_tokens else 1
        if self.stream.num_rows is not None:
            batches = min(batches, math.ceil(self.stream.num_rows / (batch * FEWEST_SHARDS)))
        return batch * batches

    def _announce(self, row_tokens: float, d_in: int) -> None:
        cache, folder = self.cache, self.cache.shards.folder
        expected = min(
            self.max_tokens, math.inf if self.stream.num_rows is None else row_tokens * self.stream.num_rows
        )
        if expected == math.inf:
            raise ValueError(
                "the data set is a stream without a length, so the size of its cache is unknown; set "
                "cache_max_tokens, or train without a cache."
            )
        expected, size = round(expected), (d_in, cache.dtype, len(cache.index["layers"]))
        missing = cache_bytes(max(0, expected - cache.num_tokens), *size)
        free = math.inf if folder.local is None else free_space(folder.local)
        layers = f" of {size[2]} layers" if size[2] > 1 else ""
        logger.warning(
            f"activation cache {folder.target}: about {expected:,} tokens of {d_in} x {cache.dtype}{layers}, "
            f"{cache_bytes(expected, *size) / 2**30:.2f} GiB, of which {missing / 2**30:.2f} GiB are still "
            f"to be written" + ("." if folder.local is None else f"; {free / 2**30:.2f} GiB are free.")
        )
        if missing > free:
            raise OSError(
                f"the activation cache still needs about {missing / 2**30:.2f} GiB and {folder.target} has "
                f"{free / 2**30:.2f} GiB; free space, lower cache_max_tokens, use another cache_dir, or train without."
            )

    def go_on(self) -> None:
        """Make the next shard of every process, and name those up to the limit in the index."""
        index, stream = self.cache.index, self.stream
        ended = set(index["ended_sections"])
        open_shards = (n for n in itertools.count(index["next_shard"]) if n % stream.num_sections not in ended)
        numbers = [] if len(ended) == stream.num_sections else list(itertools.islice(open_shards, stream.world_size))
        if not numbers:
            self._name([], complete=True, stopped_at=None)
            return
        own = numbers[stream.rank]
        made = in_every_process(lambda: self._make(own), stream.world_size)
        entries, tokens, next_shard = [], self.cache.num_tokens, index["next_shard"]
        for number, (entry, section_ends) in zip(numbers, made, strict=True):
            if tokens >= self.max_tokens:
                break
            if section_ends:
                ended.add(number % stream.num_sections)
            if entry is not None or not section_ends:  # beyond the end the number of processes would show
                next_shard = number + 1
            if entry is not None:
                entries.append(entry)
                tokens += entry["tokens"]
        limit = {"complete": True, "stopped_at": self.max_tokens} if tokens >= self.max_tokens else {}
        self._name(entries, next_shard=next_shard, ended_sections=sorted(ended), **limit)

    def _make(self, number: int) -> tuple[dict[str, Any] | None, bool]:
        """Harvest and write a shard: its entry of the index, without tokens none, and whether its section ends."""
        rows_per_shard = self.cache.index["rows_per_shard"]
        section, piece = number % self.stream.num_sections, number // self.stream.num_sections
        rows = self.rows.take(section, piece * rows_per_shard, rows_per_shard)
        num_rows, parts = 0, []
        while batch := list(itertools.islice(rows, self.source.rows_per_batch)):
            num_rows += len(batch)
            found = self.source.harvester.of_layers(batch, self.cache.index["layers"])
            if found is not None and len(found[0]):
                parts.append(found)
        entry = None
        if parts:
            layers = [TokenStates.joined(of_layer) for of_layer in zip(*parts, strict=True)]
            tensors = {
                state_name(layer): self._stored(tokens.states)
                for layer, tokens in zip(self.cache.index["layers"], layers, strict=True)
            }
            file = self.cache.shards.write(number, tensors | {"modality_ids": layers[0].modality_ids})
            entry = {"file": file, "tokens": len(layers[0])}
        return entry, num_rows < rows_per_shard

    def _stored(self, states: torch.Tensor) -> torch.Tensor:
        dtype = self.cache.dtype
        states = states.to(DTYPES[dtype])  # (tokens, d_in)
        if not states.isfinite().all():
            raise ValueError(
                f"{int((~states.isfinite()).any(1).sum())} states are not finite in {dtype}: use "
                "cache_dtype='bfloat16' or 'float32', or look for NaN in the VLM's weights."
            )
        return states

    def _name(self, entries: list[dict[str, Any]], **index: Any) -> None:
        """Bring the index up to date, in the folder and in every process; of a full cache nothing else is left."""
        shards = self.cache.shards

        def write() -> dict[str, Any] | None:
            if self.stream.rank != 0:
                return None
            shards.name(entries, **index)
            if shards.index["complete"]:
                shards.remove_unnamed()
            return shards.index

        (shards.index, *_) = in_every_process(write, self.stream.world_size)


class _SectionRows:
    """Runs of rows of the first epoch; a stream that is read on is not opened anew."""

    def __init__(self, stream: RowStream):
        self._stream = stream
        self._open: dict[int, tuple[int, Iterator[tuple[int, dict]]]] = {}  # section -> next row, rows

    def take(self, section: int, start: int, count: int) -> Iterator[tuple[int, dict]]:
        """`count` rows of a section from the `start`-th on; to be read before the next are taken."""
        if self._stream.is_map_style:
            return self._stream.section_rows(section, 0, start, start + count)
        at, rows = self._open.pop(section, (0, None))
        if rows is None or at > start:
            at, rows = 0, self._stream.section_rows(section, 0)
        self._open[section] = start + count, rows
        return itertools.islice(rows, start - at, start - at + count)


def in_every_process(work: Callable[[], Result], world_size: int) -> list[Result]:
    """What `work` returns in each of the processes; where it fails in one, it fails in all.

    Raises:
        RuntimeError: It failed in another process; says in which, and why.
    """
    if world_size == 1:
        return [work()]
    error = result = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    outcomes: list[Any] = [None] * world_size
    said = None if error is None else f"{type(error).__name__}: {error}"
    torch.distributed.all_gather_object(outcomes, (result, said))
    if error is not None:
        raise error
    for rank, (_, said) in enumerate(outcomes):
        if said is not None:
            raise RuntimeError(f"process {rank} failed: {said}")
    return [result for result, _ in outcomes]


__all__ = ["cache_bytes", "cache_key", "estimate_tokens", "fill_cache", "in_every_process", "state_name"]
