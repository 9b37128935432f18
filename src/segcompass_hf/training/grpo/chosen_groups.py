# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups of completions: the samples of one prompt, and whether rewards tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .targets import SegmentationTargets


@dataclass
class SampledGroup:
    """The completions of one prompt, sampled and judged, before they are trained on.

    Args:
        row (`dict`): Of the data set, with its `prompt`.
        targets ([`SegmentationTargets`]): Of this row alone.
        prompt_ids (`list[int]`): Token ids of the prompt.
        images (`list`): Of the prompt.
        completion_ids (`list[list[int]]`): Token ids, one list per completion.
        completions (`list`): As TRL decodes them.
        logprobs (`list[list[float | None]]`, *optional*): Of the sampler, where it is not the model itself.
        rewards (`torch.Tensor` of shape `(num_generations, num_reward_functions)`): Unweighted.
        right (`list[bool]`): Whether each chose the targets and nothing else.
        num_given (`list[int]`): Tokens at the start of each that were given, not written.
        guided (`bool`): Whether a reference had a part in it.
        extra (`dict[str, list]`): What reward functions logged of each by name (`log_extra`).
    """

    row: dict[str, Any]
    targets: SegmentationTargets
    prompt_ids: list[int]
    images: Any
    completion_ids: list[list[int]]
    completions: list[Any]
    logprobs: list[list[float | None]] | None
    rewards: torch.Tensor
    right: list[bool]
    num_given: list[int]
    guided: bool = False
    extra: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class ChosenGroups:
    """Groups to train on, in the form in which TRL asks for them.

    Args:
        groups (`list[SampledGroup]`): Of this process, all of one size.
    """

    groups: list[SampledGroup]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per completion."""
        return [group.row for group in self.groups for _ in group.completions]

    @property
    def targets(self) -> SegmentationTargets:
        """One entry per completion."""
        return SegmentationTargets.joined([group.targets.take([0] * len(group.completions)) for group in self.groups])

    @property
    def rewards(self) -> torch.Tensor:
        """Of this process's completions, `(num_completions, num_reward_functions)`."""
        return torch.cat([group.rewards for group in self.groups])

    @property
    def extra(self) -> dict[str, list[Any]]:
        """What reward functions logged of each completion, by name; `None` where they did not."""
        extra = {name: [] for group in self.groups for name in group.extra}
        for name, values in extra.items():
            for group in self.groups:
                values += group.extra.get(name, [None] * len(group.completions))
        return extra

    @property
    def generated(self) -> tuple:
        """What TRL's `_generate` returns: prompt ids, completion ids, which tokens were written, completions, the
        sampler's log-probabilities, further columns, images, images of tools."""
        groups = self.groups
        prompt_ids = [group.prompt_ids for group in groups for _ in group.completions]
        completion_ids = [ids for group in groups for ids in group.completion_ids]
        given = [number for group in groups for number in group.num_given]
        written = None
        if any(given):
            written = [
                [0] * number + [1] * (len(ids) - number) for ids, number in zip(completion_ids, given, strict=True)
            ]
        logprobs = None
        if groups[0].logprobs is not None:
            logprobs = [values for group in groups for values in group.logprobs]
        images = [group.images for group in groups for _ in group.completions]
        completions = [completion for group in groups for completion in group.completions]
        tool_images = [[] for _ in completions]
        return prompt_ids, completion_ids, written, completions, logprobs, {}, images, tool_images


def equal_groups(values: torch.Tensor, group_size: int) -> torch.BoolTensor:
    """Groups all of whose values are exactly the same, `(num_groups,)`: they teach nothing.

    A standard deviation would not tell: the mean of equal numbers is rounded, and TRL divides what that leaves by as
    little as 1e-4.

    Args:
        values (`torch.Tensor` of shape `(num_completions, num_values)`): Groups one after the other; NaN equals NaN.
        group_size (`int`): Completions of a group.
    """
    grouped = values.nan_to_num(nan=float("-inf")).view(-1, group_size, values.shape[1])
    return (grouped == grouped[:, :1]).all(2).all(1)


def compared_rewards(rewards: torch.Tensor, weights: torch.Tensor, aggregation: str) -> torch.Tensor:
    """What decides whether rewards of a group differ: their weighted sum, or, where each function is normalised on its
    own (`"normalize_then_sum"`), all of them; `(num_completions, 1 or num_reward_functions)`."""
    if aggregation == "normalize_then_sum":
        return rewards
    return total_rewards(rewards, weights)[:, None]


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums `(num_completions,)`, as TRL adds rewards up; NaN where no function applied."""
    totals = (rewards * weights.to(rewards.device)).nansum(1)
    return totals.masked_fill(rewards.isnan().all(1), float("nan"))


def share_equal_answers(outputs: dict[str, torch.Tensor], keys: Sequence[Any]) -> None:
    """Give completions that are the same answer to the same prompt the very same masks, in place.

    Beside other rows of a batch, and with other padding, the same tokens lead to masks that differ in the last bits,
    and to rewards that do.

    Args:
        outputs (`dict[str, torch.Tensor]`): Masks and logits, one row per completion.
        keys (`Sequence`): One per completion: prompt and answer.
    """
    first: dict[Any, int] = {}
    places = [first.setdefault(key, row) for row, key in enumerate(keys)]
    if len(first) < len(places):
        for name, value in outputs.items():
            outputs[name] = value[torch.tensor(places, device=value.device)]


__all__ = [
    "ChosenGroups",
    "SampledGroup",
    "compared_rewards",
    "equal_groups",
    "share_equal_answers",
    "total_rewards",
]
