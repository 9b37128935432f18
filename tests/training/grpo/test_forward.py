# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward of joint training on a family whose prompt is seen both ways: no log-probability sees a later token."""

import pytest
import torch

pytest.importorskip("trl")

import odd_vlms  # noqa: E402
from grpo import tiny_trainer  # noqa: E402

from segcompass_hf.training.grpo import passes  # noqa: E402
from segcompass_hf.training.grpo.forward import add_joint_forward  # noqa: E402


def log_probs(model, sequences, prompt: int):
    """Of the completions, as TRL asks for them."""
    inputs = odd_vlms.odd_inputs("paligemma")
    labels = sequences.clone()
    labels[:, :prompt] = -100
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequences[:, prompt:])], 1)
    images = {name: inputs[name] for name in ("pixel_values", "token_type_ids")}
    with torch.no_grad():
        return model(input_ids=sequences, attention_mask=mask, labels=labels, fused_lm_head=True, **images).log_probs


def test_paligemmas_policy_does_not_see_what_comes():
    model = odd_vlms.odd_model("paligemma")
    add_joint_forward(model, temperature=1.0, cast_to_fp32=False)
    ids = odd_vlms.odd_inputs("paligemma")["input_ids"]
    prompt = ids.shape[1]
    words = torch.randint(10, odd_vlms.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    sequences = torch.cat([ids, words], 1)
    changed = sequences.clone()
    changed[:, -2] = 10 + (changed[:, -2] - 9) % 50
    before, after = (log_probs(model, each, prompt)[:, -6:] for each in (sequences, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


def test_per_token_inputs_of_trl_are_cut_at_the_prompt(tmp_path, monkeypatch):
    """TRL marks what was written with 0, in every family; the model lets the prompt's grow."""
    trainer, given = tiny_trainer(tmp_path, "gemma3"), []
    inputs = trainer._prepare_inputs(list(trainer.get_train_dataloader())[0])
    assert inputs["token_type_ids"].shape[1] == inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
    made = passes.sequence_inputs
    spy = lambda vlm, all, *rest: given.append(all["token_type_ids"].shape[1]) or made(vlm, all, *rest)  # noqa: E731
    monkeypatch.setattr(passes, "sequence_inputs", spy)
    trainer.compute_loss(trainer.model, inputs)
    assert given and set(given) == {inputs["prompt_ids"].shape[1]}
