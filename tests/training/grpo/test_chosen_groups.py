# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups of equal rewards, and equal answers."""

import torch

from segcompass_hf.training.grpo.chosen_groups import (
    ChosenGroups,
    SampledGroup,
    compared_rewards,
    equal_groups,
    share_equal_answers,
    total_rewards,
)
from segcompass_hf.training.grpo.targets import SegmentationTargets

NAN = float("nan")


def test_equal_is_exactly_equal():
    third = 1 / 3
    values = torch.tensor([[0.1]] * 3 + [[third], [third], [third + 1e-7]] + [[NAN]] * 3)
    assert equal_groups(values, 3).tolist() == [True, False, True]


def test_functions_are_compared_one_by_one_only_where_each_is_normalised():
    rewards, weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.5])
    assert equal_groups(compared_rewards(rewards, weights, "sum_then_normalize"), 2).tolist() == [True]
    assert equal_groups(compared_rewards(rewards, weights, "normalize_then_sum"), 2).tolist() == [False]


def test_totals_leave_out_functions_that_did_not_apply():
    totals = total_rewards(torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 2.0]]), torch.tensor([2.0, 3.0]))
    assert totals[[0, 2]].tolist() == [2.0, 8.0] and totals[1].isnan()


def test_the_same_answer_to_the_same_prompt_has_the_same_masks():
    outputs = {"pred_masks": torch.arange(4.0), "slot_logits": torch.arange(4.0) + 10}
    share_equal_answers(outputs, ["a", "b", "a", "c"])
    assert outputs["pred_masks"].tolist() == [0, 1, 0, 3] and outputs["slot_logits"].tolist() == [10, 11, 10, 13]


def group(name, rewards, num_given=(0, 0)):
    labels, sizes = torch.full((1, 2, 2), float(name)), torch.tensor([[name, name]])
    return SampledGroup(
        row={"sample_id": name},
        targets=SegmentationTargets([labels[0]], [labels], torch.tensor([name]), sizes, sizes, [0], torch.tensor([0])),
        prompt_ids=[name],
        images=[f"image {name}"],
        completion_ids=[[1, 2], [3, 4, 5]],
        completions=["x", "y"],
        logprobs=None,
        rewards=torch.tensor(rewards)[:, None],
        right=[False, True],
        num_given=list(num_given),
    )


def test_chosen_groups_are_what_trl_asks_for():
    chosen = ChosenGroups([group(1, [0.0, 1.0]), group(2, [0.5, 0.25], num_given=(1, 2))])
    assert [row["sample_id"] for row in chosen.rows] == [1, 1, 2, 2]
    assert chosen.rewards.tolist() == [[0.0], [1.0], [0.5], [0.25]]
    targets = chosen.targets
    assert (
        targets.num_objects.tolist() == [1, 1, 2, 2] and targets.original_sizes.tolist() == [[1, 1]] * 2 + [[2, 2]] * 2
    )
    assert targets.image_numbers.tolist() == [0, 0, 1, 1]  # each group's own numbers began with 0
    assert targets.mask_labels[0] is targets.mask_labels[1] and targets.image_token_grids is None
    prompts, ids, written, completions, logprobs, extra, images, tool_images = chosen.generated
    assert prompts == [[1], [1], [2], [2]] and completions == ["x", "y", "x", "y"]
    assert ids == [[1, 2], [3, 4, 5]] * 2 and written == [[1, 1], [1, 1, 1], [0, 1], [0, 0, 1]]
    assert (logprobs, extra, tool_images) == (None, {}, [[]] * 4) and images[3] == ["image 2"]
    assert ChosenGroups([group(1, [0.0, 1.0])]).generated[2] is None  # nothing was given
