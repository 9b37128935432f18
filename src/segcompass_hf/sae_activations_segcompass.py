# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Activation functions of sparse autoencoders: which pre-activations count, and with what gradient."""

import torch

JUMPRELU_BANDWIDTH = 0.05  # width of the window around a threshold in which it receives a gradient
GUESS_MARGIN = 0.7  # of the running threshold: what lies below is not among the largest, but for odd batches


class JumpRelu(torch.autograd.Function):
    """`z * H(z - threshold)` with the pseudo-derivative of Rajamanoharan et al. 2024 (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx, pre_activations: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pre_activations, threshold)
        return pre_activations.relu() * (pre_activations > threshold)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre_activations, threshold = ctx.saved_tensors
        active = (pre_activations > threshold) & (pre_activations > 0)
        at_threshold = (pre_activations - threshold).abs() < JUMPRELU_BANDWIDTH / 2
        grad_threshold = -(threshold / JUMPRELU_BANDWIDTH) * (at_threshold * grad).flatten(0, -2).sum(0)
        return grad * active, grad_threshold


class Step(torch.autograd.Function):
    """`H(z - threshold)`, differentiable in the threshold only (arXiv 2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx, pre_activations: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pre_activations, threshold)
        return (pre_activations > threshold).to(pre_activations.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        pre_activations, threshold = ctx.saved_tensors
        at_threshold = (pre_activations - threshold).abs() < JUMPRELU_BANDWIDTH / 2
        return None, -(at_threshold * grad).flatten(0, -2).sum(0) / JUMPRELU_BANDWIDTH


def smallest_kept(activations: torch.Tensor, count: int, guess: torch.Tensor | float = 0.0) -> torch.Tensor:
    """The smallest positive one of the `count` largest activations of a batch, `()`; infinite where none is positive.

    Args:
        activations (`torch.Tensor` of shape `(entries,)`): Of all tokens and features.
        count (`int`): That are kept at most.
        guess (`torch.Tensor` of shape `()` or `float`, *optional*): Near or below it: then few are sorted.
    """
    candidates = activations[activations > guess * GUESS_MARGIN]
    if len(candidates) < count:
        candidates = activations
    if not len(candidates):
        return activations.new_tensor(torch.inf)
    largest = candidates.topk(min(count, len(candidates)), sorted=False).values
    return largest.where(largest > 0, torch.inf).amin()


def keep_top_k(activations: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` largest of the last dimension, where they are positive, and zeros: `(..., features)` as given."""
    values, indices = activations.topk(k, dim=-1)
    return torch.zeros_like(activations).scatter(-1, indices, values.relu())


__all__ = ["JumpRelu", "Step", "keep_top_k", "smallest_kept"]
