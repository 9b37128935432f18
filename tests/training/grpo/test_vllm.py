"""What vLLM would be given: folder, names, shapes, values; and a GRPO step through a stand-in engine (not vLLM)."""

import json

import pytest
import tiny
import torch
import vlm_families
from safetensors.torch import load_file
from stand_in_vllm import LLM, SamplingParams
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

from segcompass_hf.training.grpo import vllm as rollouts  # noqa: E402

# How the files of each family on the Hub call a few weights, which every version of vLLM loads.
PUBLISHED = {
    "llava": [
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "multi_modal_projector.linear_1.weight",
    ],
    "qwen2_5_vl": [
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "lm_head.weight",
        "visual.patch_embed.proj.weight",
        "visual.merger.mlp.0.weight",
    ],
    "qwen3_vl": [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.3.self_attn.q_proj.weight",
        "lm_head.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    ],
    "gemma3": [
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "multi_modal_projector.mm_input_projection_weight",
    ],
}


def lora(model, **kwargs):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=r"vlm\.model\.language_model\.layers\.(2|3)\..*\.(q_proj|v_proj)", **kwargs
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_folder_is_the_inner_vlm_as_published(family, tmp_path):
    model, processor = tiny.tiny_model(family, tie=family == "gemma3"), tiny.tiny_processor(family)
    rollouts.export_for_vllm(model, processor, tmp_path)

    written = load_file(tmp_path / "model.safetensors")
    assert set(PUBLISHED[family]) <= set(written)
    assert not [name for name in written if name.startswith(("sam", "sae", "codebook", "slot", "vlm"))]
    # Tied weights are written once: vLLM ties them by the configuration.
    assert ("language_model.lm_head.weight" in written) == (family == "llava")
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = model.vlm.state_dict()
    assert set(ours) == set(loaded.state_dict())
    assert all(torch.equal(weight, ours[name]) for name, weight in loaded.state_dict().items())

    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [type(model.vlm).__name__]
    assert config.get_text_config().vocab_size == len(processor.tokenizer)
    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert processor.end_of_turn_token_id in ends


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_processor_gives_the_same_inputs(family, tmp_path):
    processor = tiny.tiny_processor(family)
    rollouts.export_for_vllm(tiny.tiny_model(family), processor, tmp_path)
    prompt = processor.build_prompt("the red square")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids == processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<REF_POS>") == processor.ref_token_id
    assert tokenizer.chat_template == processor.chat_template
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(tiny.tiny_image(), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, processor.image_processor(tiny.tiny_image(), return_tensors="pt")["pixel_values"])
    # `AutoProcessor` reads the class here; for the Qwens it then wants torchvision, which vLLM brings along.
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"]
    assert "image_processor_type" in json.loads((tmp_path / "preprocessor_config.json").read_text())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_do_not_depend_on_how_the_model_came_about(family, tmp_path):
    model = tiny.tiny_model(family)
    built = [name for name, _ in rollouts.vllm_weights(model)]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [name for name, _ in rollouts.vllm_weights(loaded)] == built
    assert [name for name, _ in rollouts.vllm_weights(lora(loaded))] == built


def test_adapters_are_added_to_a_copy():
    wrapped = lora(tiny.tiny_model("llava"))
    base = {name: weight.clone() for name, weight in wrapped.state_dict().items()}
    sent = dict(rollouts.vllm_weights(wrapped))
    after = wrapped.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in base.items())
    merged = wrapped.merge_and_unload().vlm
    names = rollouts.file_names(merged, {name: weight.shape for name, weight in merged.named_parameters()})
    changed = 0
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(sent[names[name]], weight, atol=1e-6, rtol=0)
        changed += not torch.equal(base.get(f"base_model.model.vlm.{name}", weight), sent[names[name]])
    assert "language_model.model.layers.3.self_attn.q_proj.weight" in sent
    q_proj = "base_model.model.vlm.model.language_model.layers.3.self_attn.q_proj.base_layer.weight"
    assert not torch.allclose(sent["language_model.model.layers.3.self_attn.q_proj.weight"], base[q_proj], atol=1e-3)


def test_rows_of_added_tokens_trained_by_peft_are_sent():
    model = tiny.tiny_model("llava")
    rows = [model.config.ref_token_id, model.config.think_end_token_id]
    wrapped = lora(model, trainable_token_indices={"embed_tokens": rows}, modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.fill_(7.0)
            if "lm_head.modules_to_save" in name:
                parameter.fill_(5.0)
    sent = dict(rollouts.vllm_weights(wrapped))
    embeddings = sent["language_model.model.embed_tokens.weight"]
    sevens = (embeddings == 7.0).all(dim=1).nonzero().flatten().tolist()
    assert sevens == sorted(rows)
    assert bool((sent["language_model.lm_head.weight"] == 5.0).all())


def test_dora_is_refused():
    with pytest.raises(ValueError, match="no sum of weights"):
        list(rollouts.vllm_weights(lora(tiny.tiny_model("llava"), use_dora=True)))


def test_four_bit_weights_are_sent_dequantised(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.tiny_model("llava")
    mlp = model.vlm.model.language_model.layers[0].mlp
    dense = mlp.down_proj.weight.detach().clone()  # (32, 64): bitsandbytes on a CPU errs for rows shorter than a block
    mlp.down_proj = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    mlp.down_proj.load_state_dict({"weight": dense})
    mlp.down_proj.to("cpu")
    assert mlp.down_proj.weight.dtype == torch.uint8
    sent = dict(rollouts.vllm_weights(model))["language_model.model.layers.0.mlp.down_proj.weight"]
    assert sent.shape == (32, 64) and sent.is_floating_point()
    # NF4 keeps 16 levels per block of 64: off by at most half the widest gap (0.30) times the block's maximum.
    assert 0 < (sent - dense).abs().max() < 0.16 * dense.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_placeholder_per_image(family):
    processor = tiny.tiny_processor(family)
    prompt = processor.build_prompt("the red square")
    short = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expanded = processor(images=[tiny.tiny_image()], text=[prompt], add_special_tokens=False)["input_ids"][0]
    assert len(expanded) > len(short)
    assert rollouts.unexpand_image_tokens(expanded, processor) == short
    with pytest.raises(ValueError, match="2 images go with it"):
        rollouts.unexpand_image_tokens(expanded, processor, num_images=2)


def test_families_whose_text_and_ids_name_an_image_differently_are_refused():
    processor = vlm_families.processor_of("Ovis2Processor")  # `<image>` in the text, `<IMG_ATOM>` in the ids
    prompt = processor.build_prompt("the red square")
    ids = processor(images=[[tiny.tiny_image()]], text=[prompt], return_tensors="pt")["input_ids"][0].tolist()
    with pytest.raises(ValueError, match=r"Ovis2Processor writes other tokens .*'<image>'\); use use_vllm=False"):
        rollouts.unexpand_image_tokens(ids, processor)


# Through TRL, with the stand-in in vLLM's place


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
    start = dict(rollouts.vllm_weights(model))
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
    sent = dict(rollouts.vllm_weights(trainer.model))
    names = rollouts.file_names(engine.model, {n: w.shape for n, w in engine.model.named_parameters()})
    assert all(torch.equal(weight, sent[names[name]]) for name, weight in engine.model.named_parameters())
    moved = {name for name, weight in sent.items() if not torch.equal(weight, start[name])}
    assert "language_model.model.layers.3.self_attn.q_proj.weight" in moved  # above the SAE
    assert not [name for name in moved if ".layers.0." in name or "vision_tower" in name]  # below it
    rows = (sent["language_model.lm_head.weight"] != start["language_model.lm_head.weight"]).any(1).nonzero().flatten()
    config = engine.processor.tokenizer.convert_tokens_to_ids(["<REF_POS>", "<think>", "</think>"])
    assert set(rows.tolist()) <= set(config) and len(rows)
