# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The rewards as the original code computes them, for comparison; docs/differences.md says where ours differ."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from segcompass_hf.training.rewards.mask_scores import (
    check_numbers,
    mask_batches,
    matched_iou_rewards,
    matched_iou_table,
    single_object_table,
)
from segcompass_hf.training.rewards.rewards import (
    MAX_REASONING_CHARACTERS,
    MAX_STRAY_WORDS,
    REF_TOKEN,
    completion_text,
)

_THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def original_format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """
    [`format_reward`](segcompass_hf.training.format_reward) of the original: one `<REF_POS>`, whatever the number of
    slots.

    1.0 where exactly one think block with content (which may hold a further opening tag) is followed by exactly one
    `<REF_POS>`; 0.9 where besides the reasoning is longer than 2,048 characters, text stands in front, or more than
    10 words stand between. Text after the `<REF_POS>` is free.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Answers, as text or as conversations.
        kwargs: Other columns, unused.

    Returns:
        `list[float]`: One of 0.0, 0.9 and 1.0 per completion.

    >>> original_format_reward(["<think>the left cup</think> It is here: <REF_POS>", "<think>a</think>"])
    [1.0, 0.0]
    """
    return [_format_score(completion_text(completion)) for completion in completions]


def _format_score(text: str) -> float:
    blocks = list(_THINK_BLOCK.finditer(text))
    if len(blocks) != 1 or text.count(REF_TOKEN) != 1:
        return 0.0
    before, reasoning, after = text[: blocks[0].start()], blocks[0][1], text[blocks[0].end() :]
    if not reasoning.strip() or REF_TOKEN not in after:
        return 0.0
    num_words = len(after.partition(REF_TOKEN)[0].split())
    is_neat = not before.strip() and len(reasoning) <= MAX_REASONING_CHARACTERS and num_words <= MAX_STRAY_WORDS
    return 1.0 if is_neat else 0.9


def original_mask_reward(
    completions: Sequence[Any] | None = None,
    *,
    pred_masks: Sequence[torch.Tensor] | torch.Tensor,
    mask_labels: Sequence[torch.Tensor] | torch.Tensor,
    num_objects: Sequence[int] | torch.Tensor,
    slot_logits: Sequence[torch.Tensor] | torch.Tensor,
    mask_values: Literal["logits", "probabilities"] = "logits",
    **kwargs: Any,
) -> list[float]:
    """
    [`mask_reward`](segcompass_hf.training.mask_reward) of the original.

    It differs in three points: IoUs are taken over the padded canvas too (`valid_area` is ignored), slots are kept
    from a logit of 0.5 on (a probability of 0.62), and with one slot an empty mask for an empty target earns 0.

    Args:
        completions (`list`, *optional*): Unused.
        pred_masks, mask_labels, num_objects, slot_logits: As in `mask_reward`.
        mask_values (`"logits"` or `"probabilities"`, *optional*, defaults to `"logits"`):
            What `pred_masks` holds; probabilities outside [0, 1] are clamped, as are labels.
        kwargs: Other columns, unused.

    Returns:
        `list[float]`: In [0, 1], one per completion.

    >>> masks = torch.full((1, 1, 2, 2), -100.0)
    >>> original_mask_reward(
    ...     pred_masks=masks, mask_labels=torch.zeros(1, 1, 2, 2), num_objects=[0], slot_logits=torch.zeros(1, 1)
    ... )
    [0.0]
    """
    if mask_values not in ("logits", "probabilities"):
        raise ValueError(f'mask_values={mask_values!r} is not known; expected "logits" or "probabilities".')
    tables = []
    for batch in mask_batches(pred_masks, mask_labels, num_objects, slot_logits, None):
        masks, labels = batch.pred_masks.float(), batch.mask_labels.float().clamp(0, 1)
        probabilities = masks.sigmoid() if mask_values == "logits" else masks.clamp(0, 1)
        kept = (batch.slot_logits >= 0.5).float().masked_fill(batch.slot_logits.isnan(), torch.nan)
        table_of = single_object_table if kept.shape[1] == 1 else matched_iou_table
        tables.append(table_of(probabilities, labels, batch.num_objects, kept))
    if not tables:
        return []
    table = torch.cat(tables).cpu().numpy()
    if table.ndim == 3:
        return matched_iou_rewards(table)
    for sample, score in enumerate(table[:, 0]):
        check_numbers(sample, score)
    return table[:, 0].tolist()
