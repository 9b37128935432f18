# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sampling: every prompt is read and passed once, a few at a time, and masks see the states of their completion."""

import pytest
import torch
from grpo import tiny_rows, tiny_trainer

from segcompass_hf.text_stack_segcompass import decoder_layers

pytest.importorskip("trl")

from segcompass_hf.training import SegCompassGRPOTrainer  # noqa: E402
from segcompass_hf.training.grpo import sampling  # noqa: E402
from segcompass_hf.training.grpo.groups import answers_in_a_row, parts_of_prompts  # noqa: E402
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
@pytest.mark.parametrize("at_a_time", [2, 64])
def test_masks_are_those_of_a_plain_forward(tmp_path, family, at_a_time, monkeypatch):
    monkeypatch.setattr(sampling, "COMPLETIONS_AT_A_TIME", at_a_time)
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
    assert first == ([1] * 4 if at_a_time == 2 else [4])
    assert max(rows for rows, tokens in passes if tokens == 1) == (2 if at_a_time == 2 else 8)

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


def test_parts_of_prompts():
    """Three prompts with pictures of 1, 2 and 1 patches, two at a time."""
    fields = {
        "pixel_values": torch.tensor([[1.0], [2.0], [2.5], [3.0]]),
        "image_grid_thw": torch.tensor([[1, 1, 1], [1, 1, 2], [1, 1, 1]]),
        "mm_token_type_ids": [[0, 1], [1, 1], [1]],
    }
    one, other = parts_of_prompts([[5, 6], [7, 8], [9]], ["a", "b", "c"], fields, 2)
    assert one[:2] == ([[5, 6], [7, 8]], ["a", "b"]) and other[:2] == ([[9]], ["c"])
    assert one[2]["pixel_values"].flatten().tolist() == [1, 2, 2.5]
    assert other[2]["pixel_values"].tolist() == [[3]] and other[2]["image_grid_thw"].tolist() == [[1, 1, 1]]
    assert other[2]["mm_token_type_ids"] == [[1]] and set(one[2]) == set(fields)
    tiles = {"pixel_values": torch.zeros(7, 3, 4, 4)}
    assert list(parts_of_prompts([[5], [6], [7]], None, tiles, 2)) == [([[5], [6], [7]], None, tiles)]
