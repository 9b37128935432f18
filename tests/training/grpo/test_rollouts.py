# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of sampled completions by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import SamConfig

from segcompass_hf.training.grpo.rollouts import RolloutMasks, rollout_metrics
from segcompass_hf.training.grpo.targets import SegmentationTargets

ANSWER = "<think>the left one</think><REF_POS><REF_POS>"


def columns(mask_logit_threshold, slot_logit_threshold=0.0):
    """Two completions on maps of 4 x 4: the object is the left half; logits are 3, 1, -1, -3 from left to right."""
    left = torch.zeros(1, 4, 4)
    left[:, :, :2] = 1
    sizes = torch.tensor([[4, 4]] * 2)
    targets = SegmentationTargets(
        [None] * 2, [left] * 2, torch.tensor([1, 0]), sizes, sizes, [0, 0], torch.tensor([0, 0])
    )
    maps = torch.tensor([3.0, 1.0, -1.0, -3.0]).expand(2, 2, 4, 4)
    outputs = {"heatmap_logits": maps, "pred_masks": maps, "slot_logits": torch.tensor([[1.0, -1.0]] * 2)}
    config = SimpleNamespace(
        sam_config=SamConfig(prompt_encoder_config={"image_size": 4, "patch_size": 4}),
        slot_logit_threshold=slot_logit_threshold,
        mask_logit_threshold=mask_logit_threshold,
        num_slots=2,
    )
    return RolloutMasks(targets).columns(outputs, config), targets


@pytest.mark.parametrize(
    ("threshold", "iou"),
    [
        (0.0, 1.0),  # two columns, both of the object
        (2.0, 1 / 2),  # one column of two
        (-2.0, 2 / 3),  # three columns, two of them of the object
        (5.0, 0.0),  # nothing
    ],
)
def test_giou_is_of_the_masks_that_the_model_answers_with(threshold, iou):
    made, targets = columns(threshold)
    assert {column["mask_logit_threshold"] for column in made} == {threshold}
    figures = rollout_metrics(made, [ANSWER, ANSWER], targets)
    nothing_there = float(threshold == 5.0)  # of the second completion, which means no object
    assert figures["segmentation/giou"] == pytest.approx((iou + nothing_there, 2))
    assert figures["segmentation/kept_slots"] == (2.0, 2)
    made, targets = columns(threshold, slot_logit_threshold=9.0)
    assert rollout_metrics(made, [ANSWER, ANSWER], targets)["segmentation/giou"] == (1.0, 2)
