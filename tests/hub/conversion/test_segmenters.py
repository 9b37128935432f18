# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Published segmenter files: the same numbers from a folder, every weight used, everything else refused by name."""

import argparse
import json

import pytest
import torch
from original_checkpoint import SAM_FIXTURE, SAM_HEADS, sam_pixels, write_original
from parity import golden
from published_mobile_sam import CANVAS, MOBILE_SAM_FIELDS, published_embeddings, published_state
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, SamModel

from segcompass_hf import MobileSamModel
from segcompass_hf.commands import convert
from segcompass_hf.commands.common import UserError
from segcompass_hf.hub import convert_original_sam, load_original_sam
from segcompass_hf.hub.conversion.keys import fold_batch_norms

ENCODER = "image_encoder.layers.1.blocks.0"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return published_state()


@pytest.fixture(scope="module")
def published(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "mobile_sam.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "mobile_sam"
    run(published, output, "--config", json.dumps(MOBILE_SAM_FIELDS))
    return output


def run(source, output, *flags) -> None:
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", str(source), "--output", str(output), *flags])
    args.run(args)


def pixels(batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(1))


def test_folding_by_hand():
    state = {
        "x.c.weight": torch.tensor([3.0]).view(1, 1, 1, 1),
        "x.bn.weight": torch.tensor([2.0]),
        "x.bn.bias": torch.tensor([1.0]),
        "x.bn.running_mean": torch.tensor([5.0]),
        "x.bn.running_var": torch.tensor([4.0 - 1e-5]),
        "x.bn.num_batches_tracked": torch.tensor(7),
        "y.weight": torch.tensor([9.0]),
    }
    folded = fold_batch_norms(state)
    # 2 (3 x - 5) / sqrt(4) + 1 = 3 x - 4
    assert folded.keys() == {"x.weight", "x.bias", "y.weight"}
    assert (folded["x.weight"].item(), folded["x.bias"].item()) == (pytest.approx(3.0), pytest.approx(-4.0))
    assert len(state) == 7  # as it was
    del state["x.bn.running_var"]
    with pytest.raises(ValueError, match="x.c lacks its batch norm's x.bn.running_var"):
        fold_batch_norms(state)


def test_image_encoder_computes_what_the_published_one_does(folder, state):
    sam = MobileSamModel.from_pretrained(folder)
    expected = published_embeddings(state, pixels())
    assert expected.shape == (2, 32, 4, 4) and expected.std() > 0.5
    torch.testing.assert_close(sam.get_image_embeddings(pixels()), expected, atol=1e-4, rtol=0)


def test_sizes_are_read_off_the_weights(folder):
    config = MobileSamModel.config_class.from_pretrained(folder)
    vision = config.vision_config
    assert (list(vision.embed_dims), list(vision.depths)) == ([8, 16, 16, 32], [1, 1, 2, 1])
    assert (list(vision.num_heads[1:]), list(vision.window_sizes[1:])) == ([2, 4, 4], [3, 2, 3])
    assert (vision.expand_ratio, vision.mlp_ratio, vision.output_channels) == (2, 3, 32)
    assert (config.prompt_encoder_config.image_size, config.prompt_encoder_config.image_embedding_size) == (64, 4)
    assert config.prompt_encoder_config.mask_input_channels == 8 and config.mask_decoder_config.mlp_dim == 64
    assert config.mask_decoder_config.layer_norm_eps == 1e-5


def test_other_weights_are_those_of_the_file(folder, state):
    weights = MobileSamModel.from_pretrained(folder).state_dict()
    for ours, published in {
        "prompt_encoder.mask_embed.conv1.weight": "prompt_encoder.mask_downscaling.0.weight",
        "prompt_encoder.no_mask_embed.weight": "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.iou_prediction_head.proj_in.bias": "mask_decoder.iou_prediction_head.layers.0.bias",
        "shared_image_embedding.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "vision_encoder.stages.1.layers.0.attention.relative_position_bias": f"{ENCODER}.attn.attention_biases",
    }.items():
        assert torch.equal(weights[ours], state[published]), ours


def test_folder_brings_its_processor(folder):
    inputs = AutoProcessor.from_pretrained(folder)(torch.zeros(30, 40, 3).numpy(), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, CANVAS, CANVAS)
    assert inputs["reshaped_input_sizes"].tolist() == [[48, 64]]


def test_canvas_is_chosen_when_converting_or_loading(published, folder, tmp_path):
    vision = {"image_size": 96}
    output = convert_original_sam(published, tmp_path / "large", **{**MOBILE_SAM_FIELDS, "vision_config": vision})
    large, loaded = (
        MobileSamModel.from_pretrained(output),
        MobileSamModel.from_pretrained(folder, vision_config=vision),
    )
    images = torch.randn(1, 3, 96, 96)
    assert large.get_image_embeddings(images).shape == (1, 32, 6, 6)
    assert torch.equal(large.get_image_embeddings(images), loaded.get_image_embeddings(images))
    for sam in (large, loaded):
        prompts = torch.randn(1, 1, 24, 24)
        assert sam(images, input_masks=prompts, multimask_output=False).pred_masks.shape == (1, 1, 1, 24, 24)


def test_casting_spares_the_positional_matrix(published, tmp_path):
    run(published, tmp_path / "half", "--config", json.dumps(MOBILE_SAM_FIELDS), "--dtype", "bfloat16")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert kept == {"shared_image_embedding.positional_embedding"}


def test_segment_anything_converts_too(tmp_path):
    original = write_original(tmp_path / "original", *golden("core"))
    run(original / "sam_vit.pth", tmp_path / "sam", "--config", json.dumps(SAM_HEADS))
    sam = SamModel.from_pretrained(tmp_path / "sam")
    expected = load_file(SAM_FIXTURE)["out.image_embeddings"]
    torch.testing.assert_close(sam.get_image_embeddings(sam_pixels()), expected, atol=1e-5, rtol=0)


def without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without(f"{ENCODER}.mlp.fc2.bias"),
            r"1 weights are missing \(vision_encoder.stages.1.layers.0.mlp.fc2.bias\)",
        ),
        (without(f"{ENCODER}.local_conv.bn.bias"), "local_conv.c lacks its batch norm's .*local_conv.bn.bias"),
        (without("mask_decoder.iou_token.weight"), r"missing \(mask_decoder.iou_token.weight\)"),
        (without("mask_decoder.mask_tokens.weight"), "MobileSAM lacks mask_decoder.mask_tokens.weight"),
        (without(f"{ENCODER}.attn.attention_biases"), "lacks layers.1.blocks.0.attn.attention_biases"),
        (lambda s: s.update({f"{ENCODER}.gate.weight": torch.zeros(3)}), r"1 have no place \(vision_encoder.*gate"),
        (lambda s: s.update({"optimizer.step": torch.zeros(1)}), "'optimizer.step' is no Segment Anything parameter"),
        (lambda s: s.update({"image_encoder.neck.2.weight": torch.zeros(32, 32, 1, 1)}), "another shape .*neck.conv2"),
        (lambda s: s.update({"epoch": 3}), r"entries that are no tensors: epoch \(int\)"),
    ],
)
def test_what_is_not_exactly_such_a_model_is_refused(state, tmp_path, edit, message):
    changed = dict(state)
    edit(changed)
    torch.save(changed, tmp_path / "changed.pt")
    with pytest.raises(ValueError, match=message):
        load_original_sam(tmp_path / "changed.pt", MOBILE_SAM_FIELDS)


def test_what_could_run_code_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        load_original_sam(tmp_path / "module.pt")


def test_command_says_what_does_not_belong(published, folder, tmp_path):
    with pytest.raises(UserError, match="holds a segmenter alone and takes no --llm, --sae-layer"):
        run(published, tmp_path / "out", "--llm", "llm_hf", "--sae-layer", "3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds 5 files already"):
        run(published, folder)
    with pytest.raises(UserError, match="multiple of the 16 pixels"):
        run(published, tmp_path / "out", "--config", '{"vision_config": {"image_size": 100}}')
