# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What an image encoder gives a mask decoder: a tensor of embeddings, or with more beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class ImageFeatures(ModelOutput):
    """What a mask decoder reads of images, where that is more than their embeddings.

    It stands where SAM has a tensor `(batch_size, channels, h, w)`, and its rows are handled alike: `shape`, `device`,
    `dtype`, `len`, `features[rows]`, `clone`, `expand`, `repeat_interleave` and `to`.

    Args:
        embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`): The image embeddings.
        extra (`tuple[torch.Tensor, ...]`): SAM 2 and what came after it: the levels of higher resolution,
            `(batch_size, channels / 8, 4h, 4w)` and `(batch_size, channels / 4, 2h, 2w)`. SAM-HQ: its image encoder's
            features after the first global attention, `(batch_size, h, w, vision_hidden_size)`.
    """

    embeddings: torch.Tensor
    extra: tuple[torch.Tensor, ...] | None = None

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The embeddings, and what else there is."""
        return self.embeddings, *(self.extra or ())

    @property
    def shape(self) -> torch.Size:
        """Of the embeddings."""
        return self.embeddings.shape

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "ImageFeatures":
        """The same of every part."""
        return ImageFeatures(change(self.embeddings), tuple(change(part) for part in self.extra or ()))

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Any) -> Any:
        """Rows, by whatever indexes a tensor; by its name a field."""
        return super().__getitem__(rows) if isinstance(rows, str) else self.map(lambda part: part[rows])

    def clone(self) -> "ImageFeatures":
        return self.map(torch.clone)

    def to(self, *args: Any, **kwargs: Any) -> "ImageFeatures":
        return self.map(lambda part: part.to(*args, **kwargs))

    def update(self, parts: Mapping[str, Any]) -> None:
        """As data loaders pin mappings in memory: a copy gets the pinned parts. Any other `ModelOutput` refuses it."""
        for name, part in parts.items():
            self[name] = part

    def expand(self, rows: int, *sides: int) -> "ImageFeatures":
        return self.map(lambda part: part.expand(rows, *sides))

    def repeat_interleave(self, repeats: int, dim: int = 0) -> "ImageFeatures":
        return self.map(lambda part: part.repeat_interleave(repeats, dim))


def parts_of(features: torch.Tensor | ImageFeatures) -> tuple[torch.Tensor, ...]:
    """The embeddings of images, and what else a decoder reads of them."""
    return features.parts if isinstance(features, ImageFeatures) else (features,)


def join_rows(
    rows: Sequence[torch.Tensor | ImageFeatures], join: Callable[[list[torch.Tensor]], torch.Tensor] = torch.stack
) -> torch.Tensor | ImageFeatures:
    """A batch of single rows, or with `join=torch.cat` of batches."""
    embeddings, *extra = (join(list(parts)) for parts in zip(*map(parts_of, rows), strict=True))
    return ImageFeatures(embeddings, tuple(extra)) if extra else embeddings


def encode_different(
    encode: Callable[[torch.Tensor], torch.Tensor | ImageFeatures], pixel_values: torch.Tensor
) -> torch.Tensor | ImageFeatures:
    """`encode(pixel_values)`, where a picture that comes several times in succession is encoded once.

    Data sets keep the questions about a picture together.

    Args:
        encode (`Callable`): Of a batch of pictures, each on its own.
        pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Pictures.

    Returns:
        `torch.Tensor` or [`ImageFeatures`] of `batch_size` rows.
    """
    pairs = zip(pixel_values[1:], pixel_values[:-1], strict=True)
    is_new = torch.tensor([True, *(not torch.equal(one, before) for one, before in pairs)])
    if is_new.all():
        return encode(pixel_values)
    number = (is_new.cumsum(0) - 1).to(pixel_values.device)  # of each row's picture
    return encode(pixel_values[is_new.to(pixel_values.device)])[number]


__all__ = ["ImageFeatures", "encode_different", "join_rows", "parts_of"]
