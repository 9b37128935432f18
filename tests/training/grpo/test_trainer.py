"""Joint training: what it samples, what it learns from, what it leaves alone."""

import json
import math

import pytest
import torch
from grpo import by_length, tiny_rows, tiny_trainer
from tiny import tiny_image, tiny_model, tiny_processor

pytest.importorskip("trl")

from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer  # noqa: E402
from segcompass_hf.training.grpo.one_cycle import OneCycle  # noqa: E402
from segcompass_hf.training.grpo.rollouts import masks_of_rollouts  # noqa: E402
from segcompass_hf.training.grpo.targets import prompt_of, segmentation_targets  # noqa: E402

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")


class Recorder(SegCompassGRPOTrainer):
    """Keeps what goes through the joints."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.seen = {"prompts": prompts, "ids": completion_ids_list, "rollouts": self._rollouts}
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards

    def _tokenize_prompts(self, prompts):
        result = super()._tokenize_prompts(prompts)
        self.prompt_ids = result[0]
        return result


def generate(trainer):
    """One generation batch, as training makes it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_captured_masks_are_those_of_a_plain_forward(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family, cls=Recorder)
    output = generate(trainer)

    rows = next(iter(trainer.get_train_dataloader()))
    processor = trainer.processing_class
    for row, ids in zip(rows, trainer.prompt_ids, strict=True):
        own = processor(images=row["image"], instruction=row["instruction"])
        assert own["input_ids"][0].tolist() == list(ids)

    rollouts = trainer.seen["rollouts"]
    captured = rollouts.segment(trainer.core, batch_size=4)
    plain = masks_of_rollouts(
        trainer.model, processor, trainer.seen["prompts"], trainer.seen["ids"], rollouts.targets, batch_size=3
    )
    for name, value in captured.items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=1e-4)
    assert len(output["image_embeddings"]) == len(output["mask_labels"]) == 4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_heatmap_concepts_are_seen_while_sampling_and_train(tmp_path, family):
    model = tiny_model(family, heatmap_concepts=True)
    trainer = tiny_trainer(tmp_path, family, model=model, cls=Recorder)
    generate(trainer)
    rollouts, processor = trainer.seen["rollouts"], trainer.processing_class
    captured = rollouts.segment(trainer.core, batch_size=4)
    asked = trainer.seen["prompts"], trainer.seen["ids"], rollouts.targets
    plain = masks_of_rollouts(trainer.model, processor, *asked, batch_size=3)
    torch.testing.assert_close(captured["heatmap_logits"], plain["heatmap_logits"], atol=1e-4, rtol=1e-4)
    before = model.slot_mapper.concept_proj.weight.clone()
    with torch.no_grad():
        model.slot_mapper.concept_proj.weight.zero_()
        other = rollouts.segment(trainer.core, batch_size=4)
        assert (other["heatmap_logits"] - captured["heatmap_logits"]).abs().max() > 1e-2
        model.slot_mapper.concept_proj.weight.copy_(before)
    trainer.train()
    assert not torch.equal(model.slot_mapper.concept_proj.weight, before)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_masks_of_a_second_pass_over_the_sequence_see_the_image(tmp_path, family):
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    model = tiny_model(family, concept_input="duplicated")
    trainer = tiny_trainer(tmp_path, family, model=model, reward_funcs=[reward])
    inputs = generate(trainer)
    names = ("pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids", "reshaped_input_sizes")
    prompt_mask, written = inputs["prompt_mask"], inputs["completion_mask"]
    with torch.no_grad():  # the batch that training sees: this kind of input depends on its padding
        plain = model(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            attention_mask=torch.cat([prompt_mask, written], 1),
            completion_mask=torch.cat([torch.zeros_like(prompt_mask), written], 1),
            image_embeddings=torch.stack(list(inputs["image_embeddings"])),
            **{name: inputs[name] for name in names if name in inputs},
        )
    for name in ("heatmap_logits", "slot_logits", "pred_masks"):
        torch.testing.assert_close(torch.stack(seen[name]), plain[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_starts_equal_and_stays_the_model_of_the_start(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family, beta=0.1)
    inputs = generate(trainer)
    trainer.compute_loss(trainer.model, inputs)
    first = inputs.pop("ref_per_token_logps")
    mask = inputs["completion_mask"].bool()
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(0, abs=1e-6)

    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(inputs["ref_per_token_logps"][mask], first[mask], atol=2e-6, rtol=1e-5)
    assert trainer._metrics["train"]["kl"][-1] > 1e-3

    # The model of the start, whole, scores the same.
    original = tiny_model(family).train()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    extra = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            extra[name] = inputs[name]
    logits = original(input_ids=ids, attention_mask=attention, **extra).logits.log_softmax(-1)
    start = inputs["prompt_ids"].shape[1]
    expected = logits[:, start - 1 : -1].gather(-1, ids[:, start:, None])[..., 0]
    torch.testing.assert_close(first[mask], expected[mask].detach(), atol=2e-5, rtol=1e-4)


def test_reference_shares_what_is_frozen(tmp_path):
    trainer = tiny_trainer(tmp_path, beta=0.1)
    policy = {p.data_ptr() for p in trainer.model.parameters()}
    reference = trainer._make_reference()
    own = [name for name, p in reference.named_parameters() if p.data_ptr() not in policy]
    assert all(name.startswith(("layers.", "lm_head.")) for name in own)
    assert len(reference.layers) == 2  # of 4, the SAE reads after the second
    assert not any(p.requires_grad for p in reference.parameters())


def gradients_of_a_window(tmp_path, batch_size, accumulation, monkeypatch=None, **settings):
    """Summed loss and gradients of one optimizer step, before the optimizer."""
    trainer = tiny_trainer(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        rows=tiny_rows((0, 0, 1, 2)),
        max_steps=1,
        max_grad_norm=0.0,
        beta=0.1,
        **settings,
    )
    # The two halves of the window are uneven: rows 0 and 1, without objects, come first.
    trainer._prepare_inputs = unshuffled(trainer)
    losses, gradients = [], {}
    step = trainer.training_step

    def training_step(*args, **kwargs):
        losses.append(step(*args, **kwargs).item())
        return torch.tensor(losses[-1])

    trainer.training_step = training_step
    optimizer = trainer.create_optimizer()
    model = trainer.model

    def keep(*args, **kwargs):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    trainer.train()
    return sum(losses), gradients


def unshuffled(trainer):
    """`_prepare_inputs` with the rows of a generation in the order of the data set."""
    from trl.trainer import grpo_trainer as trl_grpo

    prepare = trainer._prepare_inputs

    def wrapper(batch):
        shuffle = trl_grpo.shuffle_sequence_dict
        trl_grpo.shuffle_sequence_dict = by_objects
        try:
            return prepare(batch)
        finally:
            trl_grpo.shuffle_sequence_dict = shuffle

    def by_objects(columns):
        order = torch.argsort(columns["num_objects"], stable=True).tolist()
        pick = {list: lambda v: [v[i] for i in order], torch.Tensor: lambda v: v[order] if v.ndim else v}
        return {name: value if value is None else pick[type(value)](value) for name, value in columns.items()}

    return wrapper


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_changes_nothing_with_targets_spread_unevenly(tmp_path, loss_type):
    whole, one = gradients_of_a_window(tmp_path / "a", 8, 1, loss_type=loss_type)
    split, two = gradients_of_a_window(tmp_path / "b", 4, 2, loss_type=loss_type)
    assert whole == pytest.approx(split, abs=1e-5)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)
    for part in ("vlm.", "codebook.", "slot_encoder.", "slot_mapper.", "sam.mask_decoder."):
        assert max(g.abs().max() for n, g in one.items() if n.startswith(part)) > 1e-6, part


def test_gradient_checkpointing_changes_nothing(tmp_path):
    loss, plain = gradients_of_a_window(tmp_path / "a", 4, 2)
    again, checkpointed = gradients_of_a_window(tmp_path / "b", 4, 2, gradient_checkpointing=True)
    assert loss == pytest.approx(again, abs=1e-5)
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-5, rtol=1e-4, msg=name)


def test_bf16_autocast_covers_sampling_masks_and_training(tmp_path):
    seen = {}
    trainer = tiny_trainer(tmp_path, bf16=True, beta=0.1, max_steps=1)
    layers = trainer.core.base_model.language_model.layers

    def remember(module, args, output):
        if output.requires_grad:
            seen["training"] = output.dtype
        else:
            seen.setdefault("sampling", output.dtype)

    layers[3].mlp.down_proj.register_forward_hook(remember)

    def remember_autocast(module, args):
        seen.setdefault("masks", torch.is_autocast_enabled("cpu"))

    trainer.core.slot_mapper.register_forward_pre_hook(remember_autocast)
    trainer.train()
    assert seen == {"sampling": torch.bfloat16, "training": torch.bfloat16, "masks": True}
    (log,) = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert math.isfinite(log["loss"]) and log["kl"] == pytest.approx(0, abs=1e-3)


def test_a_short_last_window_weighs_its_own_samples(tmp_path):
    # 3 prompts in micro-batches of one: the second window of the epoch is half of one.
    trainer = tiny_trainer(
        tmp_path, rows=tiny_rows((1, 1, 1)), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        steps_per_generation=1, max_steps=-1, num_train_epochs=1, policy_loss_weight=0.0,
    )  # fmt: skip
    weights = trainer.args.loss_weights(trainer.core.config, 0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "segmentation/mask_dice" in entry]
    assert len(logs) == 2
    for log in logs:
        expected = weights["seg_loss_weight"] * log["segmentation/segmentation_loss"]
        expected += weights["conf_loss_weight"] * log["segmentation/confidence_loss"]
        assert log["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_step_with_nan_heatmaps_is_skipped(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, beta=0.1)
    passes, weights = [], []

    def spoil_the_second(module, args, output):
        if torch.is_grad_enabled():
            passes.append(output)
            weights.append(next(module.parameters()).detach().clone())
            if len(passes) == 2:
                output.heatmap_logits = output.heatmap_logits * float("nan")
        return output

    trainer.core.slot_mapper.register_forward_hook(spoil_the_second)
    trainer.train()
    counts = [entry["nonfinite_steps"] for entry in trainer.state.log_history if "nonfinite_steps" in entry]
    assert counts == [0, 1, 1]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


def test_what_trains_moves_and_the_rest_stays(tmp_path):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = tiny_trainer(tmp_path, model=model, rows=tiny_rows((1, 2, 1, 1)), gradient_accumulation_steps=2)
    trainer.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter, before[name]), name
    moved = {name for name in trained if not torch.equal(dict(model.named_parameters())[name], before[name])}
    for part in ("vlm.model.language_model.layers.3", "codebook", "slot_encoder", "slot_mapper", "sam.mask_decoder"):
        assert any(name.startswith(part) for name in moved), part
    assert not any("language_model.layers.1." in name for name in trained)
    head = dict(model.named_parameters())["vlm.lm_head.weight"] != before["vlm.lm_head.weight"]
    added = {model.config.ref_token_id, model.config.think_start_token_id, model.config.think_end_token_id}
    assert set(head.any(1).nonzero()[:, 0].tolist()) <= added


def test_heads_frozen_trains_the_policy_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, train_heads=False, seg_loss_weight=0.0, conf_loss_weight=0.0)
    trainer.train()
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names and all(name.startswith("vlm.") for name in names)


def test_input_rows_that_would_get_no_gradient_are_refused(tmp_path):
    from segcompass_hf.training.adapters import lora_config

    model, configured = tiny_model(), tiny_model(train_token_rows="both")
    for settings in (
        {"train_token_rows": "both"},
        {"model": configured},
        {"model": model, "peft_config": lora_config(model, r=2, train_token_rows="both")},
    ):
        with pytest.raises(ValueError, match="get no gradient; pass train_token_rows='head'"):
            tiny_trainer(tmp_path, **settings)
    tied = tiny_trainer(tmp_path, model=tiny_model(tie=True), train_token_rows="both", max_steps=1)
    before = tied.core.get_input_embeddings().weight.detach().clone()
    tied.train()
    assert not torch.equal(before, tied.core.get_input_embeddings().weight), "they learn from the head's side"
    model = tiny_model(tie=True)
    tiny_trainer(tmp_path, model=model, peft_config=lora_config(model, r=2, train_token_rows="both"))


def test_settings_that_an_adapter_does_not_follow_are_named(tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    from segcompass_hf.training.adapters import lora_config

    for name in ("transformers", "segcompass_hf"):
        monkeypatch.setattr(logging.get_logger(name), "propagate", True)
    model = tiny_model()
    settings = {"train_heads": False, "train_token_rows": "none"}
    tiny_trainer(tmp_path, model=model, peft_config=lora_config(model, r=2), **settings)
    assert "train_token_rows='none' (the adapter trains 'head'), train_heads=False (the adapter trains" in caplog.text
    caplog.clear()
    model = tiny_model()
    followed = lora_config(model, r=2, heads="none", train_token_rows="none")
    tiny_trainer(tmp_path, model=model, peft_config=followed, **settings)
    assert "something else" not in caplog.text


def test_without_policy_loss_only_the_segmentation_counts(tmp_path):
    trainer = tiny_trainer(tmp_path, policy_loss_weight=0.0, beta=0.1)
    inputs = generate(trainer)
    inputs["advantages"] = torch.full_like(inputs["advantages"], 1e6)
    weights = trainer.args.loss_weights(trainer.core.config, 0)
    loss = trainer.compute_loss(trainer.model, inputs).item()
    logged = trainer._metrics["train"]
    expected = weights["seg_loss_weight"] * logged["segmentation/segmentation_loss"][-1]
    expected += weights["conf_loss_weight"] * logged["segmentation/confidence_loss"][-1]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_masks_are_learned_from_the_better_completions(tmp_path):
    settings = {"policy_loss_weight": 0.0, "rows": tiny_rows((1, 2, 1, 1)), "max_steps": 1}
    settings |= {"segmentation_completions": "at_least_mean"}
    trainer = tiny_trainer(tmp_path, reward_funcs=[second_of_a_pair], **settings)
    inputs = generate(trainer)
    assert inputs["segmentation_weights"].tolist() == [0.0, 1.0, 0.0, 1.0]
    trainer._count_windows([inputs])
    assert inputs["num_segmentation_items"] == inputs["num_samples"] == 2
    loss = trainer.compute_loss(trainer.model, inputs).item()
    inputs["mask_labels"][0] = 1 - inputs["mask_labels"][0]  # of a completion that does not count
    assert trainer.compute_loss(trainer.model, inputs).item() == loss
    inputs["mask_labels"][1] = 1 - inputs["mask_labels"][1]
    assert trainer.compute_loss(trainer.model, inputs).item() != loss

    trainer.model.eval()
    rows = next(iter(trainer.get_train_dataloader()))
    assert "segmentation_weights" not in trainer._generate_and_score_completions(rows), "an evaluation chooses nothing"
    alike = tiny_trainer(tmp_path, reward_funcs=[constant], **settings)
    assert generate(alike)["segmentation_weights"].tolist() == [1.0] * 4, "nothing to choose between"
    alike.train()
    assert math.isfinite(alike.state.log_history[0]["loss"])
    groups_of_three = settings | {"num_generations": 3, "per_device_train_batch_size": 3}
    inputs = generate(tiny_trainer(tmp_path, reward_funcs=[above_its_mean], **groups_of_three))
    assert inputs["advantages"].tolist() == [0.0] * 3, "though the mean of three equal rewards is rounded up"
    assert inputs["segmentation_weights"].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="'all' or 'at_least_mean', got 'best'"):
        SegCompassGRPOConfig(str(tmp_path), segmentation_completions="best", use_cpu=True)


def second_of_a_pair(completions, **kwargs):
    return [0.0, 1.0] * (len(completions) // 2)


def above_its_mean(completions, **kwargs):
    return [0.37322431802749634] * len(completions)


def constant(completions, **kwargs):
    return [0.1] * len(completions)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bf16 is the default on a GPU")
def test_settings_need_nothing_said_about_a_missing_gpu(tmp_path):
    assert not SegCompassGRPOConfig(str(tmp_path)).bf16
    assert SegCompassGRPOConfig(str(tmp_path), bf16=True, use_cpu=True).bf16


def test_loss_weights_switch_at_the_step(tmp_path):
    settings = {"loss_weight_switch_step": 3, "switched_loss_weights": {"mask_focal_weight": 5.0}}
    args = SegCompassGRPOConfig(str(tmp_path), mask_dice_weight=2.0, use_cpu=True, bf16=False, **settings)
    config = tiny_model().config
    before, after = args.loss_weights(config, 2), args.loss_weights(config, 3)
    assert before["mask_focal_weight"] == config.mask_focal_weight and after["mask_focal_weight"] == 5.0
    assert before["mask_dice_weight"] == after["mask_dice_weight"] == 2.0
    assert before["heatmap_bce_weight"] == config.heatmap_bce_weight
    with pytest.raises(ValueError, match="names \\['dice'\\]"):
        SegCompassGRPOConfig(str(tmp_path), loss_weight_switch_step=1, switched_loss_weights={"dice": 1}, use_cpu=True)
    with pytest.raises(ValueError, match="go together"):
        SegCompassGRPOConfig(str(tmp_path), loss_weight_switch_step=1, use_cpu=True)


def test_learning_rates_per_module_and_the_one_cycle(tmp_path):
    trainer = tiny_trainer(
        tmp_path, learning_rate=1e-3, codebook_lr_factor=25, slot_mapper_lr_factor=80, lr_schedule="one_cycle"
    )
    optimizer = trainer.create_optimizer()
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(trainer.model.codebook.weight)] == pytest.approx(2.5e-2)
    assert rate[id(next(trainer.model.slot_mapper.parameters()))] == pytest.approx(8e-2)
    scheduler = trainer.create_scheduler(10, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # One cosine from the learning rate to a 6.7th of it, without warm-up; the first step is already on its way.
    low, high = 1e-3 / 6.7, 1e-3
    expected = [low + (high - low) / 2 * (1 + math.cos(math.pi * (step + 1) / 10)) for step in range(10)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_the_one_cycle_is_torchs_and_ends_where_a_longer_run_does(tmp_path):
    def optimizer():
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-3, 2e-2)]
        return torch.optim.AdamW(groups)

    def run(optimizer, scheduler, steps):
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    first, theirs = optimizer(), optimizer()
    settings = {"total_steps": 6, "pct_start": 0.0, "div_factor": 1.0, "final_div_factor": 6.7}
    torchs = torch.optim.lr_scheduler.OneCycleLR(theirs, [1e-3, 2e-2], cycle_momentum=False, **settings)
    ours = OneCycle(first, 6, 6.7)
    for rates, expected in zip(run(first, ours, 6), run(theirs, torchs, 6), strict=True):
        assert rates == pytest.approx(expected, rel=1e-12)

    whole = optimizer()
    expected = run(whole, OneCycle(whole, 10, 6.7), 10)[6:]
    for state, done in ((ours.state_dict(), first), (torchs.state_dict(), theirs)):  # older checkpoints hold torch's
        longer = optimizer()
        scheduler = OneCycle(longer, 10, 6.7)
        longer.load_state_dict(done.state_dict())
        scheduler.load_state_dict(state)
        assert scheduler.total_steps == 10
        for rates, wanted in zip(run(longer, scheduler, 4), expected, strict=True):
            assert rates == pytest.approx(wanted, rel=1e-12)


def test_a_one_cycle_run_can_be_prolonged(tmp_path):
    settings = {"beta": 0.0, "lr_schedule": "one_cycle", "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, max_steps=2, **settings).train()
    trainer = tiny_trainer(tmp_path, max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    low, high = 1e-3 / 6.7, 1e-3
    assert rates[2:] == pytest.approx([low + (high - low) / 2 * (1 + math.cos(math.pi * s / 4)) for s in (3, 4)])


def test_reward_functions_get_masks_and_targets_of_their_completion(tmp_path):
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    trainer = tiny_trainer(tmp_path, reward_funcs=[reward], num_generations=2)
    generate(trainer)
    rows = next(iter(trainer.get_train_dataloader()))
    assert [row["sample_id"] for row in rows] == seen["sample_id"]
    counts = {"row-0": 1, "row-1": 0, "row-2": 2, "row-3": 1}
    assert seen["num_objects"] == [counts[name] for name in seen["sample_id"]]
    size = trainer.processing_class.mask_size
    for index, labels in enumerate(seen["mask_labels"]):
        assert labels.shape == (4, size, size)
        assert [bool(label.any()) for label in labels] == [k < seen["num_objects"][index] for k in range(4)]
        assert seen["pred_masks"][index].shape == seen["heatmap_logits"][index].shape == (4, size, size)
        assert seen["slot_logits"][index].shape == (4,)
        # 40 x 30 images on a square canvas: three quarters of the rows are image.
        assert seen["valid_area"][index].float().mean() == pytest.approx(0.75, abs=0.05)
    assert seen["num_slots"] == [4] * 4 and seen["slot_logit_threshold"] == [0.0] * 4


def test_default_rewards_and_metrics(tmp_path):
    trainer = SegCompassGRPOTrainer(
        tiny_model(),
        args=SegCompassGRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_steps=1, use_cpu=True, bf16=False,
            max_completion_length=6, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=tiny_rows((5, 1, 0, 1)),
        eval_dataset=tiny_rows((1, 0)),
        processing_class=tiny_processor(),
    )  # fmt: skip
    assert trainer.reward_func_names == ["format_reward", "mask_reward"]
    assert trainer.reward_weights.tolist() == pytest.approx([0.3, 0.7])
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    for name in ("kl", "entropy", "format_share", "nonfinite_steps"):
        assert name in log
    for name in ("segmentation_loss", "confidence_loss", "heatmap_bce", "heatmap_dice", "mask_dice", "mask_focal"):
        assert math.isfinite(log[f"segmentation/{name}"])
    assert 0 <= log["segmentation/giou"] <= 1 and 0 <= log["segmentation/kept_slots"] <= 4
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and "eval_segmentation/giou" in metrics


def test_several_evaluation_sets_keep_their_metrics_apart(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.eval_dataset = {"one": tiny_rows((1, 1)), "none": tiny_rows((0, 0))}
    metrics = trainer.evaluate()
    assert metrics["eval_one_segmentation/heatmap_bce"] > 0 == metrics["eval_none_segmentation/heatmap_bce"]
    assert "eval_one_reward" in metrics and "eval_reward" not in metrics
    assert not trainer._metrics["eval"]


def test_objects_beyond_the_slots_are_counted(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    rows = list(tiny_rows((5, 5, 1)))
    dropped = segmentation_targets(rows, processor, model, torch.device("cpu"), "drop")
    assert dropped.num_objects.tolist() == [4, 4, 1] and dropped.num_dropped == [1, 1, 0]
    merged = segmentation_targets(rows, processor, model, torch.device("cpu"), "merge")
    assert merged.num_objects.tolist() == [4, 4, 1] and merged.num_dropped == [0, 0, 0]
    with pytest.raises(ValueError, match="sample row-0 has 5 target objects"):
        segmentation_targets(rows, processor, model, torch.device("cpu"), "error")


def test_rows_without_masks_are_named():
    row = {name: value for name, value in tiny_rows((1,))[0].items() if name != "masks"}
    with pytest.raises(ValueError, match="sample row-0 has no masks; its columns are"):
        segmentation_targets([row], tiny_processor(), tiny_model(), torch.device("cpu"))


def test_targets_of_a_group_are_made_once_and_equal_the_processors(monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    rows = [row for row in tiny_rows((2, 0)) for _ in range(3)]
    encoded = []
    original = type(model).encode_image
    monkeypatch.setattr(type(model), "encode_image", lambda s, x: encoded.append(len(x)) or original(s, x))
    targets = segmentation_targets(rows, processor, model, torch.device("cpu"))
    assert sum(encoded) == 2
    assert targets.image_embeddings[0].data_ptr() == targets.image_embeddings[2].data_ptr()
    from segcompass_hf.data.schema import decode_masks

    masks = decode_masks(rows[0]["masks"], (30, 40))
    own = processor(images=rows[0]["image"], instruction="x", masks=masks)
    torch.testing.assert_close(targets.mask_labels[0], own["mask_labels"][0])
    torch.testing.assert_close(targets.image_embeddings[0], original(model, own["sam_pixel_values"])[0])
    assert targets.reshaped_input_sizes[0].tolist() == own["reshaped_input_sizes"][0].tolist()


def test_lora_trains_adapters_and_heads_only_and_its_reference_is_the_base(tmp_path):
    from segcompass_hf.training.adapters import lora_config

    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = tiny_trainer(
        tmp_path, model=model, peft_config=lora_config(model, r=2, dropout=0.0), beta=0.1, gradient_checkpointing=True
    )
    trainer.train()
    core = trainer.core
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert parameter.requires_grad
            assert not any(f".layers.{index}." in name for index in (0, 1)), name
    with trainer.model.disable_adapter():
        inputs = tiny_processor()(images=tiny_image(), instruction="the red box")
        after = core(**inputs).logits
    torch.testing.assert_close(after, tiny_model()(**inputs).logits, atol=1e-6, rtol=1e-5)
    moved = core.codebook.modules_to_save["default"].weight
    assert not torch.equal(moved, before["codebook.weight"])
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[-1] > 0


def test_a_trained_adapter_is_its_own_reference(tmp_path):
    from peft import get_peft_model

    from segcompass_hf.training.adapters import lora_config

    model = tiny_model()
    adapted = get_peft_model(model, lora_config(model, r=2, dropout=0.2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # adapters, copies of the heads, rows of the added tokens
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trainer = tiny_trainer(tmp_path, model=adapted, beta=0.1)
    inputs = generate(trainer)
    trainer.model.eval()  # without dropout the policy is its reference
    trainer.compute_loss(trainer.model, inputs)
    assert trainer._metrics["eval"]["kl"][-1] == pytest.approx(0, abs=1e-7)
    still = inputs.pop("ref_per_token_logps")
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(inputs["ref_per_token_logps"], still)
    assert trainer._metrics["train"]["kl"][-1] > 1e-3
    optimized = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    copies = [p for name, p in trainer.model.named_parameters() if ".ref" in name]
    assert copies and not any(id(p) in optimized for p in copies)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_leaves_no_hooks_and_keeps_its_settings(tmp_path, lora):
    from transformers import TrainerCallback

    from segcompass_hf.training.adapters import lora_config

    class Count(TrainerCallback):
        def __init__(self):
            self.hooks = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            modules = list(model.modules())
            self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))

    model, count = tiny_model(), Count()
    trainer = tiny_trainer(
        tmp_path, model=model, peft_config=lora_config(model, r=2) if lora else None, beta=0.1, max_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False},
    )  # fmt: skip
    trainer.add_callback(count)
    trainer.train()
    assert len(set(count.hooks)) == 1
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert functions and all(f.keywords["preserve_rng_state"] is False for f in functions)


def test_an_adapter_below_the_sae_is_refused(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="frozen SAE reads"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


def test_several_iterations_use_the_old_log_probabilities(tmp_path):
    trainer = tiny_trainer(tmp_path, num_iterations=2, max_steps=4, rows=tiny_rows((1, 1, 1, 1)), beta=0.1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "segmentation/mask_dice" in entry]
    assert len(logs) == 4
    assert all(math.isfinite(entry["loss"]) for entry in logs)


def test_streams_train_too(tmp_path):
    trainer = tiny_trainer(tmp_path, rows=tiny_rows().to_iterable_dataset(), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_fewer_rows_than_one_generation_are_an_error_and_not_a_run_without_steps(tmp_path):
    # 4 completions x 3 accumulated batches / 2 per prompt = 6 prompts; TRL drops what is less than that
    layout = {"gradient_accumulation_steps": 3, "max_steps": 1}
    for rows in (tiny_rows((1,) * 5), tiny_rows((1,) * 5).to_iterable_dataset()):
        with pytest.raises(ValueError, match="train_dataset has 5 rows, but one generation takes 6 prompts"):
            tiny_trainer(tmp_path, rows=rows, **layout)
    tiny_trainer(tmp_path, rows=tiny_rows((1,) * 6), **layout)


@pytest.mark.parametrize("as_stream", [False, True])
def test_rows_with_refused_texts_are_skipped_named_and_counted(tmp_path, as_stream):
    words = {1: "", 2: None, 4: "ring " * 9000}  # the tokenizer reads 4,096 tokens
    rows = tiny_rows((1, 0, 2, 1, 1, 1))
    rows = rows.map(lambda row, index: {"instruction": words.get(index, row["instruction"])}, with_indices=True)
    trainer = tiny_trainer(tmp_path, rows=rows.to_iterable_dataset() if as_stream else rows, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    lines = [json.loads(line) for line in (tmp_path / "unreadable_rows.jsonl").read_text().splitlines()]
    assert {line["sample_id"] for line in lines} == {"row-1", "row-2", "row-4"}
    assert trainer.state.log_history[-2]["unreadable_rows"] == 3


def test_rows_with_a_prompt_keep_it():
    processor = tiny_processor()
    prompt = [{"role": "user", "content": "cut out the cat"}]
    assert prompt_of({"prompt": prompt, "instruction": "x"}, processor) is prompt
    with pytest.raises(ValueError, match="neither `instruction` nor `prompt`"):
        prompt_of({"image": None}, processor)


def test_wrong_model_and_settings_are_refused(tmp_path):
    with pytest.raises(TypeError, match="from_pretrained_parts"):
        tiny_trainer(tmp_path, model=tiny_model().vlm)
    with pytest.raises(ValueError, match="environment_factory"):
        SegCompassGRPOTrainer(tiny_model(), environment_factory=object)
    with pytest.raises(ValueError, match="sync_ref_model"):
        SegCompassGRPOConfig(str(tmp_path), sync_ref_model=True, use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="SegCompassGRPOConfig"):
        from trl import GRPOConfig

        SegCompassGRPOTrainer(tiny_model(), args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_a_model_given_by_folder_is_loaded_with_its_processor(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    args = SegCompassGRPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        num_generations=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SegCompassGRPOTrainer(str(tmp_path / "model"), args, tiny_rows(), reward_funcs=by_length)
    assert torch.equal(trainer.model.codebook.weight, tiny_model().codebook.weight)
    assert trainer.processing_class.num_slots == 4
