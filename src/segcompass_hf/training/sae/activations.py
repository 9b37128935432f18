"""Hidden states of one layer of any VLM, harvested on the fly and mixed in a buffer of fixed size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...text_stack_segcompass import HiddenStateCapture
from ...vlm_inputs_segcompass import sequence_inputs
from .rows import RowEncoder, RowStream, _mix

Place = tuple[int, int]  # (epoch, rows or tokens of the epoch before it)


@dataclass
class TokenStates:
    """States of tokens that are no padding.

    Args:
        states (`torch.Tensor` of shape `(tokens, d_in)`): Hidden states of one layer.
        modality_ids (`torch.Tensor` of shape `(tokens,)`): int8, 0 text, 1 image.
    """

    states: torch.Tensor
    modality_ids: torch.Tensor

    def __len__(self) -> int:
        return self.states.shape[0]

    def take(self, index: Any) -> TokenStates:
        """The tokens of an index, slice or mask."""
        return TokenStates(self.states[index], self.modality_ids[index])


class TokenSource(Protocol):
    """Endless, repeatable stream of token states: what an [`ActivationBuffer`] is filled from."""

    def batches(self, place: Place) -> Iterator[tuple[Place, TokenStates]]:
        """Batches from `place` on, each with its own place; the same place always gives the same batches."""


@torch.no_grad()
def layer_states(vlm: nn.Module, layer: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of the first `layer` decoder layers, `(rows, length, d_in)`; what lies above is not computed.

    Args:
        vlm (`nn.Module`): An `AutoModelForImageTextToText` model.
        layer (`int`): Index into `hidden_states`, 0 = embeddings.
        inputs (`dict`): The VLM's inputs.
    """

    with HiddenStateCapture(vlm, layer, stop=True) as capture:
        vlm(**sequence_inputs(vlm, inputs))
    if capture.layer_states:
        return capture.layer_states[0]
    raise RuntimeError(f"the VLM's pass ended without reaching layer {layer}; it has fewer layers.")


class ActivationHarvester:
    """Rows of an image-text data set -> states of the tokens at one layer.

    Args:
        vlm (`nn.Module`): An `AutoModelForImageTextToText` model; used without gradient, in eval mode.
        encoder ([`RowEncoder`]): Rows to inputs.
        layer (`int`): Index into `hidden_states`, 0 = embeddings.
        drop_first_token (`bool`, defaults to `True`): Leave the first token of every row out. It is an attention sink:
            a constant state whose norm is far beyond the others', which would take up features and most of the loss.
    """

    def __init__(self, vlm: nn.Module, encoder: RowEncoder, layer: int, drop_first_token: bool = True):
        self.vlm, self.encoder, self.layer, self.drop_first_token = vlm.eval(), encoder, layer, drop_first_token
        ids = [getattr(vlm.config, name, None) for name in ("image_token_id", "video_token_id")]
        if hasattr(encoder.processor, "image_handling"):  # ours has seen what its family writes
            ids.append(encoder.processor.image_token_id)
        self.image_ids = torch.tensor([i for i in ids if i is not None], dtype=torch.long)

    def __call__(self, rows: list[tuple[int, dict]]) -> TokenStates | None:
        """States of the rows' tokens in the rows' order, on the CPU in the VLM's dtype; `None` if none is readable."""
        inputs = self.encode(rows)
        if inputs is None:
            return None
        states = layer_states(self.vlm, self.layer, inputs)  # (rows, length, d_in)
        keep = self.counted_tokens(inputs)
        return TokenStates(states[keep].cpu(), self.modality_ids(inputs)[keep].cpu())

    def encode(self, rows: list[tuple[int, dict]]) -> dict[str, torch.Tensor] | None:
        """The VLM's inputs for rows, on its device."""
        inputs = self.encoder(rows)
        return None if inputs is None else {name: value.to(self.vlm.device) for name, value in inputs.items()}

    def counted_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which tokens the SAE sees, `(rows, length)` bool: no padding, and not the first where it is dropped."""
        mask = inputs["attention_mask"].bool()
        if self.drop_first_token:
            mask = mask & (mask.long().cumsum(1) > 1)
        return mask

    def modality_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """0 text, 1 image: `(rows, length)` int8."""
        return torch.isin(inputs["input_ids"], self.image_ids.to(inputs["input_ids"].device)).to(torch.int8)


class HarvestedTokens:
    """A [`TokenSource`] that runs the VLM over a [`RowStream`], `rows_per_batch` rows at a time."""

    def __init__(self, harvester: ActivationHarvester, stream: RowStream, rows_per_batch: int):
        self.harvester, self.stream, self.rows_per_batch = harvester, stream, rows_per_batch

    def batches(self, place: Place) -> Iterator[tuple[Place, TokenStates]]:
        for epoch in itertools.count(place[0]):
            start = place[1] if epoch == place[0] else 0
            tokens = 0
            for place_now, batch in self.epoch_batches(epoch, start):
                tokens += len(batch)
                yield place_now, batch
            if tokens == 0 and start == 0:
                raise ValueError(
                    f"epoch {epoch} of the data set gave no token: it is empty, or none of its rows is readable."
                )

    def epoch_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Place, TokenStates]]:
        """The batches of one epoch from row `start` on."""
        rows = self.stream.rows(epoch, start)
        while taken := list(itertools.islice(rows, self.rows_per_batch)):
            batch = self.harvester(taken)
            if batch is not None and len(batch):
                yield (epoch, start), batch
            start += len(taken)


class ActivationBuffer:
    """Fills a block of token states, serves it in shuffled batches, fills the next: never holds more.

    Memory: `block_tokens` states and what one harvested batch has over. The order inside a block follows from
    `(seed, number of the block)`, and a block from the place of its first token, so that the state is a few numbers;
    after [`~ActivationBuffer.load_state_dict`] the block is harvested again and served on from where it was left.

    Args:
        source ([`TokenSource`]): Where states come from.
        batch_tokens (`int`): Tokens of a batch.
        block_tokens (`int`): Tokens to mix; rounded to a multiple of `batch_tokens`.
        seed (`int`, defaults to 0): Of the order.
    """

    def __init__(self, source: TokenSource, batch_tokens: int, block_tokens: int, seed: int = 0):
        self.source, self.batch_tokens, self.seed = source, batch_tokens, seed
        self.block_tokens = max(1, round(block_tokens / batch_tokens)) * batch_tokens
        self.load_state_dict({"block": 0, "served": 0, "epoch": 0, "start": 0, "skip": 0})

    @property
    def place(self) -> Place:
        """Where the current block begins: its first batch is `place`, less `skip` tokens."""
        return self._place

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from; a handful of numbers."""
        return {
            "block": self._block_index,
            "served": self._served,
            "epoch": self._place[0],
            "start": self._place[1],
            "skip": self._skip,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state; the next batch harvests the block again."""
        self._block_index, self._served = state["block"], state["served"]
        self._place, self._skip = (state["epoch"], state["start"]), state["skip"]
        self._block: TokenStates | None = None
        self._order: torch.Tensor | None = None
        self._batches: Iterator[tuple[Place, TokenStates]] | None = None
        self._rest: tuple[Place, int, TokenStates] | None = None  # place, tokens gone, tokens left

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> dict[str, torch.Tensor]:
        """`hidden_states` `(batch_tokens, d_in)` and `modality_ids` `(batch_tokens,)`."""
        block = self.block()
        index = self._order[self._served : self._served + self.batch_tokens]
        self._served += self.batch_tokens
        batch = block.take(index)
        if self._served == self.block_tokens:  # the next block begins where this one ended
            self._place, self._skip, _ = self._rest
            self._block_index, self._served, self._block = self._block_index + 1, 0, None
        return {"hidden_states": batch.states, "modality_ids": batch.modality_ids.long()}

    def block(self) -> TokenStates:
        """The block that the next batch is taken from, in the order of harvest."""
        if self._block is None:
            self._block = self._fill()
            generator = torch.Generator().manual_seed(_mix(self.seed, self._block_index))
            self._order = torch.randperm(self.block_tokens, generator=generator)
        return self._block

    def _fill(self) -> TokenStates:
        if self._batches is None:
            self._batches = self.source.batches(self._place)
            place, batch = next(self._batches)
            self._rest = place, self._skip, batch.take(slice(self._skip, None))
        block, filled = None, 0
        while True:
            place, gone, batch = self._rest
            taken = min(len(batch), self.block_tokens - filled)
            if block is None:
                block = _empty(self.block_tokens, batch)
            block.states[filled : filled + taken] = batch.states[:taken]
            block.modality_ids[filled : filled + taken] = batch.modality_ids[:taken]
            filled += taken
            # a copy: a view would keep the whole batch alive while the block is served
            rest = TokenStates(batch.states[taken:].clone(), batch.modality_ids[taken:].clone())
            self._rest = place, gone + taken, rest
            if filled == self.block_tokens:
                return block
            place, batch = next(self._batches)
            self._rest = place, 0, batch


def _empty(tokens: int, like: TokenStates) -> TokenStates:
    return TokenStates(like.states.new_empty(tokens, like.states.shape[1]), like.modality_ids.new_empty(tokens))


__all__ = ["ActivationBuffer", "ActivationHarvester", "HarvestedTokens", "TokenStates", "layer_states"]
