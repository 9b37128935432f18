# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A prompt computed once for its completions: the same loss and gradients as one computed for each of them."""

import logging

import pytest
import torch
from grpo import tiny_rows, tiny_trainer
from tiny import tiny_model, tiny_vlm_config

from segcompass_hf.text_stack_segcompass import decoder_layers

pytest.importorskip("trl")

from segcompass_hf.training.adapters import lora_config  # noqa: E402
from segcompass_hf.training.grpo import sharing  # noqa: E402
from segcompass_hf.training.grpo.groups import prompt_numbers, shared_prompts, with_groups_together  # noqa: E402
from segcompass_hf.training.grpo.prompt_cache import SharedPromptLayer  # noqa: E402

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
GROUPS = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}


def batches_of(trainer):
    """Micro-batches of one sampling, as training makes them."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def batch_of(trainer):
    """The only micro-batch of a sampling; random models write no end, so that two completions are cut short."""
    (batch,) = batches_of(trainer)
    for row, length in ((1, 5), (6, 3)):
        batch["completion_mask"][row, length:] = 0
        batch["completion_ids"][row, length:] = trainer.processing_class.tokenizer.pad_token_id
    assert not batch["prompt_mask"].all(), "no prompt is padded"
    return batch


def loss_and_gradients(trainer, batch):
    """Of one micro-batch, and what was computed for it beside the loss."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, batch.pop("ref_per_token_logps", None)


def check_both_ways(trainer, batch, monkeypatch, rtol=1e-5):
    """The loss and all gradients agree, relative to the largest of the part of the model, and prompts are shared."""
    passes = []
    shared_pass = sharing.shared_pass
    monkeypatch.setattr(
        sharing, "shared_pass", lambda *args, **kwargs: passes.append(1) or shared_pass(*args, **kwargs)
    )
    shared = loss_and_gradients(trainer, dict(batch))
    assert len(passes) == 2, "one to try it, one for the loss"
    whole = loss_and_gradients(trainer, {**batch, "image_numbers": torch.arange(len(batch["image_numbers"]))})
    assert len(passes) == 2, "of different pictures nothing is shared"
    assert shared[0] == pytest.approx(whole[0], rel=rtol)
    assert shared[1].keys() == whole[1].keys()
    parts = {}
    for name, gradient in whole[1].items():
        part = parts.setdefault(name.removeprefix("base_model.model.").split(".")[0], [0.0, 0.0])
        part[0] = max(part[0], float((shared[1][name] - gradient).abs().max()))
        part[1] = max(part[1], float(gradient.abs().max()))
    for part, (difference, largest) in parts.items():
        assert largest > 1e-7 and difference <= rtol * largest, (part, difference, largest)
    if shared[2] is not None:
        written = batch["completion_mask"].bool()
        torch.testing.assert_close(shared[2][written], whole[2][written], atol=1e-5, rtol=1e-5)
    return shared


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients(tmp_path, family, attention, monkeypatch):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    trainer = tiny_trainer(tmp_path, family, model=model, **GROUPS, beta=0.1)
    check_both_ways(trainer, batch_of(trainer), monkeypatch)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_in_double_precision_only_rounding_of_norms_differs(tmp_path, family, monkeypatch):
    trainer = tiny_trainer(tmp_path, family, model=tiny_model(family).double(), **GROUPS, beta=0.0)
    batch = batch_of(trainer)
    check_both_ways(trainer, batch, monkeypatch, rtol=1e-6)


def test_windows_shorter_than_the_prompt(tmp_path, monkeypatch):
    """Gemma 3 keeps the last keys of a sliding window alone: 7 of a prompt of more than 20 tokens."""
    model = tiny_model("gemma3", vlm_config=tiny_vlm_config("gemma3", sliding_window=8))
    trainer = tiny_trainer(tmp_path, "gemma3", model=model, **GROUPS, beta=0.1)
    batch = batch_of(trainer)
    kinds = model.config.vlm_config.text_config.layer_types
    assert "sliding_attention" in kinds[model.config.sae_layer :] and batch["prompt_ids"].shape[1] > 20
    check_both_ways(trainer, batch, monkeypatch)


@pytest.mark.parametrize("lora", [False, True])
def test_with_gradient_checkpointing_and_adapters(tmp_path, lora, monkeypatch):
    model = tiny_model()
    adapter = lora_config(model, r=2, dropout=0.0) if lora else None
    settings = GROUPS | {"gradient_checkpointing": True, "beta": 0.1, "peft_config": adapter}
    trainer = tiny_trainer(tmp_path, model=model, **settings)
    if lora:  # adapters begin at 0, and their first matrix without gradient
        for name, weight in trainer.model.named_parameters():
            if "lora_B.default" in name:
                torch.nn.init.normal_(weight, std=0.1)
    batch = batch_of(trainer)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # as `train` does
    runs = []
    layer = decoder_layers(trainer.core.vlm)[-1].mlp
    layer.register_forward_pre_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    check_both_ways(trainer, batch, monkeypatch)
    # To try it: 1 whole and 2 passes of a shared one; for the loss 2 and 1; each once more to go back.
    assert sum(runs) == 2 * (3 + 3)


def test_settings_of_checkpointing_that_lose_gradients_are_found_out(tmp_path, caplog, monkeypatch):
    trainer = tiny_trainer(tmp_path, **GROUPS, beta=0.0)
    batch = batch_of(trainer)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    told(caplog, monkeypatch)
    loss_and_gradients(trainer, dict(batch))
    assert "Prompts are computed anew for each of their completions" in caplog.text


def test_what_works_in_evaluation_is_tried_again_in_training(tmp_path, caplog, monkeypatch):
    """Evaluation does not checkpoint, so that it tells nothing of what checkpoints do to gradients."""
    trainer = tiny_trainer(tmp_path, **GROUPS, beta=0.0)
    batch = batch_of(trainer)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    told(caplog, monkeypatch)
    trainer.model.eval()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, dict(batch))
    assert "Prompts are computed anew" not in caplog.text
    trainer.model.train()
    loss_and_gradients(trainer, dict(batch))
    assert "Prompts are computed anew" in caplog.text


def told(caplog, monkeypatch):
    """Let the library's messages reach the test."""
    monkeypatch.setattr(logging.getLogger("segcompass_hf"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING")


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lambda keys, values: (keys.detach(), values.detach()), "gradients in prompts by"),
        (lambda keys, values: (keys.roll(1, 0), values), "last states by"),
        (lambda keys, values: (keys[:, :, 1:], values), "RuntimeError"),
    ],
)
def test_a_family_that_computes_something_else_falls_back_and_says_so_once(
    tmp_path, caplog, monkeypatch, wrong, reason
):
    trainer = tiny_trainer(tmp_path, **GROUPS, beta=0.1)
    batch = batch_of(trainer)
    update = SharedPromptLayer.update
    monkeypatch.setattr(SharedPromptLayer, "update", lambda *args, **kwargs: wrong(*update(*args, **kwargs)))
    told(caplog, monkeypatch)
    first = loss_and_gradients(trainer, dict(batch))
    again = loss_and_gradients(trainer, dict(batch))
    assert caplog.text.count("Prompts are computed anew") == 1 and reason in caplog.text
    whole = loss_and_gradients(trainer, {**batch, "image_numbers": torch.arange(len(batch["image_numbers"]))})
    assert first[0] == again[0] == whole[0]
    assert all(torch.equal(first[1][name], gradient) for name, gradient in whole[1].items())


def test_what_is_read_from_two_completions_is_not_shared(tmp_path, caplog, monkeypatch):
    trainer = tiny_trainer(tmp_path, model=tiny_model(concept_input="duplicated"), **GROUPS, beta=0.0)
    batch = batch_of(trainer)
    told(caplog, monkeypatch)
    loss_and_gradients(trainer, batch)
    assert 'concept_input="duplicated" reads concepts' in caplog.text


def test_references_before_the_answer_are_found(tmp_path, monkeypatch):
    """The original searches `<REF_POS>` in the prompt too, whose last states are then shared."""
    model = tiny_model(reference_search="sequence")
    trainer = tiny_trainer(tmp_path, model=model, **GROUPS, beta=0.0)
    batch = batch_of(trainer)
    batch["prompt_ids"][:, -2] = model.config.ref_token_id
    batch["completion_ids"][batch["completion_ids"] == model.config.ref_token_id] = 12
    check_both_ways(trainer, batch, monkeypatch)


def test_prompts_pass_the_decoder_once(tmp_path):
    trainer = tiny_trainer(tmp_path, **GROUPS, beta=0.1)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, dict(batch))  # tries it
    passes, encoded = [], []
    layers = decoder_layers(trainer.core.vlm)
    layers[0].register_forward_pre_hook(lambda module, args: passes.append(tuple(args[0].shape[:2])))
    sae = trainer.core.sae
    encode = sae.encode
    sae.encode = lambda states, *rest: encoded.append(len(states)) or encode(states, *rest)
    trainer.compute_loss(trainer.model, dict(batch))
    prompts, width = 2, batch["prompt_ids"].shape[1]
    assert passes == [(prompts, width), (8, batch["completion_ids"].shape[1])]
    alone = prompt_numbers(batch)
    each = [int(batch["prompt_mask"][(alone == number).nonzero()[0, 0]].sum()) for number in range(prompts)]
    assert sum(encoded) == sum(each) + int(batch["completion_mask"].sum())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_completions_of_a_prompt_stay_together(tmp_path, family):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4}
    trainer = tiny_trainer(tmp_path, family, **settings, rows=tiny_rows((1, 0, 2, 1), size=(56, 28)))
    orders = set()
    for seed in range(4):
        torch.manual_seed(seed)
        batches = batches_of(trainer)
        trainer._buffered_inputs, trainer._step = None, 0
        assert len(batches) == 4
        for batch in batches:
            assert len(set(prompt_numbers(batch).tolist())) == 1
            assert batch["num_objects"].unique().numel() == 1
            prompts = shared_prompts(batch)
            assert prompts.rows.tolist() == [0] * 4
            assert torch.equal(prompts.inputs["input_ids"], batch["prompt_ids"][:1])
            pixels = batch["pixel_values"]
            assert torch.equal(prompts.inputs["pixel_values"], pixels[: len(pixels) // 4])
        orders.add(tuple(int(batch["image_numbers"][0]) for batch in batches))
    assert len(orders) > 1, "prompts come in a random order"


def test_rows_are_moved_whole():
    """Four completions of two prompts in two micro-batches, their pictures of 1 and 2 patches in a row."""

    def column(*values):
        return torch.tensor(values)

    batches = [
        {
            "prompt_ids": column([1, 2], [0, 3]),
            "prompt_mask": column([1, 1], [0, 1]),
            "image_numbers": column(0, 1),
            "pixel_values": column([5.0], [6.0], [7.0]),
            "image_grid_thw": column([1, 1, 1], [1, 1, 2]),
            "num_images": [1, 1],
            "names": ["a", "b"],
            "num_items_in_batch": torch.tensor(9),
            "nothing": None,
        },
        {
            "prompt_ids": column([0, 3], [1, 2]),
            "prompt_mask": column([0, 1], [1, 1]),
            "image_numbers": column(1, 0),
            "pixel_values": column([6.0], [7.0], [5.0]),
            "image_grid_thw": column([1, 1, 2], [1, 1, 1]),
            "num_images": [1, 1],
            "names": ["c", "d"],
            "num_items_in_batch": torch.tensor(9),
            "nothing": None,
        },
    ]
    one, other = with_groups_together(batches)
    assert one["names"] == ["a", "d"] and other["names"] == ["b", "c"]
    assert one["pixel_values"].flatten().tolist() == [5, 5] and other["pixel_values"].flatten().tolist() == [
        6,
        7,
        6,
        7,
    ]
    assert one["image_grid_thw"].tolist() == [[1, 1, 1]] * 2 and other["num_images"] == [1, 1]
    assert int(other["num_items_in_batch"]) == 9 and one["nothing"] is None
    assert shared_prompts(batches[0]) is None
    prompts = shared_prompts(other)
    assert prompts.inputs["pixel_values"].flatten().tolist() == [6, 7] and prompts.length == 2
    assert set(prompts.inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
