# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""States of words and of the patches of what they name, for the pair losses of SAE training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...images_segcompass import to_rgb_image
from ...token_places import Name, target_names
from ..alignment.names import TokenPairs
from .activations import ActivationHarvester, layer_states
from .rows import RowStream, _mix


class NamedStates(NamedTuple):
    """A batch of pairs.

    Args:
        words, patches (`torch.Tensor` of shape `(pairs, d_in)`): States of a word's last token and of one patch that
            shows what it names.
        name_ids (`torch.LongTensor` of shape `(pairs,)`): Equal for equal words.
    """

    words: torch.Tensor
    patches: torch.Tensor
    name_ids: torch.Tensor


class PairBuffer:
    """Harvests pairs from a block of rows, draws batches from it, harvests the next block.

    Every name of a row is drawn as often as any other, then one of its words and one of its patches. What is drawn
    follows from the seed and the number of the batch: the state is a few numbers, and a run that is taken up again
    harvests its block again.

    Args:
        harvester ([`ActivationHarvester`]): VLM, layer and encoder.
        stream ([`RowStream`]): Rows in the row schema with masks; interleaved ones and rows without names are passed
            over.
        names (`Callable`): Row -> its [`Name`]s.
        pairs (`int`): Pairs of a batch.
        block_rows (`int`): Rows of a block.
        rows_per_batch (`int`): Rows of one pass through the VLM.
        seed (`int`): Of the draws.
        block_batches (`int`): Batches drawn from a block.
    """

    def __init__(
        self,
        harvester: ActivationHarvester,
        stream: RowStream,
        names: Callable[[dict], list[Name]] = target_names,
        pairs: int = 512,
        block_rows: int = 256,
        rows_per_batch: int = 8,
        seed: int = 0,
        block_batches: int = 64,
    ):
        self.harvester, self.stream, self.pairs = harvester, stream, pairs
        self.marks = TokenPairs(harvester.encoder.processor, names)
        self.block_rows, self.rows_per_batch, self.block_batches = block_rows, rows_per_batch, block_batches
        self.seed = seed
        self.load_state_dict({"served": 0, "epoch": 0, "start": 0})

    def state_dict(self) -> dict[str, int]:
        """Batches served, and where the rows of the current block begin."""
        return {"served": self._served, "epoch": self._place[0], "start": self._place[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state; the next batch harvests the block again."""
        self._served, self._place = state["served"], (state["epoch"], state["start"])
        self._block: PairBlock | None = None

    def next_batch(self) -> NamedStates:
        """States on the CPU, in the VLM's dtype."""
        if self._block is None:
            self._block = self._harvest()
        generator = torch.Generator().manual_seed(_mix(self.seed, self._served))
        batch = self._block.draw(self.pairs, generator)
        self._served += 1
        if self._served % self.block_batches == 0:
            self._place, self._block = self._block.end, None
        return batch

    def _harvest(self) -> PairBlock:
        block, rows = PairBlock(), self._rows(*self._place)
        for _ in range(0, self.block_rows, self.rows_per_batch):
            taken = list(itertools.islice(rows, self.rows_per_batch))
            block.end = taken[-1][0]
            with self.harvester.lock:
                self._add(block, [row for _, row in taken])
        if not block.pairs:
            raise ValueError(
                f"none of {self.block_rows} rows has a name with a word and a patch to pair; pair losses need rows in "
                "the row schema with masks, and words in their texts that `names` gives."
            )
        return block

    def _rows(self, epoch: int, start: int) -> Iterator[tuple[tuple[int, int], tuple[int, dict]]]:
        """Rows from a place on, each with the place after it; epoch after epoch."""
        for number in itertools.count(epoch):
            place = start if number == epoch else 0
            for row in self.stream.rows(number, place):
                place += 1
                yield (number, place), row
            if not place:
                raise ValueError(f"epoch {number} of the data set has no row.")

    @torch.no_grad()
    def _add(self, block: PairBlock, rows: list[tuple[int, dict]]) -> None:
        rows = [row for row in rows if row[1].get("instruction") is not None and self.marks.names(row[1])]
        inputs = self.harvester.encode(rows) if rows else None
        if inputs is None:
            return
        if len(inputs["input_ids"]) < len(rows):  # one cannot be read; alone it is known which
            for row in rows:
                self._add(block, [row])
            return
        states = layer_states(self.harvester.vlm, self.harvester.layer, inputs).cpu()
        for index, (_, row) in enumerate(rows):
            image = to_rgb_image(row["image"])
            for name in self.marks.places(row, image, inputs["input_ids"][index], inputs["attention_mask"][index]):
                last = [places[-1] for places in name.occurrences]  # the token that has read the whole name
                block.add(name.words, states[index, last], states[index, name.patches])


class PairBlock:
    """For every name of every row the states of its words and of its patches; batches of pairs are drawn from it."""

    def __init__(self):
        self.pairs: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.end = (0, 0)  # the place after the last row
        self._ids: dict[str, int] = {}

    def add(self, name: str, words: torch.Tensor, patches: torch.Tensor) -> None:
        """Add a name with the states of its words `(words, d_in)` and of its patches `(patches, d_in)`."""
        self.pairs.append((self._ids.setdefault(name.lower(), len(self._ids)), words, patches))

    def draw(self, pairs: int, generator: torch.Generator) -> NamedStates:
        """Draw names with replacement, and one word and one patch of each."""
        chosen = torch.randint(len(self.pairs), (pairs,), generator=generator).tolist()
        shares = torch.rand(pairs, 2, generator=generator).tolist()
        words, patches, ids = [], [], []
        for index, (word, patch) in zip(chosen, shares, strict=True):
            name, word_states, patch_states = self.pairs[index]
            words.append(word_states[int(word * len(word_states))])
            patches.append(patch_states[int(patch * len(patch_states))])
            ids.append(name)
        return NamedStates(torch.stack(words), torch.stack(patches), torch.tensor(ids))


__all__ = ["NamedStates", "PairBlock", "PairBuffer"]
