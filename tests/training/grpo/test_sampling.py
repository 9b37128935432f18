# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sampling: every prompt is read and passed once, and masks see the states of their completion."""

import pytest
import torch
from grpo import tiny_rows, tiny_trainer
from tiny import tiny_model

from segcompass_hf.text_stack_segcompass import decoder_layers

pytest.importorskip("trl")

from segcompass_hf.training import SegCompassGRPOTrainer  # noqa: E402
from segcompass_hf.training.grpo.groups import answers_in_a_row  # noqa: E402
from segcompass_hf.training.grpo.rollouts import masks_of_rollouts  # noqa: E402


class Recorder(SegCompassGRPOTrainer):
    """Keeps what goes through the joints."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.seen = prompts, completion_ids_list, self._rollouts
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _tokenize_prompts(self, prompts):
        self.tokenized = super()._tokenize_prompts(prompts)
        return self.tokenized


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_masks_are_those_of_a_plain_forward(tmp_path, family):
    settings = {"per_device_train_batch_size": 8, "num_generations": 2}
    trainer = tiny_trainer(tmp_path, family, cls=Recorder, **settings)
    trainer.model.train()
    passes = []
    decoder_layers(trainer.core.vlm)[0].register_forward_pre_hook(
        lambda module, args, kwargs: passes.append((args[0] if args else kwargs["hidden_states"]).shape[:2]),
        with_kwargs=True,
    )
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    first = [rows for rows, tokens in passes if tokens > 1]
    assert first == [4] and max(rows for rows, tokens in passes if tokens == 1) == 8

    prompts, completion_ids, rollouts = trainer.seen
    prompt_ids, images, fields = trainer.tokenized
    assert len(prompt_ids) == len(images) == 8 and prompt_ids[0] == prompt_ids[1]
    assert len(fields["pixel_values" if family in ("llava", "gemma3") else "image_grid_thw"]) == 4
    widths = {len(ids) for ids in prompt_ids}
    assert len(widths) > 1, "prompts are as long as one another"
    captured = rollouts.segment(trainer.core, batch_size=3)
    plain = masks_of_rollouts(
        trainer.model, trainer.processing_class, prompts, completion_ids, rollouts.targets, batch_size=8
    )
    for name, value in captured.items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=1e-4)


def test_where_no_states_are_captured_every_completion_is_sampled_behind_its_own_prompt(tmp_path):
    """`generate` alone would repeat the pictures of a family by its own rule, which not every family has."""
    trainer = tiny_trainer(tmp_path, model=tiny_model(concept_input="duplicated"), cls=Recorder)
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert trainer.seen[2].copies == 1 and len(trainer.tokenized[2]["pixel_values"]) == 4


def test_prompts_in_evaluation_with_one_completion_each(tmp_path):
    trainer = tiny_trainer(tmp_path, num_generations_eval=1)
    trainer.model.eval()
    metrics = trainer.evaluate(tiny_rows())
    assert metrics["eval_segmentation/mask_dice"] > 0


def test_answers_in_a_row():
    rows = [{"prompt": prompt} for prompt in "aabb"]
    assert answers_in_a_row(rows, torch.tensor([0, 0, 1, 1]), 2) == 2
    assert answers_in_a_row(rows, torch.tensor([0, 1, 2, 2]), 2) == 1  # two pictures
    assert answers_in_a_row(rows, torch.tensor([0, 0, 0, 0]), 4) == 1  # two texts
    assert answers_in_a_row(rows[:3], torch.tensor([0, 0, 1]), 2) == 1
    assert answers_in_a_row(rows, torch.tensor([0, 1, 2, 3]), 1) == 1
