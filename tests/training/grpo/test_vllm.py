"""A GRPO step through a stand-in engine in vLLM's place."""

import pytest
import tiny
import torch
from stand_in_vllm import LLM, SamplingParams

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

from segcompass_hf.training.grpo import vllm as rollouts  # noqa: E402
from segcompass_hf.training.vllm_folder import file_names, vllm_weights  # noqa: E402


@pytest.fixture
def stand_in(monkeypatch):
    engines = []

    def build(**kwargs):
        engines.append(LLM(**kwargs))
        return engines[-1]

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", build, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets these: put them back afterwards
        monkeypatch.delenv(name)
    return engines


def grpo(tmp_path, family, model, sleep=False):
    from trl import GRPOConfig, GRPOTrainer

    processor = tiny.tiny_processor(family)
    rows = [
        {"prompt": processor.build_messages(f"square number {k}", image=None), "image": tiny.tiny_image(k)}
        for k in range(4)
    ]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=sleep,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )

    def count_e(completions, **kwargs):
        return [float(len(str(completion)) % 5) for completion in completions]

    with rollouts.vllm_rollouts(tmp_path / "vllm"):
        return GRPOTrainer(
            model=model,
            reward_funcs=count_e,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
        )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_grpo_steps_through_the_stand_in(family, tmp_path, stand_in):
    model = tiny.tiny_model(family).freeze_for_training()
    start = {name: weight.clone() for name, weight in model.vlm.state_dict().items()}
    name_or_path = model.name_or_path
    trainer = grpo(tmp_path, family, model)
    (engine,) = stand_in
    assert engine.folder == str(tmp_path / "vllm") and engine.settings["quantization"] is None
    assert model.name_or_path == name_or_path
    trainer.train()
    assert [event for event in engine.events if event[0] == "synchronised"] == [
        ("synchronised", len(list(model.vlm.parameters())))
    ] * 2

    trained = model.vlm.state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in trained.items())
    trainer.vllm_generation.sync_weights()
    assert all(torch.equal(weight, trained[name]) for name, weight in engine.model.state_dict().items())
    # One placeholder per image went out, and what TRL trains on is what was sampled from: log-probabilities differ by
    # the share of the image tokens, which only the sampler forbids.
    image = trainer.processing_class.image_token_id
    assert all(prompt["prompt_token_ids"].count(image) == 1 for prompt in engine.prompts)
    logs = [log["sampling/sampling_logp_difference/max"] for log in trainer.state.log_history if "reward" in log]
    assert logs == pytest.approx(engine.forbidden_shares, abs=1e-4) and all(0 < log < 0.05 for log in logs)


def test_sleeping_engine_gets_its_weights_back(tmp_path, stand_in):
    trainer = grpo(tmp_path, "llava", tiny.tiny_model("llava").freeze_for_training(), sleep=True)
    trainer.train()
    (engine,) = stand_in
    assert engine.events[0] == ("sleep", 2) and ("wake_up", ["weights"]) in engine.events
    assert any(event[0] == "synchronised" for event in engine.events)


def test_patch_is_taken_back_and_image_tokens_are_never_written(tmp_path, stand_in):
    from trl.trainer import grpo_trainer as module

    trainer = grpo(tmp_path, "qwen2_5_vl", tiny.tiny_model("qwen2_5_vl").freeze_for_training())
    assert module.VLLMGeneration is vllm_generation.VLLMGeneration
    bias = trainer.vllm_generation.generation_kwargs["logit_bias"]
    assert bias == {token: -100.0 for token in trainer.model.vision_token_ids} and len(bias) == 4


@pytest.mark.parametrize("adapters", [False, True])
def test_joint_training_through_the_stand_in(adapters, tmp_path, stand_in):
    """Masks for the reward come from a forward over what the engine wrote."""
    from grpo import by_length, tiny_trainer

    from segcompass_hf.training import mask_reward
    from segcompass_hf.training.adapters import lora_config

    seen = []

    def mask_reward_seen(**columns):
        seen.extend(columns["pred_masks"])
        return mask_reward(**columns)

    model = tiny.tiny_model("llava")
    start = dict(vllm_weights(model))
    start = {name: weight.clone() for name, weight in start.items()}
    trainer = tiny_trainer(
        tmp_path,
        model=model,
        reward_funcs=[by_length, mask_reward_seen],
        peft_config=lora_config(model, r=2) if adapters else None,
        use_vllm=True,
        vllm_mode="colocate",
        learning_rate=1e-2,
    )
    trainer.train()
    (engine,) = stand_in
    assert engine.folder == str(tmp_path / "vllm")
    assert len(seen) == 8 and all(mask.shape == (tiny.NUM_SLOTS, 32, 32) for mask in seen)
    trainer.vllm_generation.sync_weights()
    sent = dict(vllm_weights(trainer.model))
    names = file_names(engine.model, {n: w.shape for n, w in engine.model.named_parameters()})
    assert all(torch.equal(weight, sent[names[name]]) for name, weight in engine.model.named_parameters())
    moved = {name for name, weight in sent.items() if not torch.equal(weight, start[name])}
    assert "language_model.model.layers.3.self_attn.q_proj.weight" in moved  # above the SAE
    assert not [name for name in moved if ".layers.0." in name or "vision_tower" in name]  # below it
    rows = (sent["language_model.lm_head.weight"] != start["language_model.lm_head.weight"]).any(1).nonzero().flatten()
    config = engine.processor.tokenizer.convert_tokens_to_ids(["<REF_POS>", "<think>", "</think>"])
    assert set(rows.tolist()) <= set(config) and len(rows)
