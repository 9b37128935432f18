# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Token states mixed in memory of fixed size, filled in a thread while batches are served from it."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .activations import Place, TokenSource, TokenStates
from .rows import _mix


@dataclass
class _Block:
    """Tokens that are mixed: where they lie in the room, from which place they are, and where the next ones begin."""

    slots: torch.Tensor  # (block_tokens,) rows of the room, in the order of harvest
    begin: tuple[Place, int]  # place of a batch of the source, and tokens of it that belong to the block before
    end: tuple[Place, int]


class _Stopped(Exception):
    """Nobody wants further tokens."""


class _Filler:
    """A thread that harvests blocks one after another into a room of one block, where batches have been served.

    Args:
        source ([`TokenSource`]): Where states come from.
        begin (`tuple`): Where the first block begins, as [`_Block`] has it.
        block_tokens (`int`): Tokens of a block, and of the room.
    """

    def __init__(self, source: TokenSource, begin: tuple[Place, int], block_tokens: int):
        self.room: TokenStates | None = None
        self._source, self._begin, self._block_tokens = source, begin, block_tokens
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Block | BaseException] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.release(torch.arange(block_tokens))
        self._thread = threading.Thread(target=self._run, name="sae-harvest", daemon=True)
        self._thread.start()

    def block(self) -> _Block:
        """The next block, when it is full; what went wrong in the thread is raised here."""
        block = self._full.get()
        if isinstance(block, BaseException):
            self._full.put(block)  # for whoever asks again
            raise block
        return block

    def release(self, slots: torch.Tensor) -> None:
        """Rows of the room whose tokens have been served."""
        self._free.put(slots)

    def stop(self) -> None:
        """End the thread; a pass of the VLM that is running ends first."""
        self._stopping.set()
        self._free.put(None)
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join()

    def _run(self) -> None:
        try:
            self._fill()
        except _Stopped:
            pass
        except BaseException as error:
            self._full.put(error)

    def _fill(self) -> None:
        place, skip = self._begin
        batches = self._source.batches(place)
        place, batch = self._next(batches)
        gone, free = min(skip, len(batch)), torch.empty(0, dtype=torch.long)
        while True:
            begin, slots, wanted = (place, gone), [], self._block_tokens
            while wanted:
                if gone == len(batch):
                    place, batch = self._next(batches)
                    gone = 0
                if not len(free):
                    free = self._wait_for_free()
                taken = free[: min(wanted, len(batch) - gone)]
                self._store(taken, batch.take(slice(gone, gone + len(taken))))
                gone, wanted, free = gone + len(taken), wanted - len(taken), free[len(taken) :]
                slots.append(taken)
            self._full.put(_Block(torch.cat(slots), begin, (place, gone)))

    def _next(self, batches: Iterator[tuple[Place, TokenStates]]) -> tuple[Place, TokenStates]:
        if self._stopping.is_set():
            raise _Stopped
        return next(batches)

    def _wait_for_free(self) -> torch.Tensor:
        slots = self._free.get()
        if slots is None or self._stopping.is_set():
            raise _Stopped
        return slots

    def _store(self, slots: torch.Tensor, tokens: TokenStates) -> None:
        if self.room is None:
            shape = (self._block_tokens, tokens.states.shape[1])
            self.room = TokenStates(tokens.states.new_empty(shape), tokens.modality_ids.new_empty(shape[:1]))
        self.room.states.index_copy_(0, slots, tokens.states)
        self.room.modality_ids.index_copy_(0, slots, tokens.modality_ids)


class ActivationBuffer:
    """Mixes a block of token states and serves it in batches, while the next block is harvested in its place.

    Memory: `block_tokens` states and a harvested batch. A thread harvests; it stores tokens where others have been
    served, so that harvest and training overlap and no second block is needed.

    A block is mixed so that every batch has one token of each of as many equal runs of the block as the batch has
    tokens: neighbours never meet in one batch. Which of a run it is follows from `(seed, number of the block)`. Where
    processes share blocks out (see [`CacheShare`]), each serves its part of the same batches.

    A block follows from the place of its first token, so that the state is a few numbers; after
    [`~ActivationBuffer.load_state_dict`] it is harvested again and served on from where it was left.

    Args:
        source ([`TokenSource`]): Where states come from.
        batch_tokens (`int`): Tokens of a batch.
        block_tokens (`int`): Tokens to mix; rounded to a multiple of `batch_tokens`.
        seed (`int`, defaults to 0): Of the order.
        rank (`int`, defaults to 0): Which process this is.
    """

    def __init__(
        self,
        source: TokenSource,
        batch_tokens: int,
        block_tokens: int,
        seed: int = 0,
        rank: int = 0,
    ):
        self.source, self.batch_tokens, self.seed, self.rank = source, batch_tokens, seed, rank
        self.block_tokens = whole_batches(block_tokens, batch_tokens)
        self._stop = None
        self.load_state_dict({"block": 0, "served": 0, "epoch": 0, "start": 0, "skip": 0})

    @property
    def place(self) -> Place:
        """Where the current block begins: its first batch is `place`, less `skip` tokens."""
        return self._begin[0]

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from; a handful of numbers."""
        (epoch, start), skip = self._begin
        return {"block": self._number, "served": self._served, "epoch": epoch, "start": start, "skip": skip}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state; the next batch harvests the block again."""
        self.close()
        self._number, self._served = state["block"], state["served"]
        self._begin = (state["epoch"], state["start"]), state["skip"]

    def close(self) -> None:
        """Stop harvesting and give the memory back; the next batch begins again where this one was left."""
        if self._stop is not None:
            self._stop()
        self._filler: _Filler | None = None
        self._block: _Block | None = None
        self._order: torch.Tensor | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> dict[str, torch.Tensor]:
        """`hidden_states` `(batch_tokens, d_in)` and `modality_ids` `(batch_tokens,)`."""
        self._make_ready()
        slots = self._block.slots[self._order[self._served // self.batch_tokens]]
        batch = self._filler.room.take(slots)  # a copy
        self._filler.release(slots)
        self._served += self.batch_tokens
        if self._served == self.block_tokens:  # the next block begins where this one ended
            self._number, self._served, self._begin, self._block = self._number + 1, 0, self._block.end, None
        return {"hidden_states": batch.states, "modality_ids": batch.modality_ids.long()}

    def block(self, tokens: int | None = None) -> TokenStates:
        """The block that the next batch is taken from, or its first tokens, in the order of harvest.

        Where batches of it have been served, others may stand in their place.
        """
        self._make_ready()
        return self._filler.room.take(self._block.slots[:tokens])

    def _make_ready(self) -> None:
        if self._filler is None:
            self._filler = _Filler(self.source, self._begin, self.block_tokens)
            self._stop = weakref.finalize(self, self._filler.stop)  # also where the program ends
        if self._block is None:
            self._block = self._filler.block()
            self._begin = self._block.begin
            self._order = self._mixed(self._number)
            if self._served:  # before this run
                self._filler.release(self._block.slots[self._order[: self._served // self.batch_tokens].flatten()])

    def _mixed(self, number: int) -> torch.Tensor:
        """Tokens of each batch of a block, `(batches, batch_tokens)`: one of each run."""
        run = self.block_tokens // self.batch_tokens
        generator = torch.Generator().manual_seed(_mix(self.seed, number))
        for _ in range(self.rank + 1):  # one process would draw for all, one after another
            drawn = torch.rand(self.batch_tokens, run, generator=generator, dtype=torch.float64)
        within = drawn.argsort(dim=1, stable=True)  # (batch_tokens, run)
        return (within + run * torch.arange(self.batch_tokens)[:, None]).T


def whole_batches(tokens: int, batch_tokens: int) -> int:
    """So many tokens, rounded to whole batches; one at least."""
    return max(1, round(tokens / batch_tokens)) * batch_tokens


__all__ = ["ActivationBuffer", "whole_batches"]
