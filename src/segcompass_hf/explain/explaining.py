# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`explain`: answer, attribute every mask to concepts, test the largest of them causally."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .answer import Answer, mask_iou
from .attribution import Attribution, Method, attribute
from .causal import match_truth, steer_many
from .explanation import ConceptAttribution, Explanation, MaskExplanation, Target, TokenShare


def explain(
    model: Any,
    processor: Any,
    image: Any,
    instruction: str,
    *,
    target: Target = "mask_logit",
    method: Method = "paths",
    num_ablations: int = 5,
    dictionary: Any = None,
    true_masks: Any = None,
    reasoning: Literal["full", "short", "none"] = "full",
    max_concepts: int = 50,
    **segment_kwargs: Any,
) -> Explanation:
    """Say which concepts, read from which words and image patches, made which mask, and test the largest causally.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model; set to evaluation mode.
        processor ([`SegCompassProcessor`]): Its processor.
        image: What the processor takes as an image.
        instruction (`str`): What to look for.
        target (`str`, defaults to `"mask_logit"`): The scalar explained: the mean logit inside the mask, that minus
            the mean outside (`mask_contrast`), or the slot's confidence (`slot_logit`).
        method (`str`, defaults to `"paths"`): See [`attribute`].
        num_ablations (`int`, defaults to 5): Of how many concepts per mask the answer without them is shown.
        dictionary ([`ConceptDictionary`], *optional*): Names the concepts; the checkpoint's own when it has one.
        true_masks (`np.ndarray` of shape `(n, H, W)`, *optional*): bool; the objects asked for.
        reasoning (`str`, defaults to `"full"`): As in `segment`.
        max_concepts (`int`, defaults to 50): Concepts listed per mask; the rest counts in `num_concepts` only.
        segment_kwargs: Anything else for `segment`.

    Returns:
        [`Explanation`]. When the model keeps no mask, its strongest slot is explained by its confidence.

    Raises:
        ValueError: Of a bad argument, a dictionary of another SAE, or weights that yield NaN or were made inside
            `torch.inference_mode()`.

    ```python
    >>> explanation = explain(model, processor, "scene.png", "the large red circle")
    >>> explanation.to_html("why.html")
    ```
    """
    answer = Answer(model, processor, image, instruction, reasoning, **segment_kwargs)
    return explain_answer(
        answer,
        target=target,
        method=method,
        num_ablations=num_ablations,
        dictionary=dictionary,
        true_masks=true_masks,
        max_concepts=max_concepts,
    )


def explain_answer(
    answer: Answer,
    *,
    target: Target = "mask_logit",
    method: Method = "paths",
    num_ablations: int = 5,
    dictionary: Any = None,
    true_masks: Any = None,
    max_concepts: int = 50,
) -> Explanation:
    """[`explain`] of an [`Answer`] that is already there; arguments as there."""
    for name, number in (("num_ablations", num_ablations), ("max_concepts", max_concepts)):
        if number < 0:
            raise ValueError(f"{name}={number} is a number of concepts and cannot be negative.")
    if any(weight.is_inference() for weight in answer.model.parameters()):
        raise ValueError(
            "the model's weights were made inside torch.inference_mode(), which keeps gradients from them; load the "
            "model outside of it."
        )
    if dictionary is None:
        from .dictionary.dictionary import ConceptDictionary

        dictionary = ConceptDictionary.find(answer.model)
    else:
        dictionary.check(answer.model.sae)
    attributions = attribute(answer.replay, answer.slots, target if answer.kept else "slot_logit", method)
    concepts = [_ranked(answer, attribution, max_concepts, dictionary) for attribution in attributions]
    _ablate_first(answer, concepts, num_ablations, true_masks)
    heatmaps = 1 / (1 + np.exp(-answer.full_size(answer.captured.heatmap_logits[0])))
    truths = match_truth(answer, true_masks)
    masks = [
        MaskExplanation(
            slot=slot,
            score=float(answer.scores[slot]),
            mask=answer.masks[index],
            heatmap=heatmaps[slot],
            concepts=concepts[index],
            target=attributions[index].target,
            value=attributions[index].value,
            baseline_value=attributions[index].baseline_value,
            completeness_error=attributions[index].completeness_error,
            quadrature_error=attributions[index].quadrature_error,
            num_concepts=len(answer.captured.features),
            kept=answer.kept,
            iou_to_truth=None if truths is None else mask_iou(answer.masks[index], truths[index]),
        )
        for index, slot in enumerate(answer.slots)
    ]
    return Explanation(
        image=answer.image,
        instruction=answer.instruction,
        reasoning=answer.reasoning,
        text=answer.text,
        tokens=answer.tokens(),
        masks=masks,
        slot_scores=answer.scores.tolist(),
        heatmaps=heatmaps,
        model_name=_model_name(answer.model),
    )


def _ranked(answer: Answer, attribution: Attribution, limit: int, dictionary: Any) -> list[ConceptAttribution]:
    """The `limit` largest concepts of one mask, with the tokens they were active on."""
    concepts = answer.captured.concepts
    features, index = concepts.features.unique(return_inverse=True)
    totals = attribution.per_feature(features, index)  # (num_features,)
    change = attribution.contributions.sum().item()
    ranked = []
    for place in totals.abs().argsort(descending=True)[:limit].tolist():
        feature, total = int(features[place]), totals[place].item()
        said = (None, None) if dictionary is None else dictionary.said(feature)
        entries = (index == place).nonzero()[:, 0]
        entries = entries[attribution.contributions[entries].abs().argsort(descending=True)]
        columns = (x[entries].tolist() for x in (concepts.token_index, concepts.values, attribution.contributions))
        ranked.append(
            ConceptAttribution(
                feature=feature,
                share=total / change if change else 0.0,
                contribution=total,
                direction="for" if total > 0 else "against",
                activation=concepts.values[entries].sum().item(),
                measured=bool(attribution.measured[place]),
                label=said[0],
                purity=said[1],
                tokens=[TokenShare(*values) for values in zip(*columns, strict=True)],
            )
        )
    return ranked


def _ablate_first(answer: Answer, concepts: Sequence[list[ConceptAttribution]], number: int, true_masks: Any) -> None:
    """Fill in what the answer becomes without each of the first concepts of every mask; every feature runs once."""
    first = [concept for ranked in concepts for concept in ranked[:number]]
    features = sorted({concept.feature for concept in first})
    tests = dict(zip(features, steer_many(answer, [{f: 0.0} for f in features], true_masks=true_masks), strict=True))
    for concept in first:
        concept.ablation = tests[concept.feature]


def _model_name(model: Any) -> str:
    """Id of a checkpoint on the Hub, or the last part of a folder's path."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
