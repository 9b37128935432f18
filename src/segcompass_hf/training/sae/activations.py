"""Hidden states of layers of any VLM, harvested from rows of an image-text data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...data.sequence_states import StateSource, TransformersStates, states_of_layers
from ...threads_segcompass import CallLock
from .rows import RowEncoder, RowStream

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

    @classmethod
    def joined(cls, parts: Sequence[TokenStates]) -> TokenStates:
        """The tokens of several, one after another."""
        return cls(torch.cat([part.states for part in parts]), torch.cat([part.modality_ids for part in parts]))


class TokenSource(Protocol):
    """Endless, repeatable stream of token states: what an [`ActivationBuffer`] is filled from."""

    def batches(self, place: Place) -> Iterator[tuple[Place, TokenStates]]:
        """Batches from `place` on, each with its own place; the same place always gives the same batches."""


def layer_states(vlm: nn.Module, layer: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of the first `layer` decoder layers, `(rows, length, d_in)`; what lies above is not computed.

    Args:
        vlm (`nn.Module`): An `AutoModelForImageTextToText` model.
        layer (`int`): Index into `hidden_states`, 0 = embeddings.
        inputs (`dict`): The VLM's inputs.
    """
    (states,) = states_of_layers(vlm, [layer], inputs)
    return states


class ActivationHarvester:
    """Rows of an image-text data set -> states of the tokens at one layer.

    Args:
        vlm (`nn.Module`): An `AutoModelForImageTextToText` model; used without gradient, in eval mode.
        encoder ([`RowEncoder`]): Rows to inputs.
        layer (`int`): Index into `hidden_states`, 0 = embeddings.
        drop_first_token (`bool`, defaults to `True`): Leave the first token of every row out. It is an attention sink:
            a constant state whose norm is far beyond the others', which would take up features and most of the loss.
        lock ([`CallLock`], *optional*): Held while the VLM is in use: rows are harvested in a thread while others
            train. That of the model where the VLM is part of one.
        state_source ([`StateSource`], *optional*): Computes the states in place of the VLM, such as [`VllmStates`].
    """

    def __init__(
        self,
        vlm: nn.Module,
        encoder: RowEncoder,
        layer: int,
        drop_first_token: bool = True,
        lock: CallLock | None = None,
        state_source: StateSource | None = None,
    ):
        self.vlm, self.encoder, self.layer, self.drop_first_token = vlm.eval(), encoder, layer, drop_first_token
        self.lock = CallLock() if lock is None else lock
        self.state_source = TransformersStates(self.vlm) if state_source is None else state_source
        ids = [getattr(vlm.config, name, None) for name in ("image_token_id", "video_token_id")]
        if hasattr(encoder.processor, "image_handling"):  # ours has seen what its family writes
            ids.append(encoder.processor.image_token_id)
        self.image_ids = torch.tensor([i for i in ids if i is not None], dtype=torch.long)

    def __call__(self, rows: list[tuple[int, dict]]) -> TokenStates | None:
        """States of the rows' tokens in the rows' order, on the CPU in the VLM's dtype; `None` if none is readable."""
        found = self.of_layers(rows, [self.layer])
        return None if found is None else found[0]

    def of_layers(self, rows: list[tuple[int, dict]], layers: Sequence[int]) -> list[TokenStates] | None:
        """The same of several layers out of one pass."""
        with self.lock:
            encoded = self.encoder.with_images(rows)
            if encoded is None:
                return None
            inputs, images = self._on_device(encoded[0]), encoded[1]
            states = self.state_source.states_of_layers(layers, inputs, images)  # of each (rows, length, d_in)
        keep = self.counted_tokens(inputs)
        modality_ids = self.modality_ids(inputs)[keep].cpu()
        return [TokenStates(of_layer[keep].cpu(), modality_ids) for of_layer in states]

    def encode(self, rows: list[tuple[int, dict]]) -> dict[str, torch.Tensor] | None:
        """The VLM's inputs for rows, on its device."""
        inputs = self.encoder(rows)
        return None if inputs is None else self._on_device(inputs)

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.vlm.device) for name, value in inputs.items()}

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


__all__ = ["ActivationHarvester", "HarvestedTokens", "TokenStates", "layer_states", "states_of_layers"]
