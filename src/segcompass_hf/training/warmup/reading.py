# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading: the states at the SAE layer tell where the answer is, learned from masks alone.

The slots of SegCompass read the answer from the concepts at the SAE layer. A language loss asks the last layer for it;
left alone, the layers below the SAE hardly tell the word that is the answer from the same word among the candidates,
and a sparse code of them even less. A small reading head, dropped after the warm-up, asks for it there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

QUERY_STD = 0.5  # as the slot queries': with less they start alike and swap objects


class Reading(NamedTuple):
    """What a [`ReadingHead`] finds.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_queries, sequence_length)`): Logits of the image tokens; off
            the image `-inf`.
        nothing (`torch.Tensor` of shape `(batch_size, num_queries)`): Logit of "there is no such object".
    """

    scores: torch.Tensor
    nothing: torch.Tensor


class ReadingHead(nn.Module):
    r"""K queries, each of which reads all tokens and points at the image tokens of one object of the answer.

    With `n_t` the state of token t scaled to a mean square of 1, d its length and p the image tokens:

        a_kt = softmax_t( q_k . n_t / sqrt(d) ),   v_k = W sum_t a_kt n_t
        s_kp = v_k . n_p / sqrt(d),   s_k0 = v_k . e / sqrt(d)

    It is as weak as can be, linear but for the softmax, so that what it finds lies open to any slot encoder. W starts
    as the identity: a word that means a place then points at the patches whose states resemble it.

    Args:
        hidden_size (`int`): Of the states.
        num_queries (`int`): Objects of an answer at most, the model's slots.
        seed (`int`, defaults to 0): Of the queries, so that all processes start alike.
    """

    def __init__(self, hidden_size: int, num_queries: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.slot_queries = nn.Parameter(QUERY_STD * torch.randn(num_queries, hidden_size, generator=generator))
        self.point = nn.Parameter(torch.eye(hidden_size))
        self.nothing = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor, is_image: torch.Tensor) -> Reading:
        """Read.

        Args:
            states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Of one layer.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 on padding.
            is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Image tokens.
        """
        with torch.autocast(states.device.type, enabled=False):
            states = F.rms_norm(states.float(), states.shape[-1:], eps=1e-6)
            scale = states.shape[-1] ** -0.5
            attention = self.slot_queries @ states.mT * scale  # (batch_size, num_queries, sequence_length)
            attention = attention.masked_fill(attention_mask[:, None] == 0, float("-inf")).softmax(-1)
            found = attention @ states @ self.point.T * scale  # (batch_size, num_queries, hidden_size)
            scores = (found @ states.mT).masked_fill(~is_image[:, None], float("-inf"))
            return Reading(scores, found @ self.nothing)


def reading_loss(reading: Reading, object_patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Cross-entropy of what is pointed at against where the objects are, in the order of the row's masks.

        L = - sum_k sum_p c_kp / (sum_p c_kp) log softmax(s_k)_p

    with c_kp the share of image token p that object k covers. A query beyond the row's objects has to say "nothing",
    as one whose object no token shows; objects beyond the queries are left out.

    Args:
        reading ([`Reading`]): Of a batch.
        object_patches (`torch.Tensor` of shape `(batch_size, num_objects, sequence_length)`): c, 0 off the image; rows
            of zeros behind the last object.

    Returns:
        `tuple` of scalar tensors: the loss summed over queries and samples, the number of objects read, and how many
        of them had the largest score on a token that they cover.
    """
    batch_size, num_queries, length = reading.scores.shape
    covered = object_patches.new_zeros(batch_size, num_queries, length, dtype=torch.float32)
    taken = min(num_queries, object_patches.shape[1])
    covered[:, :taken] = object_patches[:, :taken].float()
    total = covered.sum(2, keepdim=True)  # (batch_size, num_queries, 1)
    is_object = total > 0
    targets = torch.cat([(~is_object).float(), covered / total.clamp(min=1e-6)], dim=2)
    log_shares = torch.cat([reading.nothing[..., None], reading.scores], dim=2).log_softmax(2)
    loss = -(targets * log_shares.clamp(min=-1e4)).sum()
    pointed = covered.gather(2, reading.scores.argmax(2, keepdim=True))
    return loss, is_object.sum(), ((pointed > 0) & is_object).sum()


class ReadingHeadSteps(TrainerCallback):
    """Does for the gradients of a trainer's `reading_head`, which is no part of its model, what Trainer does for the
    model's: a mean over the processes, clipping, and a fresh start after the step.

    Args:
        trainer (`WarmupTrainer`): Whose optimizer holds the head's parameters.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = list(self.trainer.reading_head.parameters())
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.trainer.accelerator.reduce(gradient, reduction="mean")
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.reading_head.zero_grad()


__all__ = ["Reading", "ReadingHead", "ReadingHeadSteps", "reading_loss"]
