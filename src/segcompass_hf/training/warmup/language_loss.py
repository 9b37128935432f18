# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The language loss of a batch as sums, so that it can be averaged over any larger batch."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import nn


def language_loss_sums(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy `-sum_t log p(label_t | tokens before t)` over the tokens that have a label.

    Only those tokens' logits are brought to float32: a prompt of image tokens costs nothing.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, kept_length, vocab_size)`): Of the last `kept_length` tokens.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`): -100 where nothing is asked.

    Returns:
        `tuple` of scalar tensors: the summed loss, the number of tokens, how many were predicted right (greedily).
    """
    targets = labels[:, -logits.shape[1] :][:, 1:]
    asked = targets != -100
    chosen, targets = logits[:, :-1][asked].float(), targets[asked]
    loss = F.cross_entropy(chosen, targets, reduction="sum")
    return loss, asked.sum(), (chosen.detach().argmax(-1) == targets).sum()


def logits_to_keep(model: nn.Module, labels: torch.Tensor) -> dict[str, int]:
    """Keyword arguments that spare a VLM the logits before the first label; empty where it does not know them.

    Args:
        model (`nn.Module`): The VLM with its head.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`): -100 where nothing is asked.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    columns = (labels != -100).any(0).nonzero()
    first = int(columns[0]) if len(columns) else labels.shape[1] - 1
    return {"logits_to_keep": max(1, labels.shape[1] - max(first - 1, 0))}  # the token before predicts the first label
