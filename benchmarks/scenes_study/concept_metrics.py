# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How far words and image patches share one concept space: the same feature for `red` and for what is red.

A feature that fires on the word alone, or on the patches alone, explains nothing across the two; the method promises
features that do both. Everything here reads feature activations `(tokens, features)`, dense or sparse, whatever SAE
they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

FEATURE_CHUNK = 512  # features ranked at a time: 80 MB for 20,000 tokens


class ConceptTokens(NamedTuple):
    """Tokens of one modality, and which concept each of them names or shows.

    Args:
        activations (`torch.Tensor` of shape `(tokens, features)`): Dense or sparse (COO or CSR), 0 or more.
        labels (`torch.LongTensor` of shape `(tokens,)`): Index of the concept; an index beyond the concepts is a
            negative of all of them, -1 leaves the token out.
        samples (`torch.LongTensor` of shape `(tokens,)`): Sample of each token. Halves and resamples are of whole
            samples, since tokens of one image resemble each other.
    """

    activations: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor


@dataclass(frozen=True)
class JointAuc:
    """How well one feature tells a concept from others both on words and on patches. AUCs in [0, 1], chance 0.5.

    Args:
        name (`str`): The concept.
        joint (`float`): min(AUC on words, AUC on patches) of the feature with the largest minimum, chosen on one half
            of the samples and scored on the other; mean of both directions.
        low, high (`float`): Bootstrap interval of `joint` over samples, for the features chosen.
        joint_in_sample (`float`): The largest minimum over all samples, chosen and scored on the same: too high, the
            more so the more features there are.
        words_alone, patches_alone (`float`): AUC of the best feature of one modality in that modality, chosen and
            scored like `joint`: what the concept space could do if it were shared.
        features (`tuple[int, int]`): The two features of `joint`.
    """

    name: str
    joint: float
    low: float
    high: float
    joint_in_sample: float
    words_alone: float
    patches_alone: float
    features: tuple[int, int]


@torch.no_grad()
def feature_auc(activations: torch.Tensor, labels: torch.Tensor, num_concepts: int) -> torch.Tensor:
    """Area under the ROC curve of every feature for every concept, its tokens against all other labelled ones.

    The chance that a token of the concept has the larger activation, ties counted half (Mann and Whitney 1947). Pass
    only tokens that are honest negatives of each other: words of one attribute (`red` against `green`), patches of
    objects. Against everything else, "is a color word" or "is no background" would pass for "is red".

    Args:
        activations (`torch.Tensor` of shape `(tokens, features)`): Dense or sparse.
        labels (`torch.LongTensor` of shape `(tokens,)`): As in [`ConceptTokens`].
        num_concepts (`int`): Concepts are labels 0 to `num_concepts - 1`.

    Returns:
        `torch.Tensor` of shape `(num_concepts, features)`: NaN for a concept without tokens or without others.
    """
    kept = labels >= 0
    is_concept = F.one_hot(labels[kept].clamp(max=num_concepts), num_concepts + 1)[:, :num_concepts].double()
    positive = is_concept.sum(0)[:, None]  # (num_concepts, 1)
    negative = len(is_concept) - positive
    areas = []
    for part in _feature_chunks(activations, kept):
        ranks = torch.full_like(part, (len(part) + 1) / 2, dtype=torch.float64)  # (tokens, features)
        fires = (part != 0).any(0)
        ranks[:, fires] = _mean_ranks(part[:, fires])
        rank_sums = is_concept.T @ ranks  # (num_concepts, features)
        areas.append((rank_sums - positive * (positive + 1) / 2) / (positive * negative))
    return torch.cat(areas, dim=1)


@torch.no_grad()
def joint_auc(
    words: ConceptTokens,
    patches: ConceptTokens,
    names: Sequence[str],
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[JointAuc]:
    """Joint word-and-patch AUC of concepts that exclude each other, such as the colors.

    Samples with even and odd numbers are the two halves.

    Args:
        words, patches ([`ConceptTokens`]): With the same features, labels and numbering of samples.
        names (`Sequence[str]`): Of the concepts 0, 1, ...
        confidence (`float`, defaults to 0.95): Of the interval.
        num_resamples (`int`, defaults to 1000): Resamples of the bootstrap.
        seed (`int`, defaults to 0): Of the bootstrap.

    Raises:
        ValueError: a concept lacks words or patches, or their negatives, in one of the halves.
    """
    both = (words, patches)
    by_half = []  # [half][modality] -> (concepts, features)
    for half in (0, 1):
        parts = [_of_half(tokens, half) for tokens in both]
        by_half.append([feature_auc(part.activations, part.labels, len(names)) for part in parts])
        for what, areas in zip(("words", "patches"), by_half[half], strict=True):
            if areas.isnan().any():
                missing = [name for name, row in zip(names, areas, strict=True) if row.isnan().any()]
                raise ValueError(
                    f"{', '.join(missing)}: no {what}, or none that are something else, in half {half} of the "
                    "samples; pass more samples, or leave the concept out."
                )
    whole = [feature_auc(tokens.activations, tokens.labels, len(names)) for tokens in both]
    scores = []
    for concept, name in enumerate(names):
        minima = [torch.minimum(*(areas[concept] for areas in by_half[half])) for half in (0, 1)]
        chosen = [int(minima[1 - half].argmax()) for half in (0, 1)]  # for half 0 the one that is best on half 1
        joint = sum(float(minima[half][chosen[half]]) for half in (0, 1)) / 2
        alone = [
            sum(float(by_half[half][m][concept][by_half[1 - half][m][concept].argmax()]) for half in (0, 1)) / 2
            for m in (0, 1)
        ]
        low, high = _joint_interval(both, concept, chosen, confidence, num_resamples, seed)
        in_sample = float(torch.minimum(whole[0][concept], whole[1][concept]).max())
        scores.append(JointAuc(name, joint, low, high, in_sample, *alone, features=tuple(chosen)))
    return scores


@dataclass(frozen=True)
class BridgeScore:
    """What pairs of tokens of two modalities have in common.

    Args:
        score (`float`): `sum(B) / sum(C)` in [-1, 1], see [`bridge_score`]: the mean cosine between a feature of the
            word and a feature of its patches, weighted by how strongly they fire together. 1: one and the same.
        chance (`float`): The same for words and patches paired at random.
        same_feature (`float`): `trace(C) / sum(C)` in [0, 1]: the part of it that lies on identical features.
        matrix (`torch.Tensor` of shape `(features, features)`): B; rows are features of words.
    """

    score: float
    chance: float
    same_feature: float
    matrix: torch.Tensor


@torch.no_grad()
def bridge_score(
    word_activations: torch.Tensor, patch_activations: torch.Tensor, directions: torch.Tensor
) -> BridgeScore:
    r"""Bridge Score of Papadimitriou et al. 2025 (arXiv 2504.11695): co-activation times alignment of features.

        B = C * cos(D, D),   C = E_pairs[ h_word^T h_patches ]   (element-wise product)

    The paper reads B feature by feature; the single numbers made of it here are ours.

    Args:
        word_activations, patch_activations (`torch.Tensor` of shape `(pairs, features)`): Row i of both belongs
            together, such as mean activations over the words and over the patches of one object.
        directions (`torch.Tensor` of shape `(features, d_in)`): D, the decoder.
    """
    word_activations, patch_activations = (part.to_dense().double() for part in (word_activations, patch_activations))
    together = word_activations.T @ patch_activations / len(word_activations)  # (features, features)
    independent = torch.outer(word_activations.mean(0), patch_activations.mean(0))
    directions = F.normalize(directions.double(), dim=-1)
    cosines = directions @ directions.T
    matrix = together * cosines
    return BridgeScore(
        score=float(matrix.sum() / together.sum().clamp_min(1e-12)),
        chance=float((independent * cosines).sum() / independent.sum().clamp_min(1e-12)),
        same_feature=float(together.diagonal().sum() / together.sum().clamp_min(1e-12)),
        matrix=matrix,
    )


def concept_jaccard(word_activations: torch.Tensor, patch_activations: torch.Tensor, threshold: float = 0.0) -> float:
    """Mean over pairs of |features active in both| / |features active in either|, in [0, 1].

    Args:
        word_activations, patch_activations (`torch.Tensor` of shape `(pairs, features)`): Rows belong together.
        threshold (`float`, defaults to 0.0): Activations above it count as active. A pair where nothing is active
            counts 0.
    """
    words, patches = word_activations.to_dense() > threshold, patch_activations.to_dense() > threshold
    union = (words | patches).sum(1)
    return float(((words & patches).sum(1) / union.clamp(min=1)).double().mean())


def one_modality_share(
    word_activations: torch.Tensor, patch_activations: torch.Tensor, dominance: float = 0.95, threshold: float = 0.0
) -> dict[str, float]:
    """Which features fire in one modality only.

    With the share of a modality's tokens on which a feature fires, p_words and p_patches, it belongs to one modality
    where that one has `dominance` of p_words + p_patches or more; the numbers of tokens do not matter.

    Args:
        word_activations (`torch.Tensor` of shape `(words, features)`), patch_activations (`torch.Tensor` of shape
            `(patches, features)`): All tokens of interest.
        dominance (`float`, defaults to 0.95): Above 0.5.
        threshold (`float`, defaults to 0.0): Activations above it count as firing.

    Returns:
        `dict`: shares of the features that fire at all: `words_only`, `patches_only`, `both`; and their number
        `firing`.
    """
    words = (word_activations.to_dense() > threshold).double().mean(0)
    patches = (patch_activations.to_dense() > threshold).double().mean(0)
    fires = (words + patches) > 0
    share = (words / (words + patches))[fires]
    count = max(1, int(fires.sum()))
    words_only, patches_only = int((share >= dominance).sum()), int((share <= 1 - dominance).sum())
    return {
        "words_only": words_only / count,
        "patches_only": patches_only / count,
        "both": (int(fires.sum()) - words_only - patches_only) / count,
        "firing": int(fires.sum()),
    }


def _feature_chunks(activations: torch.Tensor, kept: torch.Tensor):
    """Dense `(kept tokens, up to FEATURE_CHUNK)` parts."""
    if activations.layout != torch.strided:
        activations = activations.to_sparse_coo()
    for start in range(0, activations.shape[1], FEATURE_CHUNK):
        stop = min(start + FEATURE_CHUNK, activations.shape[1])
        if activations.layout == torch.strided:
            yield activations[kept, start:stop]
        else:
            columns = torch.arange(start, stop, device=activations.device)
            yield activations.index_select(1, columns).to_dense()[kept]


def _mean_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 within each column, equal values sharing the mean of theirs."""
    columns = values.T.contiguous()
    ordered = columns.sort(dim=1).values
    first = torch.searchsorted(ordered, columns)
    last = torch.searchsorted(ordered, columns, right=True)
    return ((first + last + 1).double() / 2).T


def _of_half(tokens: ConceptTokens, half: int) -> ConceptTokens:
    index = (tokens.samples % 2 == half).nonzero()[:, 0]
    return ConceptTokens(tokens.activations.index_select(0, index), tokens.labels[index], tokens.samples[index])


def _joint_interval(
    both: Sequence[ConceptTokens],
    concept: int,
    chosen: Sequence[int],
    confidence: float,
    num_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentile interval of the mean over halves of min(AUC, AUC), samples of each half drawn with replacement."""
    if not num_resamples:
        return float("nan"), float("nan")
    num_samples = 1 + max(int(tokens.samples.max()) for tokens in both)
    generator = torch.Generator().manual_seed(seed)
    joint = torch.zeros(num_resamples, dtype=torch.float64)
    for half in (0, 1):
        members = torch.arange(half, num_samples, 2)
        drawn = members[torch.randint(len(members), (num_resamples, len(members)), generator=generator)]
        counts = torch.zeros(num_resamples, num_samples, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        areas = []
        for tokens in both:
            part = _of_half(tokens, half)
            kept = part.labels >= 0
            column = part.activations.index_select(1, torch.tensor([chosen[half]])).to_dense()[kept, 0]
            areas.append(_weighted_auc(column, part.labels[kept] == concept, counts[:, part.samples[kept]]))
        joint += torch.minimum(*areas) / 2
    tail = (1 - confidence) / 2
    low, high = joint.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _weighted_auc(scores: torch.Tensor, positive: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """AUC under each row of `weights` `(resamples, tokens)`; NaN where a side has no weight."""
    _, place = scores.unique(return_inverse=True)  # tokens with equal scores share a place
    levels = int(place.max()) + 1
    nothing = weights.new_zeros(len(weights), levels)
    sums = [nothing.index_add(1, place[on], weights[:, on]) for on in (positive, ~positive)]
    below = sums[1].cumsum(1) - sums[1]
    wins = (sums[0] * (below + sums[1] / 2)).sum(1)
    return wins / (sums[0].sum(1) * sums[1].sum(1))


__all__ = [
    "BridgeScore",
    "ConceptTokens",
    "JointAuc",
    "bridge_score",
    "concept_jaccard",
    "feature_auc",
    "joint_auc",
    "one_modality_share",
]
