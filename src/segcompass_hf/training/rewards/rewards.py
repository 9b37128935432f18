# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rewards of the reinforcement learning, as plain TRL reward functions: the form of the answer and its masks.

The paper's reward is `0.3 * format_reward + 0.7 * mask_reward` (`reward_weights=[0.3, 0.7]`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .mask_scores import (
    mask_batches,
    matched_iou_rewards,
    matched_iou_table,
    single_object_rewards,
    single_object_table,
)

THINK_START, THINK_END, REF_TOKEN = "<think>", "</think>", "<REF_POS>"
MAX_REASONING_CHARACTERS = 2048
MAX_STRAY_WORDS = 10
# Tokenizers that do not mark these as special leave them in the decoded text.
END_TOKENS = (
    "</s>",
    "<eos>",
    "<pad>",
    "<end_of_turn>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
)


def format_reward(completions: Sequence[Any], num_slots: int | Sequence[int] = 4, **kwargs: Any) -> list[float]:
    """
    Reward the form `<think>reasoning</think>` followed by exactly `num_slots` `<REF_POS>`.

    1.0 where nothing but white space stands beside them; 0.9 where up to 10 further words stand between or after, or
    the reasoning is longer than 2,048 characters; 0.0 otherwise: text in front, no or an empty or a second or a nested
    think block, a `<REF_POS>` too many, too few or inside the reasoning. Tokens that end a turn do not count.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Answers, as text or as conversations whose last message is the answer.
        num_slots (`int` or `list[int]`, *optional*, defaults to 4):
            `<REF_POS>` expected, for all completions or for each.
        kwargs: Other columns, unused.

    Returns:
        `list[float]`: One of 0.0, 0.9 and 1.0 per completion.

    Examples:

    >>> from segcompass_hf.training.rewards.rewards import format_reward

    >>> format_reward(["<think>the left cup</think><REF_POS><REF_POS>", "<REF_POS>"], num_slots=2)
    [1.0, 0.0]
    >>> wordy = [{"role": "assistant", "content": "<think>the left cup</think> It is here: <REF_POS>"}]
    >>> format_reward([wordy], num_slots=[1])
    [0.9]
    """
    counts = _slots_per_completion(num_slots, len(completions))
    return [_judge(completion, count)[0] for completion, count in zip(completions, counts, strict=True)]


def is_well_formed(completion: Any, num_slots: int = 4) -> bool:
    """
    Whether [`format_reward`] gives the completion more than 0.

    >>> is_well_formed("<think>the left cup</think><REF_POS> done", num_slots=1)
    True
    """
    return _judge(completion, num_slots)[0] > 0


def format_problem(completion: Any, num_slots: int = 4) -> str | None:
    """
    Why [`format_reward`] gives the completion less than 1.0, in words for a log; `None` where it does not.

    >>> format_problem("<think>the left cup</think><REF_POS>", num_slots=4)
    '1 <REF_POS> instead of 4'
    >>> format_problem("<think>the left cup</think><REF_POS>", num_slots=1) is None
    True
    """
    return _judge(completion, num_slots)[1]


def _judge(completion: Any, num_slots: int) -> tuple[float, str | None]:
    text = _without_end_tokens(completion_text(completion))
    if not text.startswith(THINK_START):
        return 0.0, f"{'text before' if THINK_START in text else 'no'} {THINK_START}"
    reasoning, closing_tag, rest = text.removeprefix(THINK_START).partition(THINK_END)
    if not closing_tag:
        return 0.0, f"no {THINK_END}"
    if THINK_START in reasoning or THINK_START in rest or THINK_END in rest:
        return 0.0, "a second or nested think tag"
    if not reasoning.strip():
        return 0.0, "empty reasoning"
    if REF_TOKEN in reasoning:
        return 0.0, f"{REF_TOKEN} inside the reasoning"
    if (found := rest.count(REF_TOKEN)) != num_slots:
        return 0.0, f"{found} {REF_TOKEN} instead of {num_slots}"
    if (words := len(rest.replace(REF_TOKEN, " ").split())) > MAX_STRAY_WORDS:
        return 0.0, f"{words} words after the reasoning, more than {MAX_STRAY_WORDS}"
    if words:
        return 0.9, f"{words} word{'s' if words > 1 else ''} after the reasoning"
    if (length := len(reasoning.strip())) > MAX_REASONING_CHARACTERS:
        return 0.9, f"{length} characters of reasoning, more than {MAX_REASONING_CHARACTERS}"
    return 1.0, None


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of a conversation's last message, text parts joined."""
    content = completion
    if isinstance(completion, Sequence) and not isinstance(completion, str):
        content = completion[-1]["content"] if completion else ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"a completion holds a {type(content).__name__}; expected a string or a list of messages such as "
            '[{"role": "assistant", "content": "..."}].'
        )
    return content


def _without_end_tokens(text: str) -> str:
    text = text.strip()
    while token := next((token for token in END_TOKENS if text.endswith(token)), None):
        text = text.removesuffix(token).rstrip()
    return text


def _slots_per_completion(num_slots: int | Sequence[int], num_completions: int) -> list[int]:
    given = np.asarray(num_slots)
    counts = [int(given)] * num_completions if given.ndim == 0 else [int(count) for count in given]
    if len(counts) != num_completions:
        raise ValueError(
            f"got {len(counts)} values of num_slots for {num_completions} completions; pass one, or one for each."
        )
    return counts


def mask_reward(
    completions: Sequence[Any] | None = None,
    *,
    pred_masks: Sequence[torch.Tensor] | torch.Tensor,
    mask_labels: Sequence[torch.Tensor] | torch.Tensor,
    num_objects: Sequence[int] | torch.Tensor,
    slot_logits: Sequence[torch.Tensor] | torch.Tensor | None = None,
    valid_area: Sequence[torch.Tensor] | torch.Tensor | None = None,
    slot_logit_threshold: float | Sequence[float] = 0.0,
    **kwargs: Any,
) -> list[float]:
    """
    Reward masks that cover the objects, one slot each.

    With several slots: those whose logit exceeds the threshold are kept and matched to the objects (Hungarian
    algorithm) by soft IoU; the reward is the sum of matched IoUs over `max(kept slots, objects)`, so that extra and
    missing slots both cost. Without objects it is 1 where nothing is kept, else 0.

    With one slot: `0.5 * soft IoU + 0.2 * soft Dice + 0.3 * hard IoU` with its object, whatever its logit. Without an
    object it is 1 where the slot is not kept or no pixel reaches a probability of 0.5, else 0.

    Args:
        completions (`list`, *optional*): Unused; the place where TRL passes the answers.
        pred_masks (`list[torch.Tensor]` or `torch.Tensor`):
            Mask logits of each completion, `(num_slots, height, width)`, or all, `(batch_size, num_slots, height,
            width)`.
        mask_labels (`list[torch.Tensor]` or `torch.Tensor`):
            Targets in [0, 1] of the same size, `(num_masks, height, width)` each; the first `num_objects` are objects.
        num_objects (`list[int]` or `torch.Tensor` of shape `(batch_size,)`): Objects of each completion's sample.
        slot_logits (`list[torch.Tensor]` or `torch.Tensor`, *optional*):
            Confidences, logits, `(num_slots,)` each; every slot is kept where they are missing.
        valid_area (`list[torch.Tensor]` or `torch.Tensor`, *optional*):
            Bool, `(height, width)` each: the pixels that count, without padding; all where missing.
        slot_logit_threshold (`float` or `list[float]`, *optional*, defaults to 0.0): The model's own.
        kwargs: Other columns, unused.

    Returns:
        `list[float]`: In [0, 1], one per completion.

    Raises:
        `ValueError`: shapes do not fit, or a completion's masks or logits are NaN.

    Examples:

    >>> import torch
    >>> from segcompass_hf.training.rewards.rewards import mask_reward

    >>> left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> pred_masks = torch.stack([left, 1 - left]) * 200 - 100  # logits of two slots
    >>> labels = torch.stack([1 - left, torch.zeros(2, 2)])  # one object, on the right
    >>> mask_reward(
    ...     pred_masks=[pred_masks] * 3,
    ...     mask_labels=[labels] * 3,
    ...     num_objects=[1, 1, 0],
    ...     slot_logits=[torch.tensor([-3.0, 3.0]), torch.tensor([3.0, 3.0]), torch.tensor([-3.0, -3.0])],
    ... )
    [1.0, 0.5, 1.0]
    """
    tables = []
    for batch in mask_batches(pred_masks, mask_labels, num_objects, slot_logits, valid_area, slot_logit_threshold):
        kept = torch.ones(batch.pred_masks.shape[:2], device=batch.pred_masks.device)
        if batch.slot_logits is not None:
            kept = (batch.slot_logits > batch.thresholds).float().masked_fill(batch.slot_logits.isnan(), torch.nan)
        table_of = single_object_table if kept.shape[1] == 1 else matched_iou_table
        probabilities = batch.pred_masks.float().sigmoid()
        tables.append(table_of(probabilities, batch.mask_labels, batch.num_objects, kept, batch.valid_area))
    if not tables:
        return []
    table = torch.cat(tables).cpu().numpy()
    return single_object_rewards(table) if table.ndim == 2 else matched_iou_rewards(table)
