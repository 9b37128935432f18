# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The SAE's input as the original code builds it, for checkpoints trained that way (`concept_input="duplicated"`)."""

import torch


def duplicate_completion(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt + completion + completion again, the second copy with its padding counted as tokens.

    A row's tokens and then its whole completion row (padding included) are moved to the right end; what does not fit
    into the sequence length is cut off at the end.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`): Prompt and completion.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 on tokens.
        completion_ids (`torch.Tensor` of shape `(batch_size, completion_length)`): Completions, padded on the right.
        pad_token_id (`int`): Fills the left.

    Returns:
        `tuple`: ids, attention mask and position ids, each of shape `(batch_size, sequence_length)`.
    """
    length = input_ids.shape[1]
    ids = torch.full_like(input_ids, pad_token_id)
    mask = torch.zeros_like(attention_mask)
    for row in range(input_ids.shape[0]):
        tokens = torch.cat([input_ids[row, attention_mask[row].bool()], completion_ids[row]])[:length]
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = 1
    return ids, mask, (mask.long().cumsum(-1) - 1).clamp(min=0)


def duplicated_inputs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor | None,
    pad_token_id: int,
    image_token_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pass that the SAE reads: [`duplicate_completion`] from where the first completion of the batch begins, and
    [`limit_image_tokens`]. Arguments and what it returns (ids, mask) have the shape of `input_ids`.

    Raises:
        ValueError: `completion_mask` is `None`.
    """
    if completion_mask is None:
        raise ValueError(
            'concept_input="duplicated" repeats the completion and needs a completion_mask, got None; for prompts '
            'alone use concept_input="once".'
        )
    starts = completion_mask.long().argmax(dim=1)
    start = int(starts[completion_mask.bool().any(dim=1)].min()) if bool(completion_mask.any()) else None
    ids = input_ids.masked_fill(~attention_mask.bool(), pad_token_id)
    completion = ids[:, start:] if start is not None else ids[:, :0]
    ids, mask, _ = duplicate_completion(input_ids, attention_mask, completion, pad_token_id)
    if image_token_id is not None:
        per_row = int((input_ids[:, :start] == image_token_id).sum(1).max())
        ids = limit_image_tokens(ids, image_token_id, per_row, pad_token_id)
    return ids, mask


def limit_image_tokens(
    input_ids: torch.Tensor, image_token_id: int, max_tokens: int, replacement_id: int
) -> torch.Tensor:
    """Replace image placeholders beyond the first `max_tokens` of each row: they have no image features.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`): Token ids.
        image_token_id (`int`): The placeholder.
        max_tokens (`int`): Placeholders that have features, per row.
        replacement_id (`int`): What the others become.

    Example:

    ```python
    >>> limit_image_tokens(torch.tensor([[9, 9, 5, 9]]), image_token_id=9, max_tokens=2, replacement_id=0).tolist()
    [[9, 9, 5, 0]]
    ```
    """
    is_image = input_ids == image_token_id
    surplus = is_image & (is_image.long().cumsum(-1) > max_tokens)
    return input_ids.masked_fill(surplus, replacement_id)
