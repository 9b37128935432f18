# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""SAM mask stage: valid area by hand, agreement with `SamModel`, matched-only decoding, key map round trip."""

import pytest
import torch
from tiny import tiny_sam_config, tiny_vlm_config
from transformers import AutoModelForImageTextToText, SamModel

from segcompass_hf import SegCompassForReasoningSegmentation
from segcompass_hf.hub.conversion.keys import convert_original_sam_state_dict, revert_to_original_state_dict
from segcompass_hf.modeling_masks import MaskStage, positional_embeddings, valid_area


@pytest.fixture(scope="module")
def sam() -> SamModel:
    torch.manual_seed(0)
    sam = SamModel(tiny_sam_config(canvas=32, patch_size=8)).eval()
    with torch.no_grad():
        for (
            parameter
        ) in sam.parameters():  # at SAM's own small initialisation the masks are 1e-5, all comparisons vacuous
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return sam


@pytest.fixture
def stage(sam) -> MaskStage:
    sam.zero_grad()
    return MaskStage(sam)


def embeddings_and_heatmaps(batch_size=2, num_slots=3):
    return torch.randn(batch_size, 32, 4, 4), 3 * torch.randn(batch_size, num_slots, 16, 16)


@pytest.mark.parametrize(
    ("sizes", "map_size", "canvas", "filled"),
    [
        ((256, 256), 64, 256, (64, 64)),
        ((171, 130), 64, 256, (43, 33)),  # (171 + 3) // 4, (130 + 3) // 4
        ((1, 4), 64, 256, (1, 1)),
        ((1024, 683), 256, 1024, (256, 171)),
        ((112, 85), 56, 112, (56, 43)),  # two pixels per cell: 85 / 2 rounded up
        ((1024, 97), 64, 256, (64, 25)),  # beyond the canvas counts as the whole of it
    ],
)
def test_valid_area_by_hand(sizes, map_size, canvas, filled):
    area = valid_area(torch.tensor([sizes]), map_size, canvas)
    expected = torch.zeros(1, 1, map_size, map_size, dtype=torch.bool)
    expected[..., : filled[0], : filled[1]] = True
    assert torch.equal(area, expected)


def test_positions_stay_exact_in_autocast_and_next_to_bf16_weights(sam, tmp_path):
    expected = sam.get_image_wide_positional_embeddings()
    assert torch.equal(positional_embeddings(sam), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (sam.get_image_wide_positional_embeddings() - expected).abs().max() > 1e-3  # what it guards against
        assert torch.equal(positional_embeddings(sam), expected)
    sam.save_pretrained(tmp_path)
    parts = SegCompassForReasoningSegmentation.from_pretrained_parts(
        AutoModelForImageTextToText.from_config(tiny_vlm_config()),
        str(tmp_path),
        sae_config={"d_sae": 64},
        d_slot=32,
        slot_encoder_heads=4,
        dtype="bfloat16",
    )
    assert parts.sam.mask_decoder.mask_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(positional_embeddings(parts.sam), expected)


def test_valid_area_of_a_batch_and_of_this_sam(stage):
    assert (stage.canvas, stage.map_size) == (32, 16)
    area = stage.valid_area(torch.tensor([[32, 15], [7, 32]]))
    assert area.sum((1, 2, 3)).tolist() == [16 * 8, 4 * 16]
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(batch_size, 2\)"):
        stage.valid_area(torch.tensor([32, 15]))


def test_decode_agrees_with_sam_itself(sam, stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    masks = stage.decode(embeddings, heatmaps)
    assert masks.shape == (2, 3, 16, 16)
    for row in range(2):
        for slot in range(3):
            alone = sam(
                image_embeddings=embeddings[row : row + 1],
                input_masks=heatmaps[row : row + 1, slot : slot + 1],
                multimask_output=False,
            ).pred_masks
            torch.testing.assert_close(masks[row, slot], alone[0, 0, 0], rtol=0, atol=1e-5)
    assert masks.std() > 0.1


def test_padding_of_the_prompt_is_minus_fifty(stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    area = stage.valid_area(torch.tensor([[32, 15], [7, 32]]))
    masks = stage.decode(embeddings, heatmaps, area)
    by_hand = heatmaps.clone()
    by_hand[0, :, :, 8:] = -50.0
    by_hand[1, :, 4:] = -50.0
    assert torch.equal(masks, stage.decode(embeddings, by_hand))
    garbage = torch.where(area, heatmaps, torch.full_like(heatmaps, 1e3))
    assert torch.equal(masks, stage.decode(embeddings, garbage, area))
    assert not torch.equal(masks, stage.decode(embeddings, heatmaps))


def test_matched_pairs_only(stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    area = stage.valid_area(torch.tensor([[32, 15], [7, 32]]))
    pairs = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    masks = stage.decode(embeddings, heatmaps, area, pairs=pairs)
    torch.testing.assert_close(masks, stage.decode(embeddings, heatmaps, area)[pairs], rtol=0, atol=1e-5)


def test_no_pairs_keep_the_decoder_in_the_graph(sam, stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    none = torch.zeros(0, dtype=torch.long)
    masks = stage.decode(embeddings, heatmaps, pairs=(none, none))
    assert masks.shape == (0, 16, 16)
    masks.sum().backward()
    assert sam.mask_decoder.mask_tokens.weight.grad.eq(0).all()
    assert sam.prompt_encoder.mask_embed.conv1.weight.grad.eq(0).all()


def test_parameters_to_freeze_are_those_without_gradient_and_the_positional_matrix(sam, stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    (stage.decode(embeddings, heatmaps) * torch.randn(2, 3, 16, 16)).sum().backward()
    unused = dict(stage.unused_parameters())
    assert unused.pop("shared_image_embedding.positional_embedding").grad.abs().sum() > 0  # used, yet never trained
    for name, parameter in sam.named_parameters():
        if name.startswith(("vision_encoder.", "shared_image_embedding.")):
            continue
        gets_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        # Keys' biases shift all scores of a query alike, so softmax cancels them up to rounding.
        if not name.endswith("k_proj.bias"):
            assert gets_gradient == (name not in unused), name


def test_frozen_encoder_keeps_no_graph(sam, stage):
    pixels = torch.randn(2, 3, 32, 32)
    assert stage.encode_image(pixels).requires_grad
    sam.vision_encoder.requires_grad_(False)
    try:
        frozen = stage.encode_image(pixels)
    finally:
        sam.vision_encoder.requires_grad_(True)
    assert not frozen.requires_grad and frozen.shape == (2, 32, 4, 4)
    assert torch.equal(frozen, sam.get_image_embeddings(pixels))
    torch.testing.assert_close(stage.encode_image(pixels[:1]), frozen[:1], rtol=0, atol=1e-5)


def test_bf16_stays_close(stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    reference = stage.decode(embeddings, heatmaps).detach()
    half = SamModel(tiny_sam_config(canvas=32, patch_size=8)).eval()
    half.load_state_dict(stage.segmenter.state_dict())
    half.to(torch.bfloat16)
    for module in (half.shared_image_embedding, half.prompt_encoder.shared_embedding):
        module.float()  # as _keep_in_fp32_modules_strict does on loading
    half.shared_image_embedding.load_state_dict(stage.segmenter.shared_image_embedding.state_dict())
    masks = MaskStage(half).decode(embeddings, heatmaps)
    assert masks.dtype == torch.bfloat16
    torch.testing.assert_close(masks.float(), reference, rtol=0, atol=0.05 * float(reference.abs().max()) + 1e-3)


def test_shapes_that_do_not_go_together_are_named(stage):
    embeddings, heatmaps = embeddings_and_heatmaps()
    with pytest.raises(ValueError, match="same batch size and maps of 4x"):
        stage.decode(embeddings, heatmaps[..., :8])
    with pytest.raises(ValueError, match="same batch size and maps of 4x"):
        stage.decode(embeddings[:1], heatmaps)


def test_sam_key_map_there_and_back(sam):
    ours = sam.state_dict()
    original = revert_to_original_state_dict({f"sam.{name}": tensor for name, tensor in ours.items()})
    # Names as they stand in the released sam_vit_*.pth files.
    for name in (
        "image_encoder.pos_embed",
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.blocks.0.norm1.weight",
        "image_encoder.blocks.0.attn.rel_pos_h",
        "image_encoder.blocks.0.attn.qkv.bias",
        "image_encoder.blocks.1.mlp.lin1.weight",
        "image_encoder.neck.0.weight",
        "image_encoder.neck.3.bias",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.point_embeddings.3.weight",
        "prompt_encoder.mask_downscaling.6.weight",
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight",
        "mask_decoder.transformer.layers.0.norm4.bias",
        "mask_decoder.transformer.norm_final_attn.weight",
        "mask_decoder.output_upscaling.3.weight",
        "mask_decoder.output_hypernetworks_mlps.2.layers.2.weight",
        "mask_decoder.iou_prediction_head.layers.1.bias",
    ):
        assert name in original, name
    assert len(original) == len(ours) - 1  # the positional matrix is stored once
    back = convert_original_sam_state_dict(original)
    prompt_positions = ours["prompt_encoder.shared_embedding.positional_embedding"]
    assert back.keys() == ours.keys()
    for name, tensor in back.items():
        same = prompt_positions if name.startswith("shared_image_embedding") else ours[name]
        assert torch.equal(tensor, same), name


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="'vlm.lm_head.weight' has no place"):
        revert_to_original_state_dict({"vlm.lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'optimizer.step' is no Segment Anything parameter"):
        convert_original_sam_state_dict({"optimizer.step": torch.zeros(1)})
