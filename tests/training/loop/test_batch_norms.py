"""Batch norms in training: normalised by what they have stored, which stays as it is."""

import pytest
import torch
from grpo import tiny_trainer
from supervised import make_trainer, tiny_row
from tiny import tiny_model
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


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("stage", ["warmup", "segmentation", "grpo"])
def test_a_step_of_any_trainer_leaves_the_vision_tower_as_it_is(stage, adapters, tmp_path):
    """Pixels pass a batch norm on their way into the tower; Trainer puts the model into training before every step."""
    model, norm, modes = tiny_model(), nn.BatchNorm2d(3), []
    tower = model.vlm.base_model.vision_tower
    tower.norm_of_pixels = norm.requires_grad_(False)
    tower.register_forward_pre_hook(lambda module, args: (norm(args[0]), *args[1:]))
    norm.register_forward_pre_hook(lambda module, args: modes.append(tower.training))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    settings = {"model": model, "max_steps": 1}
    if adapters:
        settings["peft_config"] = pytest.importorskip("peft").LoraConfig(r=2, target_modules=r".*layers\.3\..*q_proj")
    if stage == "grpo":
        pytest.importorskip("trl")
        trainer = tiny_trainer(tmp_path, **settings)
    else:
        trainer = make_trainer(stage, "llava", tmp_path, [tiny_row(index) for index in range(8)], **settings)
    trainer.train()
    assert any(modes), "the norm was read in training"
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
