# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Golden numbers of the original's training: rewards through our parity functions, GRPO through TRL's own code.

Losses and matching are compared in `TestLosses` of test_original_parity. TRL differs from the original by design in
three places, and the size of each difference is tested here: 1e-4 instead of 1e-6 beside the standard deviation of a
group's rewards, no clamp on the KL estimator, and a KL weighted by the importance ratio (`use_bias_correction_kl`,
which can be switched off).
"""

import pytest
import torch
from original_rewards import original_format_reward, original_mask_reward
from parity import TOLERANCE, golden, under

from segcompass_hf.losses_segcompass import segmentation_loss
from segcompass_hf.modeling_masks import valid_area
from segcompass_hf.training.rewards.mask_scores import matched_iou_rewards, matched_iou_table

FORMAT_WEIGHT, MASK_WEIGHT = 0.3, 0.7


class TestRewards:
    def test_format_strings(self):
        cases = golden("rewards")[1]["format_reward"]
        assert len(cases) == 36 and {case["r"] for case in cases} == {0.0, 0.9, 1.0}
        found = original_format_reward([case["s"] for case in cases])
        assert found == [case["r"] for case in cases]

    def test_single_object_masks(self):
        tensors, description = golden("rewards")
        *cases, batch = description["mask_reward"]
        assert len(cases) == 6
        found = original_mask_reward(
            pred_masks=tensors["mask_reward.masks"],  # (6, 1, height, width)
            mask_labels=tensors["mask_reward.gt"],
            num_objects=[1] * 6,
            slot_logits=torch.zeros(6, 1),
            mask_values="probabilities",
        )
        assert found == pytest.approx([case["r"] for case in cases], abs=1e-6)
        assert sum(found) / 6 == pytest.approx(batch["batched"], abs=1e-6)
        joint = [FORMAT_WEIGHT + MASK_WEIGHT * value for value in found]
        assert joint == pytest.approx([case["rseg_with_good_format"] for case in cases], abs=1e-6)

    @pytest.mark.parametrize("index", range(12))
    def test_joint_score(self, index):
        tensors, description = golden("rewards")
        assert len(description["scots"]) == 12
        case, inputs = description["scots"][index], under(tensors, f"scots.{index}.")
        assert case["i"] == index
        count = case["n_gt"]  # -1: the original's single-object reward
        arguments = {
            "pred_masks": inputs["masks"][None],
            "mask_labels": inputs["gt"][None],
            "num_objects": [max(count, 0)] if count >= 0 else [1],
            "slot_logits": inputs["conf"][None],
            "mask_values": "probabilities",
        }
        assert (inputs["masks"].shape[0] == 1) == (count < 0)
        (mask_score,) = original_mask_reward(**arguments)
        if count >= 0:
            assert mask_score == pytest.approx(case["hungarian_mean_iou"], abs=1e-6)
            assert int((inputs["conf"] >= 0.5).sum()) == case["n_kept"]
        (format_score,) = original_format_reward([case["string"]])
        assert FORMAT_WEIGHT * format_score + MASK_WEIGHT * mask_score == pytest.approx(case["score"], abs=1e-6)

    def test_rewards_of_a_rollout(self):
        """The original's reward manager: decodes what the mask shows, and pays at the last token of an answer."""
        tensors, description = golden("rewards")
        inputs, settings = under(tensors, "manager."), description["manager"]
        shown = inputs["attention_mask"][:, settings["prompt_length"] :].bool()  # (3, tokens)
        texts = [
            "".join(settings["vocab"][str(token)] for token in ids[mask].tolist())
            for ids, mask in zip(inputs["responses"], shown, strict=True)
        ]
        mask_scores = original_mask_reward(
            pred_masks=inputs["masks"],
            mask_labels=inputs["gt"],
            num_objects=[settings["n_gt"]] * 3,
            slot_logits=inputs["conf"],
            mask_values="probabilities",
        )
        found = torch.tensor(original_format_reward(texts)) * FORMAT_WEIGHT + torch.tensor(mask_scores) * MASK_WEIGHT
        expected = inputs["reward"].sum(1)
        torch.testing.assert_close(found[:2], expected[:2], atol=1e-6, rtol=0)
        # The third answer has no token at all: the original has nowhere to put its reward, TRL keeps it.
        assert not shown[2].any() and expected[2] == 0 and found[2] == pytest.approx(0.7 * 0.1234, abs=1e-4)

    def test_matching_over_the_padded_canvas(self):
        """Soft IoU and assignment of the reward are those of the losses, whose golden values TestLosses compares."""
        tensors, description = golden("losses")
        for name in ("multi", "multi_oversize_hw"):
            inputs = under(tensors, f"{name}.in.")
            probabilities, labels = inputs["ref_logits_256"].sigmoid(), inputs["mask_float_256"]
            counts = inputs["n_multi_objects"]
            table = matched_iou_table(probabilities, labels, counts, kept=torch.ones(labels.shape[:2]))
            found = matched_iou_rewards(table.numpy())
            for sample, (slots, objects) in enumerate(description["cases"][name]["assignment_r_c"]):
                if not slots:
                    continue
                iou = tensors[f"{name}.match_iou.{sample}"][slots, objects]
                assert found[sample] == pytest.approx(iou.sum().item() / labels.shape[1], abs=1e-5)


class TestWeightSchedules:
    """The original's weights per step through the trainer's own settings, and the whole loss with them."""

    @pytest.mark.parametrize("setting", ["default", "before", "after"])
    def test_weights_of_the_step(self, setting, tmp_path):
        from segcompass_hf.configuration_segcompass import SegCompassConfig
        from segcompass_hf.training.grpo.config import SegCompassGRPOConfig

        tensors, description = golden("losses")
        original = description["settings"][setting]["config"]
        rate, switch = original["heatmap_dice_rate"], original["adjust_loss_step"]

        def within(suffix: str) -> dict[str, float]:
            dice, focal = original[f"dice_loss_coef{suffix}"], original[f"focal_loss_coef{suffix}"]
            return {"mask_dice_weight": dice, "heatmap_dice_weight": rate * dice, "mask_focal_weight": focal}

        args = SegCompassGRPOConfig(
            output_dir=str(tmp_path),
            seg_loss_weight=original["seg_loss_coef"],
            conf_loss_weight=original["conf_loss_coef"],
            match_confidence_weight=0.0,
            **within(""),
            loss_weight_switch_step=switch if switch >= 0 else None,
            switched_loss_weights=within("_new") if switch >= 0 else None,
            num_generations=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
        )
        inputs = under(tensors, "multi.in.")
        side = inputs["mask_logits"].shape[-1]
        output = segmentation_loss(
            inputs["ref_logits_256"],
            inputs["mask_logits"],
            inputs["conf_logits"],
            inputs["mask_float_256"],
            inputs["n_multi_objects"],
            valid_area(inputs["unpadded_hw"], map_size=side, canvas=4 * side),
            match_valid_area_only=False,
            empty_samples="zero",
            **args.loss_weights(SegCompassConfig(), description["settings"][setting]["global_steps"]),
        )
        expected = description["cases"]["multi"]["out"][setting]
        total = original["seg_loss_coef"] * expected["seg_loss"] + original["conf_loss_coef"] * expected["conf_loss"]
        torch.testing.assert_close(output.loss, torch.tensor(total), **TOLERANCE)


@pytest.fixture(scope="module")
def grpo_trainer(tmp_path_factory):
    """TRL's own trainer around a language model of 16 hidden units; its model is never what a test looks at."""
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = tiny_tokenizer("llava")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return GRPOTrainer(
        model,
        reward_funcs=original_format_reward,
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("grpo")),
            per_device_train_batch_size=6,
            num_generations=3,
            loss_type="bnpo",
            scale_rewards="group",
            epsilon=golden("rl")[1]["cliprange"],
            beta=0.0,
            use_bias_correction_kl=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tokenizer,
    )


def test_our_defaults_are_what_is_compared(grpo_trainer):
    from dataclasses import fields

    from segcompass_hf.training.grpo.config import SegCompassGRPOConfig

    ours = {field.name: field.default for field in fields(SegCompassGRPOConfig)}
    compared = ("loss_type", "scale_rewards", "use_bias_correction_kl", "epsilon", "epsilon_high", "delta")
    compared += ("importance_sampling_level", "multi_objective_aggregation", "num_iterations", "temperature")
    assert {name: ours[name] for name in compared} == {name: getattr(grpo_trainer.args, name) for name in compared}
    assert (ours["beta"], ours["num_generations"]) == (0.2, 8)


class TestAdvantages:
    @staticmethod
    def advantages(trainer, monkeypatch, rewards: torch.Tensor) -> torch.Tensor:
        """Those TRL computes for one group of answers with these rewards."""
        size = len(rewards)
        monkeypatch.setattr(trainer, "num_generations", size)
        answers = ([[1]] * size, [[5]] * size, None, ["text"] * size, None, {}, None, None)
        monkeypatch.setattr(trainer, "_generate", lambda prompts: answers)
        monkeypatch.setattr(trainer, "_calculate_rewards", lambda *args: rewards[:, None])
        return trainer._generate_and_score_completions([{"prompt": "a"}] * size)["advantages"]

    @pytest.mark.parametrize("group", ["a", "b", "d"])
    def test_group_normalisation(self, grpo_trainer, monkeypatch, group):
        tensors, description = golden("rl")
        rows = [index for index, uid in enumerate(description["uid"]) if uid == group]
        rewards = tensors["token_level_rewards"].sum(1)[rows]
        expected = tensors["advantages"][rows]  # (size, tokens)
        mask = tensors["eos_mask"][rows].bool()
        per_answer = expected[:, 0]
        assert torch.equal(expected, per_answer[:, None] * mask)  # one value per answer, zero after its end
        found = self.advantages(grpo_trainer, monkeypatch, rewards)
        # By design TRL divides by std + 1e-4, the original by std + 1e-6: a factor that is exactly known.
        std = rewards.std()
        torch.testing.assert_close(found * (std + 1e-4) / (std + 1e-6), per_answer, atol=1e-5, rtol=0)
        assert (found - per_answer).abs().max() <= 1e-4 / (std + 1e-4) * per_answer.abs().max() + 1e-6
        torch.testing.assert_close(found, per_answer, atol=1e-3, rtol=0)
        assert group == "d" or per_answer.abs().min() > 0.1

    def test_a_group_of_one(self, grpo_trainer, monkeypatch):
        """The original pays an answer without companions its bare reward; by TRL it teaches nothing."""
        tensors, description = golden("rl")
        row = description["uid"].index("c")
        rewards = tensors["token_level_rewards"][row].sum(0, keepdim=True)
        assert rewards > 0 and tensors["advantages"][row, 0] == pytest.approx(rewards.item(), abs=1e-6)
        assert self.advantages(grpo_trainer, monkeypatch, rewards).tolist() == [0.0]


class TestPolicyLoss:
    @staticmethod
    def loss(trainer, monkeypatch, beta: float, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """TRL's loss on the golden log-probabilities, these with their gradient, and the metrics it logs."""
        tensors, _ = golden("rl")
        log_probs = tensors["log_prob"].clone().requires_grad_()
        scores = (log_probs, tensors["entropy"], None)
        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: scores)
        monkeypatch.setattr(trainer, "beta", beta)
        monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1, raising=False)
        trainer._metrics["train"].clear()
        trainer.model.train()
        loss = trainer._compute_loss(
            trainer.model,
            {
                "prompt_ids": torch.ones(8, 1, dtype=torch.long),
                "prompt_mask": torch.ones(8, 1, dtype=torch.long),
                "completion_ids": tensors["labels"],
                "completion_mask": tensors["eos_mask"],
                "advantages": advantages,
                "old_per_token_logps": tensors["old_log_prob"],
                "ref_per_token_logps": tensors["ref_log_prob"],
            },
        )
        loss.backward()
        return loss.detach(), log_probs, {name: values[-1] for name, values in trainer._metrics["train"].items()}

    def test_clipped_loss(self, grpo_trainer, monkeypatch):
        tensors, _ = golden("rl")
        # The golden advantages are per token and zero after the end of an answer, where the mask is zero as well.
        for advantages in (tensors["advantages"], tensors["advantages"][:, 0]):
            loss, log_probs, metrics = self.loss(grpo_trainer, monkeypatch, beta=0.0, advantages=advantages)
            torch.testing.assert_close(loss, tensors["pg_loss"], **TOLERANCE)
            assert metrics["clip_ratio/region_mean"] == pytest.approx(tensors["pg_clipfrac"].item(), abs=1e-6)
        ratio = (tensors["log_prob"] - tensors["old_log_prob"]).exp()
        torch.testing.assert_close(ratio, tensors["ratio"], rtol=1e-5, atol=1e-5)
        mask = tensors["eos_mask"]
        ppo_kl = ((tensors["old_log_prob"] - tensors["log_prob"]) * mask).sum() / mask.sum()
        torch.testing.assert_close(ppo_kl, tensors["ppo_kl"], **TOLERANCE)
        # Gradient: -advantage * ratio over the tokens, none where the clip holds or the mask is zero.
        is_clipped = ((advantages[:, None] > 0) & (ratio > 1.2)) | ((advantages[:, None] < 0) & (ratio < 0.8))
        expected = (-advantages[:, None] * ratio).masked_fill(is_clipped, 0) * mask / mask.sum()
        torch.testing.assert_close(log_probs.grad, expected, **TOLERANCE)
        assert expected.count_nonzero() > 10

    def test_kl_without_the_clamp(self, grpo_trainer, monkeypatch):
        tensors, description = golden("rl")
        assert description["kl"] == "low_var_kl"
        advantages = torch.zeros(8)
        mask, clamped = tensors["eos_mask"].bool(), tensors["kld"]
        log_ratio = tensors["ref_log_prob"] - tensors["log_prob"]
        free = log_ratio.exp() - log_ratio - 1  # k3, what TRL adds
        torch.testing.assert_close(free.clamp(-10, 10), clamped, **TOLERANCE)
        loss, log_probs, metrics = self.loss(grpo_trainer, monkeypatch, beta=1.0, advantages=advantages)
        torch.testing.assert_close(loss, free[mask].mean(), rtol=1e-5, atol=1e-5)
        assert metrics["kl"] == pytest.approx(loss.item(), rel=1e-5)
        # The estimator is never negative, so the clamp acts above 10 alone: there, and nowhere else, TRL is larger.
        torch.testing.assert_close(clamped[mask].mean(), tensors["kl_masked_mean"], **TOLERANCE)
        excess = (free - 10).clamp(min=0)
        assert excess.count_nonzero() > 0
        torch.testing.assert_close(loss - excess[mask].mean(), tensors["kl_masked_mean"], **TOLERANCE)
        torch.testing.assert_close(log_probs.grad, (1 - log_ratio.exp()) * mask / mask.sum(), rtol=1e-5, atol=1e-5)

    def test_kl_weighted_by_the_importance_ratio(self, grpo_trainer, monkeypatch):
        """TRL's default: the same estimator times the ratio, through which a gradient runs as well."""
        tensors, _ = golden("rl")
        monkeypatch.setattr(grpo_trainer.args, "use_bias_correction_kl", True)
        loss, log_probs, _ = self.loss(grpo_trainer, monkeypatch, beta=1.0, advantages=torch.zeros(8))
        mask, log_ratio = tensors["eos_mask"].bool(), tensors["ref_log_prob"] - tensors["log_prob"]
        free = log_ratio.exp() - log_ratio - 1
        torch.testing.assert_close(loss, (free * tensors["ratio"])[mask].mean(), rtol=1e-5, atol=1e-5)
        expected = tensors["ratio"] * ((1 - log_ratio.exp()) + free) * mask / mask.sum()
        torch.testing.assert_close(log_probs.grad, expected, rtol=1e-4, atol=1e-4)


class TestLogProbabilities:
    def test_selected_log_probabilities_and_entropy(self):
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

        tensors, _ = golden("rl")
        logits, labels = tensors["logits"], tensors["labels"]
        torch.testing.assert_close(selective_log_softmax(logits, labels), tensors["logprobs"], **TOLERANCE)
        torch.testing.assert_close(entropy_from_logits(logits), tensors["entropy"], **TOLERANCE)
        log_probs, entropy = selective_log_softmax_and_entropy(logits, labels)
        torch.testing.assert_close(log_probs, tensors["logprobs"], **TOLERANCE)
        torch.testing.assert_close(entropy, tensors["entropy"], **TOLERANCE)

    @pytest.mark.parametrize("cast", [False, True])
    def test_fused_head(self, cast):
        """The head that TRL scores with: here the logits are the hidden states, and the head is the identity."""
        from types import SimpleNamespace

        from trl.trainer.utils import add_fused_lm_head

        tensors, _ = golden("rl")
        logits, labels = tensors["logits"], tensors["labels"]
        head = torch.nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
        torch.nn.init.eye_(head.weight)

        class Model:
            config = SimpleNamespace(get_text_config=SimpleNamespace)

            def forward(self):
                """What TRL replaces."""

            def base_model(self, **inputs):
                return SimpleNamespace(last_hidden_state=logits)

            def get_output_embeddings(self):
                return head

        model = Model()
        add_fused_lm_head(model, cast_lm_head_to_fp32=cast, outputs=("log_probs", "entropy"))
        output = model.forward(shift_labels=labels, fused_lm_head=True)
        torch.testing.assert_close(output.log_probs, tensors["logprobs"], **TOLERANCE)
        torch.testing.assert_close(output.entropy, tensors["entropy"], **TOLERANCE)


def test_answers_end_with_the_first_end_token(grpo_trainer, monkeypatch):
    tensors, description = golden("rl")
    sampled, expected = tensors["eosmask_in"], tensors["eosmask_out"]
    prompt = torch.ones(3, 2, dtype=torch.long)
    monkeypatch.setattr(grpo_trainer, "eos_token_ids", [description["eos_token"]])
    monkeypatch.setattr(grpo_trainer.model, "generate", lambda **inputs: torch.cat([prompt, sampled], dim=1))
    found, _ = grpo_trainer._generate_single_turn(prompt.tolist(), None, {}, 1)
    assert found == [ids[mask.bool()].tolist() for ids, mask in zip(sampled, expected, strict=True)]
