# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of a batch that begin with the same prompt: what is read of the prompt is read once."""

from dataclasses import dataclass

import torch


@dataclass
class PromptCopies:
    """Which rows of a batch are answers to the same prompt.

    Args:
        numbers (`torch.LongTensor` of shape `(batch_size,)`): Rows of equal number have the same first `length`
            tokens, with the same padding, image and states.
        length (`int`): Tokens of the prompts, padding included.
    """

    numbers: torch.Tensor
    length: int

    def __getitem__(self, rows: slice) -> "PromptCopies":
        """Those of some rows of the batch."""
        return PromptCopies(self.numbers[rows], self.length)

    @property
    def originals(self) -> torch.Tensor:
        """The first row with the same prompt, of every row: `torch.LongTensor` of shape `(batch_size,)`."""
        return (self.numbers[:, None] == self.numbers).int().argmax(1)

    def without_copies(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask `(batch_size, sequence_length)` that is 0 on prompts which an earlier row has too."""
        is_copy = self.originals != torch.arange(len(self.numbers), device=self.numbers.device)
        is_prompt = torch.arange(mask.shape[1], device=mask.device) < self.length
        return mask.masked_fill(is_copy[:, None].to(mask.device) & is_prompt, 0)

    def fill(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(batch_size, sequence_length, channels)` with those of prompts copied from their first row."""
        prompts = values[:, : self.length].index_select(0, self.originals.to(values.device))
        return torch.cat([prompts, values[:, self.length :]], dim=1)


__all__ = ["PromptCopies"]
