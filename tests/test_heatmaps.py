# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Slot mapper: derived scores, initial values, independence of samples and slots."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from segcompass_hf.modeling_heatmaps import HeatmapBiasConv, SlotMapper

HIDDEN, SAM_DIM, D_SLOT = 12, 8, 6


def mapper(fuser="refine", heads=2, bias=-1.8) -> SlotMapper:
    heatmap = {"heatmap_heads": heads, "heatmap_fuser": fuser, "heatmap_bias_init": bias, "heatmap_concepts": False}
    config = SimpleNamespace(d_slot=D_SLOT, **heatmap)
    return SlotMapper(config, hidden_size=HIDDEN, sam_dim=SAM_DIM).eval()


def inputs(batch_size=2, num_slots=3, height=5, width=4):
    return (
        torch.randn(batch_size, num_slots, HIDDEN),
        torch.randn(batch_size, num_slots, D_SLOT),
        torch.randn(batch_size, SAM_DIM, height, width),
    )


def test_scores_by_hand():
    # W_q keeps the first 8 of 12 entries, W_k is the identity, 2 heads of 4: q = 1..8 and v = (1,1,0,0, 0,0,0,2) give
    # head 0: (1 + 2) / sqrt(4) = 1.5 and head 1: 8 * 2 / sqrt(4) = 8.
    model = mapper()
    with torch.no_grad():
        model.query_proj.weight.copy_(torch.eye(SAM_DIM, HIDDEN))
        model.key_proj.weight.copy_(torch.eye(SAM_DIM)[:, :, None, None])
    states = torch.arange(1.0, HIDDEN + 1).view(1, 1, HIDDEN)
    image = torch.zeros(1, SAM_DIM, 2, 3)
    image[0, :, 1, 2] = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 2])
    scores = model._scores(states, image)
    expected = torch.zeros(1, 1, 2, 2, 3)
    expected[0, 0, :, 1, 2] = torch.tensor([1.5, 8.0])
    torch.testing.assert_close(scores, expected)


def test_fusion_and_upsampling_by_hand():
    # Plain fuser with weights (2, -1) and bias 0.5 over the scores, then bilinear x4 (half-pixel centres).
    model = mapper(fuser="plain")
    with torch.no_grad():
        model.head_fuser.weight.copy_(torch.tensor([2.0, -1.0]).view(1, 2, 1, 1))
        model.head_fuser.bias.fill_(0.5)
    reference, slots, image = inputs(1, 1, 1, 2)
    states = F.silu(model.fuse_proj(model.fuse_norm(torch.cat([reference, model.slot_proj(slots)], -1))))
    scores = model._scores(states, image)[0, 0]
    left, right = (2 * scores[0] - scores[1] + 0.5)[0]
    # Two columns become eight: pixel j reads column (j + 0.5) / 4 - 0.5, clamped, i.e. shares 0 0 1/8 3/8 5/8 7/8 1 1.
    share = torch.tensor([0, 0, 1, 3, 5, 7, 8, 8]) / 8
    expected = (left + share * (right - left)).expand(4, 8)
    torch.testing.assert_close(model(reference, slots, image).heatmap_logits[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fuser", ["refine", "plain"])
def test_a_fresh_heatmap_of_a_blank_image_is_the_bias(fuser):
    reference, slots, _ = inputs()
    output = mapper(fuser)(reference, slots, torch.zeros(2, SAM_DIM, 5, 4))
    torch.testing.assert_close(output.heatmap_logits, torch.full((2, 3, 20, 16), -1.8))
    output = mapper(fuser, bias=0.25)(reference, slots, torch.zeros(2, SAM_DIM, 5, 4))
    torch.testing.assert_close(output.heatmap_logits, torch.full((2, 3, 20, 16), 0.25))


def test_bias_survives_a_second_initialisation_by_type():
    convolution = HeatmapBiasConv(4, 1, kernel_size=3, padding=1, bias_init=-1.8)
    with torch.no_grad():
        convolution.bias.fill_(7.0)
    convolution.reset_parameters()
    assert convolution.bias.item() == pytest.approx(-1.8)
    assert convolution.weight.abs().max() <= 1 / 6  # uniform within 1 / sqrt(4 * 3 * 3)
    assert convolution.weight.std() > 0.02


def test_batch_equals_singles_and_slots_are_independent():
    model, (reference, slots, image) = mapper(), inputs()
    batch = model(reference, slots, image)
    for row in range(2):
        single = model(reference[row : row + 1], slots[row : row + 1], image[row : row + 1])
        torch.testing.assert_close(batch.heatmap_logits[row : row + 1], single.heatmap_logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.slot_logits[row : row + 1], single.slot_logits, rtol=0, atol=1e-6)
    changed = slots.clone()
    changed[0, 1] += 1.0
    other = model(reference, changed, image)
    moved = (other.heatmap_logits - batch.heatmap_logits).abs().amax((-1, -2)) > 1e-5
    assert moved.tolist() == [[False, True, False], [False, False, False]]


def test_both_slots_and_reference_states_matter():
    model, (reference, slots, image) = mapper(), inputs()
    base = model(reference, slots, image).heatmap_logits
    assert (model(torch.zeros_like(reference), slots, image).heatmap_logits - base).abs().max() > 1e-4
    assert (model(reference, torch.zeros_like(slots), image).heatmap_logits - base).abs().max() > 1e-4


@pytest.mark.parametrize("fuser", ["refine", "plain"])
def test_gradient_reaches_every_parameter(fuser):
    model = mapper(fuser)
    output = model(*inputs())
    (output.heatmap_logits * torch.randn_like(output.heatmap_logits)).sum().add(output.slot_logits.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_bf16_stays_close():
    model, batch = mapper(), inputs()
    reference = model(*batch)
    output = model.to(torch.bfloat16)(*batch)
    assert output.heatmap_logits.dtype == output.slot_logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.heatmap_logits.float(), reference.heatmap_logits, rtol=0, atol=0.05)
    torch.testing.assert_close(output.slot_logits.float(), reference.slot_logits, rtol=0, atol=0.05)


def test_wrong_settings_and_shapes_are_named():
    with pytest.raises(ValueError, match="8 channels and heatmap_heads is 3"):
        mapper(heads=3)
    with pytest.raises(ValueError, match="heatmap_fuser is 'none'"):
        mapper(fuser="none")
    reference, slots, image = inputs()
    with pytest.raises(ValueError, match=r"slots \(2, 2, 6\).*must agree"):
        mapper()(reference, slots[:, :2], image)
