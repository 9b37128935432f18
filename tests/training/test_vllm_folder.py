# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What vLLM would be given: folder, names, shapes, values."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from segcompass_hf.training import vllm_folder

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
    vllm_folder.export_for_vllm(model, processor, tmp_path)

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
    vllm_folder.export_for_vllm(tiny.tiny_model(family), processor, tmp_path)
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
    built = [name for name, _ in vllm_folder.vllm_weights(model)]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [name for name, _ in vllm_folder.vllm_weights(loaded)] == built
    assert [name for name, _ in vllm_folder.vllm_weights(lora(loaded))] == built


def test_adapters_are_added_to_a_copy():
    wrapped = lora(tiny.tiny_model("llava"))
    base = {name: weight.clone() for name, weight in wrapped.state_dict().items()}
    sent = dict(vllm_folder.vllm_weights(wrapped))
    after = wrapped.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in base.items())
    merged = wrapped.merge_and_unload().vlm
    names = vllm_folder.file_names(merged, {name: weight.shape for name, weight in merged.named_parameters()})
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
    sent = dict(vllm_folder.vllm_weights(wrapped))
    embeddings = sent["language_model.model.embed_tokens.weight"]
    sevens = (embeddings == 7.0).all(dim=1).nonzero().flatten().tolist()
    assert sevens == sorted(rows)
    assert bool((sent["language_model.lm_head.weight"] == 5.0).all())


def test_dora_is_refused():
    with pytest.raises(ValueError, match="no sum of weights"):
        list(vllm_folder.vllm_weights(lora(tiny.tiny_model("llava"), use_dora=True)))


def test_four_bit_weights_are_sent_dequantised(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.tiny_model("llava")
    mlp = model.vlm.model.language_model.layers[0].mlp
    dense = mlp.down_proj.weight.detach().clone()  # (32, 64): bitsandbytes on a CPU errs for rows shorter than a block
    mlp.down_proj = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    mlp.down_proj.load_state_dict({"weight": dense})
    mlp.down_proj.to("cpu")
    assert mlp.down_proj.weight.dtype == torch.uint8
    sent = dict(vllm_folder.vllm_weights(model))["language_model.model.layers.0.mlp.down_proj.weight"]
    assert sent.shape == (32, 64) and sent.is_floating_point()
    # NF4 keeps 16 levels per block of 64: off by at most half the widest gap (0.30) times the block's maximum.
    assert 0 < (sent - dense).abs().max() < 0.16 * dense.abs().max()
