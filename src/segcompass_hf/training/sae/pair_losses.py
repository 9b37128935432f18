# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Losses that make an SAE use the same features for a word and for the patches of what it names.

Both are additions to the SAE's own loss, in its unit (squared error per token) or without one, and read the normalised
space. They can share only what the VLM's states share: where words and patches of a name point in unrelated
directions, align them in the warm-up first (`WarmupConfig.alignment_weight`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ...modeling_sae import SegCompassSae
from .pair_buffer import NamedStates

PairLoss = Literal["none", "shared_topk", "contrastive"]


def pair_loss(sae: SegCompassSae, pairs: NamedStates, kind: PairLoss, k: int) -> torch.Tensor:
    """[`shared_topk_loss`] or [`contrastive_loss`] of a batch of pairs in the space of the VLM."""
    device = sae.W_enc.device
    states = [
        sae.normalize(part.to(device), torch.full((len(part),), modality, device=device))[0]
        for modality, part in enumerate((pairs.words, pairs.patches))
    ]
    if kind == "shared_topk":
        return shared_topk_loss(sae, *states, k)
    return contrastive_loss(sae, *states, pairs.name_ids.to(device))


def shared_selection(word_acts: torch.Tensor, patch_acts: torch.Tensor, k: int) -> torch.Tensor:
    """One choice of active features for both tokens of each pair: the `k` largest sums of their activations.

    Args:
        word_acts, patch_acts (`torch.Tensor` of shape `(pairs, d_sae)`): 0 or more; rows belong together.
        k (`int`): Features of a pair at most; features that are silent on both are never chosen.

    Returns:
        `torch.Tensor` of shape `(pairs, d_sae)`: bool.
    """
    together = word_acts + patch_acts
    largest = together.topk(min(k, together.shape[-1]), dim=-1)
    return torch.zeros_like(together, dtype=torch.bool).scatter(-1, largest.indices, largest.values > 0)


def shared_topk_loss(sae: SegCompassSae, words: torch.Tensor, patches: torch.Tensor, k: int) -> torch.Tensor:
    r"""Shared top-k with cross-reconstruction, as in SPARC (arXiv 2507.06265), with one SAE for both streams.

    With S the [`shared_selection`] of a pair and h_S activations outside S set to zero:

        L = 1/4 sum_{a, b in {word, patch}} || x_a - decode(h_S(x_b)) ||^2

    The terms with a = b are SPARC's reconstruction under a shared selection, the others its cross-reconstruction. What
    a word cannot say of its patches (where they are, what else they are) stays as a constant part of the error.

    Args:
        sae ([`SegCompassSae`]): In training.
        words, patches (`torch.Tensor` of shape `(pairs, d_in)`): Normalised states; rows belong together.
        k (`int`): Features of a pair.
    """
    word_acts, patch_acts = _activations(sae, words), _activations(sae, patches)
    chosen = shared_selection(word_acts.detach(), patch_acts.detach(), k)
    rebuilt = [sae.decode(acts * chosen) for acts in (word_acts, patch_acts)]
    errors = [(state - part).pow(2).sum(-1).mean() for state in (words, patches) for part in rebuilt]
    return sum(errors) / 4


def contrastive_loss(
    sae: SegCompassSae,
    words: torch.Tensor,
    patches: torch.Tensor,
    name_ids: torch.Tensor,
    temperature: float = 0.1,
) -> torch.Tensor:
    r"""Symmetric InfoNCE between the activations of words and of patches, over the pairs of a batch.

    With `s_ij = cos(h(word_i), h(patch_j)) / temperature`, and pairs of the same name no negatives of each other:

        L = -1/2 mean_i [ log( e^{s_ii} / (e^{s_ii} + sum_{name_j != name_i} e^{s_ij}) ) + the same over s_ji ]

    Patches of a pair may also show what another name says (a ring of the wrong color is still a ring): such negatives
    are false, and they are as many for every name, so that they cost some contrast and change no order.

    Args:
        sae ([`SegCompassSae`]): In training.
        words, patches (`torch.Tensor` of shape `(pairs, d_in)`): Normalised states; rows belong together.
        name_ids (`torch.LongTensor` of shape `(pairs,)`): Equal for pairs of one name.
        temperature (`float`, defaults to 0.1): Of the softmax.
    """
    word_acts, patch_acts = (F.normalize(_activations(sae, states), dim=-1) for states in (words, patches))
    scores = word_acts @ patch_acts.T / temperature  # (pairs, pairs)
    others = scores.masked_fill(name_ids[:, None] == name_ids, -1e4)
    own = scores.diagonal()
    forward = own - torch.logaddexp(own, others.logsumexp(1))
    backward = own - torch.logaddexp(own, others.logsumexp(0))
    return -(forward + backward).mean() / 2


def _activations(sae: SegCompassSae, normalized: torch.Tensor) -> torch.Tensor:
    """Feature activations `(pairs, d_sae)` of states that are normalised already."""
    return sae._activate(sae._project(normalized))


__all__ = ["PairLoss", "contrastive_loss", "pair_loss", "shared_selection", "shared_topk_loss"]
