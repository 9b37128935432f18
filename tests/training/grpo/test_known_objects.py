# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Objects of a row as maps beside those of the model."""

import numpy as np
import pytest
import torch
from tiny import tiny_mask, tiny_processor

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.training.grpo.known_objects import known_objects

CPU = torch.device("cpu")


def test_targets_come_first_and_all_of_them_beyond_the_slots_too():
    masks = [encode_mask(mask) for mask in tiny_mask(5)]
    processor = tiny_processor(num_slots=2)
    row = {"masks": masks[:3], "distractor_masks": masks[3:]}
    same, unknown, nothing = dict(row), {"masks": masks[:1], "distractor_masks": None}, {"masks": []}
    first, second, third, fourth = known_objects([row, same, unknown, nothing], processor, CPU)
    size = processor.mask_size
    assert first["object_masks"].shape == (5, size, size) and first["object_masks"].dtype == torch.bool
    assert (first["num_targets"], first["others_known"]) == (3, True) and second is first
    expected = processor.geometry.soft_mask_targets(torch.from_numpy(tiny_mask(5))) > 0.5
    assert torch.equal(first["object_masks"], expected)
    assert (third["num_targets"], third["others_known"]) == (1, False) and third["object_masks"].shape[0] == 1
    assert (fourth["num_targets"], fourth["others_known"]) == (0, False) and len(fourth["object_masks"]) == 0


def test_an_object_smaller_than_a_cell_is_in_the_cell_that_it_fills_most():
    mask = np.zeros((480, 640), dtype=bool)
    mask[100:102, 300:302] = True
    (found,) = known_objects([{"masks": [encode_mask(mask)]}], tiny_processor(), CPU)
    maps = found["object_masks"]
    shares = tiny_processor().geometry.soft_mask_targets(torch.from_numpy(mask[None]))
    if not shares.any():
        pytest.fail("the object vanishes on the canvas; make it larger")
    assert 0 < maps.sum() < 5 and bool(maps.flatten()[shares.flatten().argmax()])
