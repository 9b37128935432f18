# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""MobileSAM: windows and position biases by hand; SAM's own interface; training, dtypes, canvases, saving."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from places import SUPPORT
from tiny import tiny_image, tiny_model, tiny_processor, tiny_segmenter, tiny_segmenter_config
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, SamModel

from segcompass_hf import MobileSamConfig, MobileSamModel
from segcompass_hf.configuration_mobile_sam import MobileSamVisionConfig
from segcompass_hf.modeling_mobile_sam import MobileSamVisionAttention, from_windows, to_windows


@pytest.fixture
def sam() -> MobileSamModel:
    return tiny_segmenter("mobile_sam")


def pixels(batch_size: int = 2, canvas: int = 64) -> torch.Tensor:
    return torch.randn(batch_size, 3, canvas, canvas, generator=torch.Generator().manual_seed(0))


def test_windows_by_hand():
    # 1 2 3
    # 4 5 6, a row and a column of padding, windows of 2 x 2
    states = torch.arange(1.0, 7).view(1, 2, 3, 1)
    windows = to_windows(states, 2)
    assert windows[..., 0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]
    assert torch.equal(from_windows(windows, 2, 2, 3), states)
    large = torch.randn(2, 5, 7, 4)
    for side in (1, 3, 5, 8):
        assert torch.equal(from_windows(to_windows(large, side), side, 5, 7), large)


def test_position_bias_by_hand():
    config = MobileSamVisionConfig(
        embed_dims=[8, 8], depths=[1, 1], num_heads=[1, 1], window_sizes=[2, 2], strides=[2]
    )
    attention = MobileSamVisionAttention(config, 1)
    with torch.no_grad():
        attention.relative_position_bias.copy_(torch.tensor([[0.0, 1, 10, 11]]))  # same cell, column, row, diagonal
    expected = [[0, 1, 10, 11], [1, 0, 11, 10], [10, 11, 0, 1], [11, 10, 1, 0]]
    assert attention.position_bias().tolist() == [[expected]]


def test_it_is_a_sam_with_another_encoder(sam):
    assert isinstance(sam, SamModel)
    whole = MobileSamModel(MobileSamConfig())
    # 5.74 M image encoder, as the TinyViT-5M of the paper without its classifier and with SAM's neck
    assert sum(p.numel() for p in whole.parameters()) == 9_803_780
    assert sum(p.numel() for p in whole.vision_encoder.parameters()) == 5_738_964
    images, prompts = pixels(), 3 * torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        from_pixels = sam(images, input_masks=prompts, multimask_output=False)
        from_features = sam(
            image_embeddings=sam.get_image_embeddings(images), input_masks=prompts, multimask_output=False
        )
    assert from_pixels.pred_masks.std() > 0.01
    assert torch.equal(from_pixels.pred_masks, from_features.pred_masks)


def test_both_attentions_agree_and_hidden_states_are_told(sam):
    encoder = sam.vision_encoder
    with torch.no_grad():
        for layer in encoder.modules():
            if isinstance(layer, MobileSamVisionAttention):
                layer.relative_position_bias.normal_(std=2)
        assert sam.config.vision_config._attn_implementation == "sdpa"
        expected = encoder(pixels(), output_hidden_states=True)
        sam.set_attn_implementation("eager")
        output = encoder(pixels(), output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    # what enters the first layer and what each gives; 64 pixels are maps of 16, 8, 8 and 8 cells
    shapes = [tuple(states.shape[1:]) for states in expected.hidden_states]
    assert shapes == [(8, 16, 16), (8, 16, 16), (16, 8, 8), (16, 8, 8), (16, 8, 8), (32, 8, 8)]
    assert [tuple(weights.shape[1:]) for weights in output.attentions] == [
        (2, 9, 9),
        (4, 16, 16),
        (4, 16, 16),
        (4, 9, 9),
    ]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_batch_equals_singles(sam):
    together = sam.get_image_embeddings(pixels())
    for row in (0, 1):
        alone = sam.get_image_embeddings(pixels()[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_training_mode_changes_nothing_and_moves_nothing(sam):
    """No dropout, and no statistics of batches that a frozen encoder in train() would still update."""
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in sam.modules())
    before, expected = copy.deepcopy(sam.state_dict()), sam.get_image_embeddings(pixels())
    sam.train()
    assert torch.equal(sam.get_image_embeddings(pixels()), expected)
    for name, weight in sam.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_gradients_reach_every_weight_of_the_encoder_and_checkpointing_keeps_them(sam):
    sam.train()

    def gradients() -> dict[str, torch.Tensor]:
        sam.zero_grad()
        embeddings = sam.vision_encoder(pixels()).last_hidden_state
        (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
        return {name: p.grad.clone() for name, p in sam.vision_encoder.named_parameters()}

    expected = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    sam.gradient_checkpointing_enable()
    assert sam.vision_encoder.stages[1].layers[0].gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_bf16_stays_close(sam):
    expected = sam.get_image_embeddings(pixels())
    half = copy.deepcopy(sam.vision_encoder).to(torch.bfloat16)
    with torch.no_grad():
        found = half(pixels().to(torch.bfloat16)).last_hidden_state
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskGeneration, MobileSamModel])
def test_save_and_load(sam, tmp_path, auto):
    sam.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MobileSamConfig
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MobileSamModel and not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, sam.state_dict()[name]), name
    assert torch.equal(loaded.get_image_embeddings(pixels()), sam.get_image_embeddings(pixels()))


def test_no_weight_depends_on_the_canvas(sam, tmp_path):
    sam.save_pretrained(tmp_path)
    large = MobileSamModel.from_pretrained(tmp_path, vision_config={"image_size": 96})
    assert large.config.prompt_encoder_config.image_embedding_size == 12
    assert large.get_image_embeddings(pixels(1, 96)).shape == (1, 32, 12, 12)
    large.save_pretrained(tmp_path / "large")
    assert MobileSamModel.from_pretrained(tmp_path / "large").config.prompt_encoder_config.image_size == 96


def test_new_weights_are_those_of_a_new_model():
    encoder = MobileSamModel(tiny_segmenter_config("mobile_sam")).vision_encoder
    for name, parameter in encoder.named_parameters():
        if name.endswith(("relative_position_bias", ".bias")):
            assert not parameter.any(), name
        elif parameter.ndim > 1:
            assert 0.005 < parameter.std() < 0.05, name


def test_layers_that_must_not_be_split_exist(sam):
    names = {type(module).__name__ for module in sam.modules()}
    assert set(MobileSamModel._no_split_modules) <= names and "MobileSamVisionLayer" in names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 1000}, "image_size is 1000 pixels; expected a multiple of the 16 pixels"),
        ({"depths": [2, 2, 6]}, "one entry per stage, and strides one less; got 4, 3, 4, 4 and 3"),
        ({"strides": [2, 2, 2, 1]}, "strides one less; got 4, 4, 4, 4 and 4"),
        ({"num_heads": [2, 4, 6, 10]}, "stage 2 has 160 channels, no multiple of its 6 heads"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(Exception) as error:
        MobileSamConfig(vision_config=fields)
    assert message in str(error.value.__cause__ or error.value)


def test_one_width_for_all_parts():
    with pytest.raises(Exception) as error:
        MobileSamConfig(mask_decoder_config={"hidden_size": 128})
    assert "256 of image embeddings, 256 of the prompt encoder, 128 of the mask decoder" in str(error.value.__cause__)


def test_images_of_another_size_are_named(sam):
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\); expected \(batch_size, 3, 64, 64\)"):
        sam.get_image_embeddings(pixels(1, 32))


@pytest.mark.slow
def test_a_stranger_loads_it_alone_and_in_a_composition(sam, tmp_path):
    """Where the package is not installed, and transformers knows no MobileSAM."""
    model = tiny_model("llava", sam_config=tiny_segmenter_config("mobile_sam"))
    processor = tiny_processor("llava", sam_image_processor=tiny_segmenter_config("mobile_sam"))
    for part, name in ((model, "composition"), (processor, "composition"), (sam, "mobile_sam")):
        part.save_pretrained(tmp_path / name)
    inputs = dict(processor(images=tiny_image(), instruction="the red one", return_tensors="pt"))
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    script = [sys.executable, str(SUPPORT / "mobile_sam_stranger.py"), str(tmp_path)]
    run = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers = torch.load(tmp_path / "answers.pt")
    expected = {
        "composition": model.segment(**inputs, max_new_tokens=8).pred_masks,
        "alone": sam.get_image_embeddings(inputs["sam_pixel_values"]),
    }
    assert answers.keys() == expected.keys()
    for name, value in expected.items():
        assert value.std() > 0.01
        torch.testing.assert_close(answers[name], value, atol=1e-5, rtol=0, msg=name)
