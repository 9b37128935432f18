# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups chosen before they are trained on: what is sampled, dropped, guided, and what reaches the loss."""

import json

import pytest
import torch
from grpo import tiny_rows, tiny_trainer
from tiny import tiny_model

pytest.importorskip("trl")

from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer  # noqa: E402
from segcompass_hf.training.grpo.guidance import beginning_of, reference_answer  # noqa: E402

WORDS = "a box is red. a cup stands there. the answer is one"


def rows(count=8, kinds="ab", reasoning=WORDS):
    """Rows of two kinds in turn, each with an image of its own."""
    made = tiny_rows((1,) * count)
    columns = {"kind": [kinds[index % len(kinds)] for index in range(count)], "reasoning": [reasoning] * count}
    for name, values in columns.items():
        made = made.remove_columns(name).add_column(name, values, feature=made.features[name])
    return made


def equal_for(*sample_ids, value=0.3):
    """A reward that cannot tell the completions of some prompts apart, and all others by their place."""

    def reward(completions, sample_id, **columns):
        reward.calls.append(list(sample_id))
        return [value if its in sample_ids else place % 2 + 0.1 for place, its in enumerate(sample_id)]

    reward.calls = []
    return reward


class Wrong(SegCompassGRPOTrainer):
    """Whose samples are all wrong, but for a reference answer."""

    def _judge_rollouts(self, inputs, prompts, completions, completion_ids):
        columns, rewards = super()._judge_rollouts(inputs, prompts, completions, completion_ids)
        for column, row, ids in zip(columns, inputs, completion_ids, strict=True):
            column["answer_is_right"] = list(ids) == reference_answer(row, self.processing_class)
        return columns, rewards


class WithRollouts(SegCompassGRPOTrainer):
    """Sampled by a function of the caller's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, rollout_func=lambda prompts, trainer: {}, **kwargs)


class Elsewhere(SegCompassGRPOTrainer):
    """Sampled by another process, or by all of them."""

    _samples_here = False


def reward_the_reference(trainer):
    """1 for the reference's very tokens, 0 for all others."""

    def reward(completions, completion_ids, reasoning, **columns):
        references = [reference_answer({"reasoning": words}, trainer.processing_class) for words in reasoning]
        return [float(list(ids) == its) for ids, its in zip(completion_ids, references, strict=True)]

    trainer.reward_funcs[0] = reward


def batch_of(trainer):
    """One batch as training makes it, and the rows that it is of."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def test_equal_groups_are_replaced_by_prompts_of_their_kind(tmp_path):
    reward = equal_for("row-0", "row-2", "row-4")  # of the kind "a" row-6 alone is worth something
    trainer = tiny_trainer(
        tmp_path, rows=rows(), reward_funcs=[reward], max_resamplings=20, stratify_by="kind", shuffle_dataset=False
    )
    output = batch_of(trainer)
    assert reward.calls[0] == ["row-0", "row-0", "row-1", "row-1"] and reward.calls[-1] == ["row-6"] * 2
    assert {its for call in reward.calls[1:] for its in call} <= {"row-2", "row-4", "row-6"}
    # What is left goes to TRL once, as it was sampled: the group that was replaced is in its place.
    labels = [int(value) for value in output["num_objects"]]
    assert labels == [1] * 4 and output["advantages"].abs().min() > 0.5
    metrics = trainer._metrics["train"]
    tried = len(reward.calls) - 1
    assert metrics["groups/dropped"] == [pytest.approx(tried / (2 + tried))]
    assert metrics["groups/equal_rewards"] == [0.0]
    assert metrics["groups/reward_before_choice"] == [pytest.approx((0.3 * 2 + 0.1 + 1.1) / 4)]
    assert metrics["reward"] == [pytest.approx(0.6)]  # of what is trained on
    assert len(metrics["completions/mean_length"]) == 1  # of the prompts whose turn it was
    assert trainer._pool.teaches[0] is False and trainer._pool.teaches[6] is True


def test_within_the_budget_and_no_further_groups_stay_with_no_advantage(tmp_path):
    reward = equal_for(*[f"row-{index}" for index in range(8)], value=0.1 + 0.2)
    trainer = tiny_trainer(tmp_path, rows=rows(), reward_funcs=[reward], max_resamplings=3)
    output = batch_of(trainer)
    assert [len(call) for call in reward.calls] == [4] * 4
    assert output["advantages"].tolist() == [0.0] * 4
    assert trainer._metrics["train"]["groups/equal_rewards"] == [1.0]


def test_completions_rewards_and_gradient_are_those_that_trl_makes_without_choosing(tmp_path):
    """With nothing to choose, the path through choosing changes nothing."""
    gradients = []
    for name, settings in (("a", {}), ("b", {"max_resamplings": 2})):
        torch.manual_seed(0)
        trainer = tiny_trainer(tmp_path / name, rows=rows(), reward_funcs=[equal_for()], beta=0.1, **settings)
        output = batch_of(trainer)
        trainer.compute_loss(trainer.model, output).backward()
        weights = {key: p.grad.clone() for key, p in trainer.model.named_parameters() if p.grad is not None}
        gradients.append((output, weights))
    (plain, one), (chosen, two) = gradients
    assert plain.keys() == chosen.keys() and one.keys() == two.keys()
    for key in ("prompt_ids", "completion_ids", "completion_mask", "advantages", "pixel_values", "num_objects"):
        assert torch.equal(plain[key], chosen[key]), key
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_reference_takes_the_place_of_a_sample_where_all_are_wrong(tmp_path, family):
    settings = {"guidance": "rollout", "max_completion_length": 40, "num_iterations": 2, "beta": 0.1}
    trainer = tiny_trainer(tmp_path, family, rows=rows(), cls=Wrong, **settings)
    reward_the_reference(trainer)
    output = batch_of(trainer)
    reference = reference_answer({"reasoning": WORDS}, trainer.processing_class)
    ids, mask = output["completion_ids"], output["completion_mask"].bool()
    for row in (1, 3):
        assert ids[row][mask[row]].tolist() == reference
    assert all(ids[row][mask[row]].tolist() != reference for row in (0, 2))
    assert output["advantages"].view(2, 2)[:, 1].min() > 0 > output["advantages"].view(2, 2)[:, 0].max()
    assert trainer._metrics["train"]["groups/guided"] == [1.0]
    assert trainer._metrics["train"]["reward"] == [0.5] and "tool_mask" not in output
    # The importance ratio of a token that nobody sampled is that of the policy to itself when it was put there.
    trainer.compute_loss(trainer.model, output)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] == 0
    width = output["prompt_ids"].shape[1]
    names = ("pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids")
    with torch.no_grad():
        logits = tiny_model(family)(
            input_ids=torch.cat([output["prompt_ids"], ids], 1),
            attention_mask=torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
            **{name: output[name] for name in names if name in output},
        ).logits.log_softmax(-1)
    logps = logits[:, width - 1 : -1].gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(output["old_per_token_logps"][mask], logps[mask], atol=2e-5, rtol=1e-4)


def test_the_gradient_of_a_guided_group_raises_the_reference(tmp_path):
    trainer = tiny_trainer(
        tmp_path, rows=rows(), cls=Wrong, guidance="rollout", max_completion_length=40, policy_loss_weight=1.0,
        seg_loss_weight=0.0, conf_loss_weight=0.0, beta=0.0, train_heads=False,
    )  # fmt: skip
    reward_the_reference(trainer)
    output = batch_of(trainer)

    def of_reference():
        trainer.model.eval()
        ids, mask = torch.cat([output["prompt_ids"], output["completion_ids"]], 1), output["completion_mask"].bool()
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        with torch.no_grad():
            logits = trainer.core(input_ids=ids, attention_mask=attention, pixel_values=output["pixel_values"]).logits
        width = output["prompt_ids"].shape[1]
        logps = logits.log_softmax(-1)[:, width - 1 : -1].gather(-1, output["completion_ids"][..., None])[..., 0]
        return float(logps[1][mask[1]].sum()), float(logps[0][mask[0]].sum())

    before = of_reference()
    trainer.model.train()
    trainer.compute_loss(trainer.model, output).backward()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    after = of_reference()
    assert after[0] > before[0] and after[1] < before[1]


def test_no_help_without_a_reference_one_that_does_not_help_or_once_it_has_faded(tmp_path):
    alike = equal_for(*[f"row-{index}" for index in range(8)])
    for name, its_rows, settings in (
        ("no reference", rows(reasoning=None), {}),
        ("too long", rows(), {"max_completion_length": 5}),
        ("rewarded no more", rows(), {}),
        ("faded", rows(), {"guidance_share": 0.2, "max_steps": 10}),
    ):
        settings = {"max_completion_length": 40, "guidance": "rollout"} | settings
        trainer = tiny_trainer(tmp_path / name, rows=its_rows, cls=Wrong, reward_funcs=[alike], **settings)
        trainer.state.max_steps, trainer.state.global_step = settings.get("max_steps", 2), 2 if name == "faded" else 0
        batch_of(trainer)
        assert trainer._metrics["train"]["groups/guided"] == [0.0], name


def test_a_prefix_is_given_not_trained(tmp_path):
    class Begun(Wrong):
        """Rewards what begins as the reference does, by place."""

        def _judge_rollouts(self, inputs, prompts, completions, completion_ids):
            columns, rewards = super()._judge_rollouts(inputs, prompts, completions, completion_ids)
            begins = [text[0]["content"].startswith("<think>a box is red.") for text in completions]
            own = torch.tensor([[float(begun) * (place % 2 + 1)] for place, begun in enumerate(begins)])
            return columns, own

    trainer = tiny_trainer(
        tmp_path, rows=rows(), cls=Begun, guidance="prefix", max_completion_length=40, beta=0.1,
        seg_loss_weight=0.0, conf_loss_weight=0.0,
    )  # fmt: skip
    trainer.state.max_steps = 2
    output = batch_of(trainer)
    given = beginning_of({"reasoning": WORDS}, trainer.processing_class, 1.0)
    ids, mask, written = output["completion_ids"], output["completion_mask"], output["tool_mask"]
    assert trainer._metrics["train"]["groups/guided"] == [1.0]
    for row in range(4):
        assert ids[row, : len(given)].tolist() == given and mask[row, : len(given)].all()
        assert written[row, : len(given)].sum() == 0 and written[row, len(given) : int(mask[row].sum())].all()
    assert int(output["num_items_in_batch"]) == int((mask * written).sum())
    # Nothing of the given tokens reaches the loss: with other probabilities for them alone it stays what it is.
    scored = trainer._get_per_token_logps_and_entropies
    losses = []
    for spoil in (0.0, 3.0):

        def shifted(*args, spoil=spoil, **kwargs):
            logps, *rest = scored(*args, **kwargs)
            return logps + spoil * (written == 0), *rest

        trainer._get_per_token_logps_and_entropies = shifted
        losses.append(trainer.compute_loss(trainer.model, dict(output)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_what_reward_functions_log_goes_with_the_completions_that_are_trained_on(tmp_path):
    """`log_extra` and `log_metric` of TRL: a column of the table of completions, a curve of the prompts whose turn it
    was."""
    tell_apart = equal_for("row-0")

    def reward(completions, sample_id, log_extra, log_metric, **columns):
        log_extra("of", [f"{name} {place}" for place, name in enumerate(sample_id)])
        log_metric("completions_judged", len(completions))
        return tell_apart(completions, sample_id)

    trainer = tiny_trainer(
        tmp_path, rows=rows(), reward_funcs=[reward], max_resamplings=20, stratify_by="kind", shuffle_dataset=False
    )
    batch_of(trainer)
    assert tell_apart.calls[0] == ["row-0", "row-0", "row-1", "row-1"] and len(tell_apart.calls) > 1
    of, last = trainer._logs["extra"]["of"], tell_apart.calls[-1][0]
    assert list(of) == [f"{last} 0", f"{last} 1", "row-1 2", "row-1 3"]
    assert trainer._metrics["train"]["completions_judged"] == [4]


def test_a_reference_has_a_place_in_what_reward_functions_log(tmp_path):
    trainer = tiny_trainer(tmp_path, rows=rows(), cls=Wrong, guidance="rollout", max_completion_length=40)
    reward_the_reference(trainer)
    scored = trainer.reward_funcs[0]

    def reward(completions, log_extra, **columns):
        log_extra("judged_with", [len(completions)] * len(completions))
        return scored(completions, **columns)

    trainer.reward_funcs[0] = reward
    batch_of(trainer)
    assert list(trainer._logs["extra"]["judged_with"]) == [4, 2, 4, 2]  # two references were judged together


def test_pass_rates_choose_the_prompts_and_checkpoints_keep_them(tmp_path):
    folder = tmp_path / "rates"
    folder.mkdir()
    right = {"row-0": [0, 0], "row-1": [1, 1], "row-2": [0, 0], "row-3": [1, 0], "row-4": [1, 0]}
    lines = [{"sample_id": name, "right": counts, "right_reasoning": []} for name, counts in right.items()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prediction.json").write_text("{}")
    reward = equal_for("row-3")
    trainer = tiny_trainer(
        tmp_path / "a", rows=rows(), reward_funcs=[reward], pass_rates=str(folder), shuffle_dataset=False
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    assert [row["sample_id"] for row in inputs[::2]] == ["row-0", "row-1"]
    batch_of(trainer)
    assert not set(reward.calls[0]) & {"row-0", "row-1", "row-2"}
    noted = {int(name[-1]): name != "row-3" for name in set(reward.calls[0])}
    assert noted.items() <= trainer._pool.teaches.items()
    state = trainer._pool.state()
    again = tiny_trainer(tmp_path / "b", rows=rows(), reward_funcs=[equal_for()], pass_rates=str(folder))
    again._pool.load_state(state)
    assert again._pool.teaches == state != {}
    with pytest.raises(ValueError, match="holds no measured pass rates.*segcompass evaluate --pass-at-k"):
        tiny_trainer(tmp_path / "c", rows=rows(), pass_rates=str(tmp_path))


@pytest.mark.slow
def test_a_resumed_run_chooses_as_an_uninterrupted_one(tmp_path):
    settings = {
        "rows": rows(), "max_resamplings": 2, "stratify_by": "kind", "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "beta": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "a", reward_funcs=[equal_for("row-0", "row-3")], **settings)
    whole.train()
    first = tiny_trainer(tmp_path / "b", reward_funcs=[equal_for("row-0", "row-3")], **settings | {"max_steps": 2})
    first.train()
    resumed = tiny_trainer(tmp_path / "b", reward_funcs=[equal_for("row-0", "row-3")], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._pool.teaches == whole._pool.teaches
    logs = [[line for line in run.state.log_history if "reward" in line] for run in (whole, resumed)]
    for name in ("groups/dropped", "reward", "loss"):
        one, other = ([line[name] for line in lines] for lines in logs)
        assert one == pytest.approx(other, rel=1e-5), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_reward": "iou"}, "mask_reward is 'iou'; choose one of 'overlap', 'objects'"),
        ({"guidance": "always"}, "guidance is 'always'; choose one of 'none', 'rollout', 'prefix'"),
        ({"max_resamplings": -1}, "max_resamplings is -1; it counts rounds"),
        ({"guidance_share": 0.0}, "guidance_share is 0.0; it is a share of the training"),
        ({"guidance_share": float("nan")}, "guidance_share is nan"),
    ],
)
def test_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SegCompassGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_settings_that_do_not_fit_the_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reads the column 'size'"):
        tiny_trainer(tmp_path, stratify_by="size")
    with pytest.raises(ValueError, match="reads the column 'sample_id'"):
        tiny_trainer(tmp_path, rows=rows().remove_columns("sample_id"), max_resamplings=1)
    with pytest.raises(ValueError, match="look.* prompts up by a column, which IterableDataset does not allow"):
        tiny_trainer(tmp_path, rows=rows().to_iterable_dataset(), max_resamplings=1)
    with pytest.raises(ValueError, match="a rollout_func returns what they do not keep"):
        tiny_trainer(tmp_path, rows=rows(), guidance="rollout", cls=WithRollouts)
    with pytest.raises(ValueError, match="guidance='prefix' needs a sampler that can be made to begin an answer"):
        tiny_trainer(tmp_path, rows=rows(), guidance="prefix", cls=Elsewhere)
    with pytest.raises(ValueError, match="takes 2 prompts, but the column has 4 values"):
        tiny_trainer(tmp_path, rows=rows(kinds="abcd"), stratify_by="kind").get_train_dataloader()


def test_draws_follow_the_seed(tmp_path):
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        reward = equal_for("row-0", "row-1", "row-2")
        batch_of(tiny_trainer(tmp_path, rows=rows(), reward_funcs=[reward], max_resamplings=2, shuffle_dataset=False))
        seen.append(reward.calls)
    assert seen[0] == seen[1]
