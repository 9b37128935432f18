# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A prompt computed once for its completions: the same loss and gradients as one computed for each of them."""

import pytest
import torch
from grpo import tiny_rows, tiny_trainer
from tiny import tiny_model

pytest.importorskip("trl")

from segcompass_hf.training.grpo import sharing  # noqa: E402
from segcompass_hf.training.grpo.groups import prompt_numbers, shared_prompts, with_groups_together  # noqa: E402

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
GROUP = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8}


def batches_of(trainer):
    """Micro-batches of one sampling, as training makes them."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def loss_and_gradients(trainer, batch):
    """Of one micro-batch, and what was computed for it beside the loss."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, batch.pop("ref_per_token_logps", None)


def check_both_ways(trainer, batch, monkeypatch, rtol=1e-5):
    """The loss and all gradients agree to 1e-5, relative to the largest of the part of the model."""
    assert shared_prompts(batch) is not None
    shared = loss_and_gradients(trainer, dict(batch))
    monkeypatch.setattr(type(trainer), "_shared_prompts", lambda self, inputs: None)
    whole = loss_and_gradients(trainer, dict(batch))
    monkeypatch.undo()
    assert shared[0] == pytest.approx(whole[0], rel=rtol)
    assert shared[1].keys() == whole[1].keys()
    parts = {}
    for name, gradient in whole[1].items():
        part = parts.setdefault(name.removeprefix("base_model.model.").split(".")[0], [0.0, 0.0])
        part[0] = max(part[0], float((shared[1][name] - gradient).abs().max()))
        part[1] = max(part[1], float(gradient.abs().max()))
    for part, (difference, largest) in parts.items():
        assert largest > 1e-7 and difference <= rtol * largest, (part, difference, largest)
    return shared, whole


def calls_of(trainer, monkeypatch, batch):
    """Rows and tokens of every pass through the first and the last decoder layer, in one forward."""
    from segcompass_hf.text_stack_segcompass import decoder_layers

    layers, seen = decoder_layers(trainer.core.vlm), []
    handles = [
        layers[index].register_forward_pre_hook(
            lambda module, args, kwargs, at=index: seen.append((at, *(args[0] if args else kwargs["hidden_states"]).shape[:2])),
            with_kwargs=True,
        )
        for index in (0, len(layers) - 1)
    ]
    trainer.compute_loss(trainer.model, dict(batch))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients(tmp_path, family, attention, monkeypatch):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    trainer = tiny_trainer(tmp_path, family, model=model, **GROUP | {"per_device_train_batch_size": 8}, beta=0.1)
    (batch,) = batches_of(trainer)
    assert not batch["prompt_mask"].all(), "no prompt is padded"
    check_both_ways(trainer, batch, monkeypatch)
