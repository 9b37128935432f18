"""A frozen vision tower of convolutions stays the one that answers later: its batch norms rest."""

import torch
from tiny import tiny_model
from torch import nn

from segcompass_hf.freezing_segcompass import keep_frozen_statistics


def with_batch_norm():
    """A tiny model, and a batch norm that is part of its vision tower."""
    model, norm = tiny_model(), nn.BatchNorm2d(3)
    model.vlm.base_model.vision_tower.norm_of_pixels = norm
    return model, norm


def test_frozen_ones_rest_in_training_whatever_comes_first():
    for freeze_first in (True, False):
        model, norm = with_batch_norm()
        assert model.train().training and norm.training  # its weights train so far
        if freeze_first:
            model.freeze_for_training().train()
        else:
            model.train().freeze_for_training()
        assert model.training and model.vlm.base_model.vision_tower.training and not norm.training
        for parameter in norm.parameters():
            parameter.requires_grad_(True)
        assert model.train().training and norm.training and not model.eval().training


def test_statistics_do_not_move():
    model, norm = with_batch_norm()
    model.freeze_for_training().train()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    pixels = 5 + torch.randn(2, 3, 8, 8)
    expected = (pixels - norm.running_mean[0]) / (norm.running_var[0] + norm.eps).sqrt()
    torch.testing.assert_close(norm(pixels), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


def test_those_without_weights_rest_too():
    plain = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Dropout()).train()
    keep_frozen_statistics(plain)
    assert [module.training for module in plain] == [False, True]
