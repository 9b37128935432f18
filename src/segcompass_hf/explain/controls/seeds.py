# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which concepts of one SAE come again in another: by what they write, and by where they fire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

MIN_TOKENS = 10  # that a feature fires on; correlations of fewer mean little
MAX_ELEMENTS = 2**25  # of a table of tokens and features, 128 MiB in float32


@dataclass(frozen=True)
class FeatureMatches:
    """For every feature of the first SAE that fires, its nearest in the second.

    Args:
        features (`torch.Tensor` of shape `(n,)`): Ids in the first, ascending.
        cosines (`torch.Tensor` of shape `(n,)`): Largest cosine of decoder directions with a feature that fires in the
            second, in [-1, 1]; NaN where the SAEs read states of different widths.
        correlations (`torch.Tensor` of shape `(n,)`): Largest correlation of activations over tokens, in [-1, 1].
    """

    features: torch.Tensor
    cosines: torch.Tensor
    correlations: torch.Tensor


@torch.no_grad()
def match_features(
    first: Any, second: Any, processor: Any, rows: Iterable[dict[str, Any]], batch_size: int = 8
) -> FeatureMatches:
    """Match the features of two models' SAEs on the same tokens.

    Args:
        first, second ([`SegCompassForReasoningSegmentation`]): In evaluation mode, with the same tokens.
        processor ([`SegCompassProcessor`]): Of both.
        rows (`Iterable[dict]`): In the row schema, with their reference reasoning where they have one.
        batch_size (`int`, defaults to 8): Rows of one pass.

    Raises:
        ValueError: In these rows fewer than two features of one of them fire on `MIN_TOKENS` tokens.
    """
    tables: tuple[list[Any], list[Any]] = ([], [])
    num_tokens = 0
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        columns = {name: [row[name] for row in batch] for name in ("image", "instruction")}
        reasoning = [row.get("reasoning") or "" for row in batch]
        inputs = processor(images=columns["image"], instruction=columns["instruction"], reasoning=reasoning)
        inputs = {name: value for name, value in inputs.items() if name not in ("sam_pixel_values", "labels")}
        for model, table in zip((first, second), tables, strict=True):
            on_device = {name: value.to(model.device) for name, value in inputs.items()}
            concepts = model(**on_device, slots_alone=True, output_concepts=True).concepts
            entries = (num_tokens + concepts.token_index, concepts.features, concepts.values.float())
            table.append([values.cpu() for values in entries])
        num_tokens += int(inputs["attention_mask"].numel())
    ids, centred = zip(*(_table(table, num_tokens) for table in tables), strict=True)
    correlations = _largest_products(centred[0], centred[1], num_tokens)
    directions = [
        model.sae.decoder_directions.float().cpu()[of] for model, of in zip((first, second), ids, strict=True)
    ]
    cosines = torch.full_like(correlations, float("nan"))
    if directions[0].shape[-1] == directions[1].shape[-1]:
        cosines = (directions[0] @ directions[1].T).amax(1)
    return FeatureMatches(ids[0], cosines, correlations)


def _table(batches: list[list[torch.Tensor]], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the features that fire often enough, and their activations `(num_tokens, n)`, sparse."""
    token, feature, value = (
        (torch.cat(part) for part in zip(*batches, strict=True)) if batches else [torch.zeros(0)] * 3
    )
    ids, index, counts = feature.unique(return_inverse=True, return_counts=True)
    often = counts >= MIN_TOKENS
    if int(often.sum()) < 2:
        raise ValueError(
            f"{int(often.sum())} features fire on {MIN_TOKENS} tokens or more: nothing to match; read more rows."
        )
    place, kept = often.cumsum(0) - 1, often[index]
    indices = torch.stack([token[kept], place[index[kept]]])
    table = torch.sparse_coo_tensor(indices, value[kept], (num_tokens, int(often.sum())))
    return ids[often], table.coalesce()


def _largest_products(first: torch.Tensor, second: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Largest correlation of each column of the first with a column of the second, both sparse `(num_tokens, n)`."""
    means, deviations = zip(*(_moments(table, num_tokens) for table in (first, second)), strict=True)
    best, width = [], max(1, MAX_ELEMENTS // num_tokens)
    for columns in torch.arange(second.shape[1]).split(width):
        dense = second.index_select(1, columns).to_dense()  # (num_tokens, columns)
        products = torch.sparse.mm(first.t(), dense) / num_tokens  # (n, columns)
        covariance = products - means[0][:, None] * means[1][columns]
        best.append((covariance / (deviations[0][:, None] * deviations[1][columns])).amax(1))
    return torch.stack(best).amax(0)


def _moments(table: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column."""
    mean = torch.sparse.sum(table, 0).to_dense() / num_tokens
    square = torch.sparse.sum(table * table, 0).to_dense() / num_tokens
    return mean, (square - mean**2).clamp(min=1e-12).sqrt()


__all__ = ["FeatureMatches", "match_features"]
