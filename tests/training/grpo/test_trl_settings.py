# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's own settings that bring signal, through our trainer: scaling, clipping higher, uncertain tokens, no KL."""

import pytest
import torch
from grpo import tiny_trainer

pytest.importorskip("trl")

REWARDS = [0.0, 1.0, 0.5, 0.7]  # of two groups: means .5 and .6, sample deviations .7071 and .1414, of all .4203


def given(completions, **columns):
    return REWARDS[: len(completions)]


def batch_of(tmp_path, **settings):
    trainer = tiny_trainer(tmp_path, reward_funcs=[given], **settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize(
    ("scale", "divisors"), [("none", [1.0] * 4), ("batch", [0.4203] * 4), ("group", [0.7071] * 2 + [0.1414] * 2)]
)
def test_scale_rewards(tmp_path, scale, divisors):
    _, output = batch_of(tmp_path, scale_rewards=scale)
    expected = [value / (divisor + 1e-4) for value, divisor in zip([-0.5, 0.5, -0.1, 0.1], divisors, strict=True)]
    assert output["advantages"].tolist() == pytest.approx(expected, rel=1e-3)


def only_policy(**settings):
    return {"seg_loss_weight": 0.0, "conf_loss_weight": 0.0, "beta": 0.0, "train_heads": False, **settings}


def test_epsilon_high_lets_likelier_tokens_grow_further(tmp_path):
    """With a ratio of 1.25 on all tokens: clipped at 1.2 tokens of a gain have no gradient, at 1.28 they have."""
    gradients = {}
    for high in (0.2, 0.28):
        trainer, output = batch_of(tmp_path, epsilon=0.2, epsilon_high=high, scale_rewards="none", **only_policy())
        output["advantages"] = torch.tensor([1.0, 1.0, 1.0, 1.0])
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
            output["completion_ids"].shape[1],
            pixel_values=output["pixel_values"],
            num_images=output["num_images"],
        )
        output["old_per_token_logps"] = logps.detach() - torch.tensor(1.25).log()
        loss = trainer.compute_loss(trainer.model, output)
        assert loss.item() == pytest.approx(-min(1.25, 1 + high), abs=1e-4)
        loss.backward()
        gradients[high] = sum(float(p.grad.abs().sum()) for p in trainer.model.parameters() if p.grad is not None)
        clipped = trainer._metrics["train"]["clip_ratio/high_mean"][-1]
        assert clipped == (1.0 if high == 0.2 else 0.0)
    assert gradients[0.2] == 0 < gradients[0.28]


def test_only_uncertain_tokens_train(tmp_path):
    trainer, output = batch_of(tmp_path, top_entropy_quantile=0.25, scale_rewards="none", **only_policy())
    seen = {}
    scored = trainer._get_per_token_logps_and_entropies

    def keep(*args, **kwargs):
        logps, entropies, aux = scored(*args, **kwargs)
        logps.retain_grad()
        seen.update(logps=logps, entropies=entropies)
        return logps, entropies, aux

    trainer._get_per_token_logps_and_entropies = keep
    trainer.compute_loss(trainer.model, output).backward()
    mask, trained = output["completion_mask"].bool(), seen["logps"].grad != 0
    uncertain = seen["entropies"] >= seen["entropies"][mask].quantile(0.75)
    assert torch.equal(trained, uncertain & mask) and 0 < trained.sum() < mask.sum()


def test_without_kl_there_is_no_reference(tmp_path):
    trainer, output = batch_of(tmp_path, **only_policy())
    assert trainer._make_reference() is None
    trainer.compute_loss(trainer.model, output)
    assert "ref_per_token_logps" not in output and "kl" not in trainer._metrics["train"]


def test_equal_rewards_have_exactly_no_advantage(tmp_path):
    """The float mean of three such rewards is another number, and TRL divides the difference by 1e-4."""
    value = 0.37322431802749634
    three = torch.full((3,), value)
    assert ((three - three.mean()) / 1e-4).abs().max() > 1e-4

    def equal(completions, **columns):
        return [value] * len(completions)

    trainer = tiny_trainer(tmp_path, reward_funcs=[equal], num_generations=3, per_device_train_batch_size=6)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert output["advantages"].tolist() == [0.0] * 6


def test_the_reward_of_objects_is_chosen_by_a_setting(tmp_path):
    from grpo import tiny_rows
    from tiny import tiny_model, tiny_processor

    from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer
    from segcompass_hf.training.rewards.object_reward import object_reward
    from segcompass_hf.training.rewards.rewards import format_reward, mask_reward

    for name, function in (("overlap", mask_reward), ("objects", object_reward)):
        args = SegCompassGRPOConfig(
            str(tmp_path), mask_reward=name, use_cpu=True, bf16=False, per_device_train_batch_size=4,
            num_generations=2, max_completion_length=6, report_to="none", max_steps=1,
        )  # fmt: skip
        trainer = SegCompassGRPOTrainer(tiny_model(), args, tiny_rows(), processing_class=tiny_processor())
        assert trainer.reward_funcs == [format_reward, function]
        trainer.train()
        (log,) = [line for line in trainer.state.log_history if "reward" in line] or [None]
        assert 0 <= log[f"rewards/{function.__name__}/mean"] <= 1 and 0 <= log["answers_right"] <= 1
