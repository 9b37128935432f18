# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Few active features per token instead of a dense row of all: encoded, decoded and differentiated as such.

Beside the one dense product that finds the active features, `x W_enc`, a step of a top-k SAE then costs four sums over
the active features in place of four dense products. Values and gradients are those of the dense formulation; every
gradient that is not computed is zero there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 2**24  # pre-activations alive at a time where only the largest are kept: 64 MiB in float32
DOT_ELEMENTS = 2**19  # of the rows gathered at a time for dot products: 2 MiB in float32
SPARSE_FROM = {"cpu": 32}  # features per active one from which this is faster, see benchmarks/sae_scale.py


class FeaturePattern(NamedTuple):
    """Which features are active on which tokens, in the order of tokens and in the order of features.

    Args:
        tokens, features (`torch.LongTensor` of shape `(active,)`): Of every active feature of every token; in the
            order of tokens.
        token_starts (`torch.LongTensor` of shape `(num_tokens,)`): Where the features of each token begin.
        by_feature (`torch.LongTensor` of shape `(active,)`): The order that sorts them by feature.
        feature_starts (`torch.LongTensor` of shape `(d_sae,)`): Where the tokens of each feature begin in it.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    token_starts: torch.Tensor
    by_feature: torch.Tensor
    feature_starts: torch.Tensor

    @classmethod
    def of(cls, active: torch.Tensor) -> "FeaturePattern":
        """From a bool tensor `(num_tokens, d_sae)`."""
        tokens, features = active.nonzero(as_tuple=True)
        return cls.sorted_by_token(tokens, features, *active.shape)

    @classmethod
    def sorted_by_token(
        cls, tokens: torch.Tensor, features: torch.Tensor, num_tokens: int, d_sae: int
    ) -> "FeaturePattern":
        """From indices `(active,)` in the order of tokens."""
        by_feature = features.argsort(stable=True)
        token_starts = torch.searchsorted(tokens, torch.arange(num_tokens, device=tokens.device))
        feature_starts = torch.searchsorted(features[by_feature], torch.arange(d_sae, device=tokens.device))
        return cls(tokens, features, token_starts, by_feature, feature_starts)

    def sum_over_features(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`sum_f w_tf rows_f` for every token: `(num_tokens, d)` from weights `(active,)` and rows `(d_sae, d)`."""
        return _sums(self.features, rows, self.token_starts, weights)

    def sum_over_tokens(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`sum_t w_tf rows_t` for every feature: `(d_sae, d)` from weights `(active,)` and rows `(num_tokens, d)`."""
        return _sums(self.tokens[self.by_feature], rows, self.feature_starts, weights[self.by_feature])

    def dots(self, token_rows: torch.Tensor, feature_rows: torch.Tensor) -> torch.Tensor:
        """`token_rows_t . feature_rows_f` for every active one: `(active,)` from rows of width d."""
        result = token_rows.new_empty(len(self.tokens))
        rows = max(1, DOT_ELEMENTS // token_rows.shape[1])
        for start in range(0, len(result), rows):
            chunk = slice(start, start + rows)
            gathered = feature_rows[self.features[chunk]].mul_(token_rows[self.tokens[chunk]])
            torch.sum(gathered, 1, out=result[chunk])
        return result


def _sums(index: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows, `(len(starts), d)`: of each run of `index` between two starts."""
    if not len(index):
        return rows.new_zeros(len(starts), rows.shape[1])
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights.to(rows.dtype))


class _Encode(torch.autograd.Function):
    """Pre-activations of active features, computed before: differentiable in the encoder."""

    @staticmethod
    def forward(ctx, found, inputs, W_enc, b_enc, shift, pattern):
        ctx.save_for_backward(inputs, W_enc)
        ctx.pattern, ctx.shifted = pattern, shift is not None
        return found.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs, W_enc = ctx.saved_tensors
        pattern, grad = ctx.pattern, grad.to(inputs.dtype)
        d_W_enc = pattern.sum_over_tokens(grad, inputs).T  # (d_in, d_sae)
        d_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, pattern.features, grad)
        # what was subtracted from every input: minus the sum over tokens of the gradient of the input
        d_shift = -(W_enc @ d_b_enc) if ctx.shifted else None
        return None, None, d_W_enc, d_b_enc, d_shift, None


class _Decode(torch.autograd.Function):
    """Weighted sums of decoder rows, differentiable in both."""

    @staticmethod
    def forward(ctx, values, W_dec, pattern):
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return pattern.sum_over_features(values, W_dec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        return ctx.pattern.dots(grad, W_dec), ctx.pattern.sum_over_tokens(values, grad), None


def largest_of_rows(
    project: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, k: int, d_sae: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest pre-activations of every row, and whose they are: twice `(num_rows, k)`, some rows at a time.

    Args:
        project (`Callable`): Rows -> their pre-activations `(num_rows, d_sae)`.
        rows (`torch.Tensor` of shape `(num_rows, d_in)`): Normalised states.
        k (`int`): Of `d_sae` features.
        d_sae (`int`): Features.
    """
    largest = [project(chunk).topk(k, dim=-1) for chunk in rows.split(max(1, CHUNK_ELEMENTS // d_sae))]
    values, features = (torch.cat(parts) for parts in zip(*largest, strict=True))
    return values, features


def encode_active(
    found: torch.Tensor,
    inputs: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    shift: torch.Tensor | None,
    pattern: FeaturePattern,
) -> torch.Tensor:
    """Give pre-activations of active features their gradient.

    Args:
        found (`torch.Tensor` of shape `(active,)`): Their values, `(inputs W_enc + b_enc)[tokens, features]`.
        inputs (`torch.Tensor` of shape `(num_tokens, d_in)`): Without gradient of their own.
        W_enc, b_enc (`torch.Tensor` of shapes `(d_in, d_sae)` and `(d_sae,)`): Of the encoder.
        shift (`torch.Tensor` of shape `(d_in,)`, *optional*): What was subtracted to get `inputs`, if it trains.
        pattern ([`FeaturePattern`]): Which they are.

    Returns:
        `torch.Tensor` of shape `(active,)`: `found`, with a gradient in `W_enc`, `b_enc` and `shift`.
    """
    return _Encode.apply(found, inputs, W_enc, b_enc, shift, pattern)


def decode_active(values: torch.Tensor, W_dec: torch.Tensor, pattern: FeaturePattern) -> torch.Tensor:
    """`sum_f values_tf W_dec_f` for every token: `(num_tokens, d_in)` from `(active,)` and `(d_sae, d_in)`."""
    return _Decode.apply(values.to(W_dec.dtype), W_dec, pattern)


__all__ = ["SPARSE_FROM", "FeaturePattern", "decode_active", "encode_active", "largest_of_rows"]
