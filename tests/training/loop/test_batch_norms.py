"""Batch norms in training: normalised by what they have stored, which stays as it is."""

import torch
from torch import nn

from segcompass_hf.training.loop.batch_norms import keep_stored_statistics


def test_training_normalises_by_stored_statistics_and_leaves_them():
    """Stored mean 1, variance 4, gain 3, bias 5: 7 becomes 3 * (7 - 1) / 2 + 5 = 14, whatever else is in the batch."""
    norm = nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        for tensor, value in ((norm.running_mean, 1.0), (norm.running_var, 4.0), (norm.weight, 3.0), (norm.bias, 5.0)):
            tensor.fill_(value)
    model = keep_stored_statistics(nn.Sequential(norm, nn.Dropout(0.5)))
    model.train()
    normed = norm(torch.tensor([7.0, -100.0]).view(2, 1, 1, 1))
    assert normed.flatten()[0] == 14.0
    normed.sum().backward()
    assert norm.running_mean.item() == 1.0 and norm.running_var.item() == 4.0
    assert norm.weight.grad is not None and norm.bias.grad.item() == 2.0, "gains and biases train"
    assert model[1].training, "the rest of the model trains as before"


def test_a_batch_norm_that_stores_nothing_is_left_alone():
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    keep_stored_statistics(norm).train()
    assert norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)).mean().abs() < 1e-6
    assert norm.training
