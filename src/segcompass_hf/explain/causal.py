# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Causal tests: take concepts away or change them, and see what becomes of masks, confidence and reasoning."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..interventions_segcompass import (
    ConceptIntervention,
    InterventionPlace,
    InterventionTokens,
    normalize_interventions,
)
from .answer import Answer, mask_iou
from .explanation import Ablation


def ablate(
    answer: Answer,
    features: int | Iterable[int],
    *,
    tokens: InterventionTokens = "all",
    where: InterventionPlace = "concepts",
    true_masks: Any = None,
) -> Ablation:
    """Take features away, all at once.

    On the `concepts` what the VLM wrote stays, and only the steps from concepts to masks run again. On the `residual`
    stream the features' directions are taken out of the VLM's states while it writes, so the reasoning may change.

    Args:
        answer ([`Answer`]): The answer to test.
        features (`int` or iterable of `int`): SAE feature ids.
        tokens (`str`, defaults to `"all"`): `all`, `image` or `text` tokens.
        where (`str`, defaults to `"concepts"`): `concepts` or `residual`.
        true_masks (`np.ndarray` of shape `(n, H, W)`, *optional*): bool; the objects asked for.

    Returns:
        [`Ablation`]

    Raises:
        ValueError: A feature does not exist, or `true_masks` do not fit the image.

    ```python
    >>> answer = Answer(model, processor, image, "the red circle")
    >>> ablate(answer, [17, 230]).iou  # of each mask to what it was
    ```
    """
    given: Any = features
    try:
        ids = [operator.index(given)]  # an int of Python, numpy or torch
    except TypeError:
        ids = list(given)
    return steer(answer, [ConceptIntervention(i, tokens=tokens, where=where) for i in ids], true_masks=true_masks)


def steer(answer: Answer, interventions: Any, *, true_masks: Any = None) -> Ablation:
    """Change features by any interventions; see [`ablate`].

    Args:
        answer ([`Answer`]): The answer to test.
        interventions: `{feature: scale}`, a [`ConceptIntervention`] or a list of them. With one on the residual stream
            the model answers anew, all of them in force.
        true_masks (`np.ndarray` of shape `(n, H, W)`, *optional*): bool; the objects asked for.
    """
    items = normalize_interventions(interventions, answer.model.config.sae_config.d_sae)
    if any(item.where == "residual" for item in items):
        return _answer_anew(answer, items, true_masks)
    return steer_many(answer, [items], true_masks=true_masks)[0]


def steer_many(answer: Answer, changes: Sequence[Any], *, true_masks: Any = None) -> list[Ablation]:
    """Several changes of concepts, each on its own, run together: the fast path without a pass of the VLM.

    Args:
        answer ([`Answer`]): The answer to test.
        changes: One entry per test, each in any form of interventions, on concepts only.
        true_masks (`np.ndarray` of shape `(n, H, W)`, *optional*): bool; the objects asked for.
    """
    if not changes:
        return []
    d_sae = answer.model.config.sae_config.d_sae
    changes = [normalize_interventions(change, d_sae) for change in changes]
    embeddings = torch.cat([answer.replay.embed_interventions(change) for change in changes])
    output = answer.replay.run(embeddings, answer.slots)
    truths = match_truth(answer, true_masks)
    surprisal = answer.captured.reasoning_surprisal  # what the VLM wrote stays
    return [
        _tested(answer, change, masks, logits[answer.slots], surprisal, truths)
        for change, masks, logits in zip(changes, output.pred_masks, output.slot_logits, strict=True)
    ]


def match_truth(answer: Answer, true_masks: Any) -> list[np.ndarray] | None:
    """The true mask that each of the answer's masks overlaps most; `None` without any."""
    if true_masks is None:
        return None
    truths = np.asarray(true_masks).astype(bool)
    if truths.ndim == 2:
        truths = truths[None]
    if truths.ndim != 3 or (len(truths) and truths.shape[1:] != answer.masks.shape[1:]):
        height, width = answer.masks.shape[1:]
        raise ValueError(
            f"true_masks have shape {np.shape(true_masks)}, expected (n, {height}, {width}): one bool mask per "
            "object, at the image's size."
        )
    if len(truths) == 0:
        truths = np.zeros((1, *answer.masks.shape[1:]), dtype=bool)
    return [max(truths, key=lambda truth: mask_iou(mask, truth)) for mask in answer.masks]


def _tested(
    answer: Answer,
    items: list[ConceptIntervention],
    pred_masks: torch.Tensor,
    slot_logits: torch.Tensor,
    reasoning_surprisal: torch.Tensor,
    truths: Any,
) -> Ablation:
    """The difference between the answer and changed logits of its slots, `(slots, 4h, 4w)` and `(slots,)`."""
    masks = answer.full_size(pred_masks) > answer.model.config.mask_logit_threshold
    sizes = answer.captured.reshaped_input_sizes
    scores = answer.model.score_slots(slot_logits[None], pred_masks[None], reasoning_surprisal, sizes)[0]
    return Ablation(
        features=tuple(dict.fromkeys(item.feature for item in items)),
        masks=list(masks),
        iou=[mask_iou(*pair) for pair in zip(answer.masks, masks, strict=True)],
        score_change=[
            after - float(answer.scores[slot]) for slot, after in zip(answer.slots, scores.tolist(), strict=True)
        ],
        iou_to_truth=None if truths is None else [mask_iou(*pair) for pair in zip(truths, masks, strict=True)],
    )


def _answer_anew(answer: Answer, items: list[ConceptIntervention], true_masks: Any) -> Ablation:
    """Segment again with the interventions in force, besides those that the answer was made with. Slots keep their
    numbers, so masks are compared slot by slot."""
    before = normalize_interventions(answer.segment_kwargs.get("interventions"))
    kwargs = answer.segment_kwargs | {"interventions": before + items}
    output = answer.model.segment(**answer.inputs, **kwargs)
    maps = output.pred_masks[0, answer.slots], output.slot_logits[0, answer.slots]
    tested = _tested(answer, items, *maps, output.reasoning_surprisal, match_truth(answer, true_masks))
    sizes = answer.captured.original_sizes, answer.captured.reshaped_input_sizes
    tested.reasoning = answer.processor.post_process_segmentation(output, *sizes)[0]["reasoning"]
    return tested
