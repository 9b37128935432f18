# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The reward without noise, worked out by hand on strips of pixels."""

import doctest

import pytest
import torch

from segcompass_hf.training.rewards import object_reward as module
from segcompass_hf.training.rewards.object_reward import object_reward, right_answers

WIDTH = 12
LEFT, MIDDLE, RIGHT = range(0, 4), range(4, 8), range(8, 12)


def strip(pixels):
    mask = torch.zeros(1, WIDTH, dtype=torch.bool)
    mask[0, list(pixels)] = True
    return mask


def columns(*answers, targets=(LEFT, MIDDLE), others=(RIGHT,), valid=range(WIDTH)):
    """An answer is a list of masks, of which the last of three slots, always full, is not kept."""
    objects = [strip(pixels) for pixels in (*targets, *(others or ()))]
    empty = torch.zeros(0, 1, WIDTH, dtype=torch.bool)
    full = torch.ones(1, WIDTH, dtype=torch.bool)
    slots = [[*map(strip, answer), *[full] * (3 - len(answer))] for answer in answers]
    count = len(answers)
    return {
        "pred_masks": [torch.stack(masks) * 4.0 - 2 for masks in slots],
        "slot_logits": [torch.tensor([1.0] * len(answer) + [-1.0] * (3 - len(answer))) for answer in answers],
        "object_masks": [torch.stack(objects) if objects else empty] * count,
        "num_targets": [len(targets)] * count,
        "others_known": [others is not None] * count,
        "valid_area": [strip(valid)] * count,
        "slot_logit_threshold": [0.0] * count,
        "mask_logit_threshold": [0.0] * count,
    }


def test_docstring_examples():
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([LEFT, MIDDLE], 1.0),
        ([[*LEFT, *MIDDLE]], 1.0),  # one mask of both
        ([LEFT, [4, 5]], 0.5 + 0.3 + 0.2),  # right, and 6 of 8 pixels are the upper tier
        ([LEFT, [4]], 0.5 + 0.3 + 0.2 * 2 / 3),  # 5 of 8
        ([[0], [4]], 0.5 + 0.3 + 0.2 / 3),  # 2 of 8, the first tier above none
        ([LEFT], 0.3 * 2 / 3 + 0.2 * 2 / 3),  # one of two, 4 of 8 pixels
        ([LEFT, MIDDLE, RIGHT], 0.3 * 4 / 5 + 0.2 * 2 / 3),  # one too many: 8 of 12 pixels
        ([RIGHT], 0.0),
        ([], 0.0),
    ],
)
def test_values(answer, expected):
    assert object_reward(**columns(answer)) == [pytest.approx(expected, abs=1e-12)]


@pytest.mark.parametrize(
    ("answer", "others", "expected"),
    [
        ([], (RIGHT,), 1.0),  # nothing is there, nothing is said
        ([[]], (RIGHT,), 1.0),  # a mask without a pixel is never shown
        ([LEFT], (RIGHT,), 0.0),
        ([RIGHT], None, 0.0),
    ],
)
def test_without_a_target(answer, others, expected):
    assert object_reward(**columns(answer, targets=(), others=others)) == [expected]


def test_without_other_objects_more_than_half_of_a_mask_has_to_lie_on_a_target():
    most, half = [2, 3, 4], [2, 3, 8, 9]
    rewards = object_reward(**columns([most], [half], targets=(LEFT,), others=None))
    assert rewards == pytest.approx([0.8 + 0.2 / 3, 0.2 / 3])  # 2 of 5 pixels, and 2 of 6
    assert object_reward(**columns([half], targets=(LEFT,), others=()))[0] > 0.8  # nothing else is there to choose


def test_answers_that_choose_alike_get_exactly_the_same():
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(50):
        spoilt = [place for place in (*LEFT, *MIDDLE) if torch.rand((), generator=generator) < 0.95]
        answer = [[place for place in spoilt if place in LEFT], [place for place in spoilt if place in MIDDLE]]
        if len(spoilt) >= 6:  # of 8: the upper tier
            seen |= set(object_reward(**columns(answer)))
    assert seen == {1.0}


def test_pixels_outside_of_the_image_do_not_count():
    assert object_reward(**columns([[*LEFT, *RIGHT], MIDDLE], valid=range(8))) == [1.0]


def test_right_answers():
    made = columns([LEFT, MIDDLE], [LEFT], [[0], [4]], [LEFT, MIDDLE, RIGHT])
    rows = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
    assert right_answers(rows) == [True, False, True, False]


@pytest.mark.parametrize("name", ["pred_masks", "slot_logits"])
def test_nan_is_an_error(name):
    made = columns([LEFT], [LEFT])
    made[name][1] = made[name][1] * float("nan")
    with pytest.raises(ValueError, match="completion 1 has NaN"):
        object_reward(**made)
