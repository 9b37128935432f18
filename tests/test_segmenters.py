# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Every segmenter behind the mask stage: its own numbers, gradients, batches, files, canvases, and what is refused."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    SEGMENTERS,
    realign,
    tiny_image,
    tiny_mask,
    tiny_model,
    tiny_processor,
    tiny_segmenter,
    tiny_segmenter_config,
)
from transformers import AutoConfig, AutoModel, BatchFeature, PretrainedConfig, SamConfig

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.image_features_segcompass import ImageFeatures, join_rows, parts_of
from segcompass_hf.loading_segcompass import load_segmenter
from segcompass_hf.modeling_masks import MaskStage, check_segmenter, positional_embeddings, segmenter_class
from segcompass_hf.segmenters_segcompass import geometry_of, to_sam_image_processor

STRETCHED = ("sam2", "sam3_tracker")


@pytest.fixture(scope="module", params=SEGMENTERS)
def segmenter(request):
    return tiny_segmenter(request.param)


@pytest.fixture
def stage(segmenter):
    segmenter.requires_grad_(True)
    segmenter.zero_grad()
    return MaskStage(segmenter)


def pixels_of(stage, batch_size=2):
    return torch.randn(batch_size, 3, stage.canvas, stage.canvas)


def heatmaps_of(stage, batch_size=2, num_slots=3):
    return 3 * torch.randn(batch_size, num_slots, stage.map_size, stage.map_size)


def rows_differ(first, second) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(parts_of(first), parts_of(second), strict=True))


# Numbers


@torch.no_grad()
def test_masks_are_those_of_the_segmenter_s_own_forward(stage):
    torch.manual_seed(1)
    pixels, heatmaps = pixels_of(stage), heatmaps_of(stage)
    masks = stage.decode(stage.encode_image(pixels), heatmaps)
    assert masks.std() > 0.05
    for slot in range(3):
        asked = {"pixel_values": pixels, "input_masks": heatmaps[:, slot : slot + 1], "multimask_output": False}
        own = stage.segmenter(**asked).pred_masks[:, 0, 0]  # (2, map_size, map_size)
        torch.testing.assert_close(masks[:, slot], own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        positional_embeddings(stage.segmenter), stage.segmenter.get_image_wide_positional_embeddings()
    )


@torch.no_grad()
def test_a_batch_equals_its_images_and_slots_one_by_one(stage):
    torch.manual_seed(2)
    pixels, heatmaps = pixels_of(stage), heatmaps_of(stage)
    features = stage.encode_image(pixels)
    assert [tuple(part.shape) for part in parts_of(features)] == [(2, *shape) for shape in stage.feature_shapes]
    masks = stage.decode(features, heatmaps)
    for row in range(2):
        single = stage.encode_image(pixels[row : row + 1])
        assert rows_differ(single, features[row : row + 1]) < 1e-5
        torch.testing.assert_close(stage.decode(single, heatmaps[row : row + 1])[0], masks[row], atol=1e-5, rtol=1e-5)
    pairs = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1])
    torch.testing.assert_close(stage.decode(features, heatmaps, pairs=pairs), masks[pairs], atol=1e-5, rtol=1e-5)
    none = torch.zeros(0, dtype=torch.long)
    assert stage.decode(features, heatmaps, pairs=(none, none)).shape == (0, *heatmaps.shape[-2:])


@torch.no_grad()
def test_padding_is_where_nothing_of_the_image_lies(stage):
    sizes = torch.tensor([stage.geometry.resized_size((30, 60))])
    area = stage.valid_area(sizes)
    if stage.geometry.fit == "stretch":
        assert area.all()
    else:  # the image fills the upper half
        assert area[0, 0, : stage.map_size // 2].all() and not area[0, 0, stage.map_size // 2 :].any()


@torch.no_grad()
def test_bf16_keeps_positions_and_masks(stage):
    torch.manual_seed(3)
    half = tiny_segmenter(stage.segmenter.config.model_type)
    half.load_state_dict(stage.segmenter.state_dict())
    from segcompass_hf.loading_segcompass import _cast_sam

    _cast_sam(half, torch.bfloat16)
    assert torch.equal(positional_embeddings(half), positional_embeddings(stage.segmenter))
    pixels, heatmaps = pixels_of(stage), heatmaps_of(stage)
    features = MaskStage(half).encode_image(pixels)
    assert features.dtype == torch.bfloat16
    masks = MaskStage(half).decode(features, heatmaps).float()
    expected = stage.decode(stage.encode_image(pixels), heatmaps)
    assert masks.isfinite().all()
    assert torch.corrcoef(torch.stack([masks.flatten(), expected.flatten()]))[0, 1] > 0.95


@torch.no_grad()
def test_only_the_mask_that_trains_is_given(stage):
    """`dynamic_multimask_via_stability` would put others in its place in evaluation, where it is unstable."""
    kind = stage.segmenter.config.model_type
    untouched = tiny_segmenter(kind)
    if not hasattr(untouched.config.mask_decoder_config, "dynamic_multimask_via_stability"):
        assert kind in ("sam", "sam_hq", "mobile_sam")
        return
    for settings in (untouched.mask_decoder, untouched.config.mask_decoder_config):
        settings.dynamic_multimask_via_stability = True
    torch.manual_seed(4)
    pixels, heatmaps = pixels_of(stage), heatmaps_of(stage, num_slots=1)
    asked = {"pixel_values": pixels, "input_masks": heatmaps, "multimask_output": False}
    changed = untouched(**asked).pred_masks[:, 0]
    prepared = MaskStage(untouched)
    assert not untouched.mask_decoder.dynamic_multimask_via_stability
    assert not untouched.config.mask_decoder_config.dynamic_multimask_via_stability
    masks = prepared.decode(prepared.encode_image(pixels), heatmaps)
    torch.testing.assert_close(masks, untouched(**asked).pred_masks[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(masks, changed, atol=1e-3)  # what it guards against


# Gradients


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_unused_parameters_are_exactly_those_without_a_gradient(stage, trains):
    torch.manual_seed(5)
    stage.segmenter.vision_encoder.requires_grad_(trains)
    heatmaps = heatmaps_of(stage).requires_grad_()
    features = stage.encode_image(pixels_of(stage))
    assert all(part.requires_grad == trains for part in parts_of(features))
    stage.decode(features, heatmaps).square().mean().backward()
    assert heatmaps.grad.abs().amax((2, 3)).min() > 0  # every slot's
    found = {
        name
        for name, weight in stage.segmenter.named_parameters()
        if not name.startswith("vision_encoder.") and (weight.grad is None or not weight.grad.any())
    }
    matrix = {name for name, _ in stage.segmenter.named_parameters() if "positional_embedding" in name}
    assert {name for name, _ in stage.unused_parameters()} == found | matrix
    reached = [weight.grad is not None for weight in stage.segmenter.vision_encoder.parameters()]
    assert any(reached) == trains
    assert trains or not set(stage.encoding_parameters()) - found


# Rows


def test_image_features_behave_as_a_batch_of_rows():
    features = ImageFeatures(torch.randn(3, 4, 2, 2), (torch.randn(3, 2, 8, 8), torch.randn(3, 1, 4, 4)))
    assert (len(features), features.shape, features.dtype) == (3, (3, 4, 2, 2), torch.float32)
    for index in (slice(1, 3), torch.tensor([2, 2, 0]), [0], 1):
        assert all(torch.equal(a, b[index]) for a, b in zip(features[index].parts, features.parts, strict=True))
    assert torch.equal(features.repeat_interleave(2).extra[1], features.extra[1].repeat_interleave(2, 0))
    assert features[:1].expand(5, -1, -1, -1).extra[0].shape == (5, 2, 8, 8)
    joined = join_rows([features[row] for row in range(3)])
    assert (
        rows_differ(joined, features) == rows_differ(join_rows([features[:1], features[1:]], torch.cat), features) == 0
    )
    assert torch.is_tensor(join_rows([torch.ones(2), torch.ones(2)]))
    assert rows_differ(pickle.loads(pickle.dumps(features)), features) == 0


def test_image_features_survive_what_trainers_do_to_a_batch(tmp_path):
    from accelerate.utils import send_to_device, slice_tensors
    from transformers.trainer import Trainer, TrainingArguments

    features = ImageFeatures(torch.randn(2, 4, 2, 2), (torch.randn(2, 2, 8, 8),))
    trainer = Trainer(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    moved = trainer._prepare_inputs({"image_embeddings": features})["image_embeddings"]
    sent = send_to_device(BatchFeature({"image_embeddings": features}), "cpu")["image_embeddings"]
    halves = slice_tensors({"image_embeddings": features}, slice(0, 1))["image_embeddings"]
    torch.save(features, tmp_path / "features.pt")
    stored = torch.load(tmp_path / "features.pt", weights_only=False)
    for found, expected in ((moved, features), (sent, features), (halves, features[:1]), (stored, features)):
        assert isinstance(found, ImageFeatures) and rows_differ(found, expected) == 0
    assert send_to_device(features, "meta").extra[0].is_meta
    assert rows_differ(ImageFeatures(tuple(features.items())), features) == 0  # as DistributedDataParallel makes one


def test_a_data_loader_pins_image_features(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory  # what a loader's thread calls, where there is a GPU

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: pinned.append(tensor) or tensor.clone())
    features = ImageFeatures(torch.randn(2, 4, 2, 2), (torch.randn(2, 2, 8, 8),))
    found = pin_memory(BatchFeature({"image_embeddings": features}))["image_embeddings"]
    assert isinstance(found, ImageFeatures) and rows_differ(found, features) == 0
    assert [tensor is part for tensor, part in zip(pinned, features.parts, strict=True)] == [True, True]


def test_features_of_another_segmenter_are_refused():
    stage = MaskStage(tiny_segmenter("sam2"))
    features = stage.encode_image(pixels_of(stage))
    with pytest.raises(
        ValueError, match="hold 1 tensors, but the mask decoder of Sam2Model reads 3; pass what encode"
    ):
        stage.decode(features.embeddings, heatmaps_of(stage))


# Canvases


def test_pixels_are_made_by_pil_alone(segmenter):
    geometry = geometry_of(segmenter.config)
    image = tiny_image(0, (50, 37))
    pixels = geometry.image_processor()([image], return_tensors="pt")["pixel_values"]
    height, width = geometry.resized_size((37, 50))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype("float32") / 255
    expected = torch.zeros(1, 3, geometry.canvas, geometry.canvas)
    normalised = (resized - np.float32(geometry.image_mean)) / np.float32(geometry.image_std)
    expected[0, :, :height, :width] = torch.from_numpy(normalised).permute(2, 0, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=1e-5)
    side = geometry.canvas
    assert (height, width) == ((side, side) if geometry.fit == "stretch" else (47, 64))


@pytest.mark.parametrize("size", [(300, 900), (900, 300), (513, 511)], ids=str)
@pytest.mark.parametrize("kind", ["sam", "sam2", "sam3_tracker"])
def test_a_mask_finds_back_from_its_target(kind, size):
    geometry = geometry_of(AutoConfig.for_model(kind))
    assert geometry.map_size == {"sam": 256, "sam2": 256, "sam3_tracker": 288}[kind]
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, size[0] // 5 : size[0] // 2, size[1] // 3 : -size[1] // 7] = True
    target = geometry.soft_mask_targets(mask)[0]
    restored = geometry.restore_map(target - 0.5, size) > 0
    iou = (restored & mask[0]).sum() / (restored | mask[0]).sum()
    assert iou > 0.98


def test_the_image_processors_of_the_segmenters_themselves_are_understood():
    class Published:  # fields of Sam2ImageProcessor, whose class needs torchvision
        size, mask_size = {"height": 1024, "width": 1024}, {"height": 256, "width": 256}
        image_mean, image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

        def to_dict(self):
            names = ("size", "mask_size", "image_mean", "image_std")
            return {name: getattr(self, name) for name in names} | {"image_processor_type": "Sam2ImageProcessor"}

    found = geometry_of(to_sam_image_processor(Published()))
    assert found == geometry_of(AutoConfig.for_model("sam2"))
    assert geometry_of(to_sam_image_processor(1024)) == geometry_of(SamConfig())
    with pytest.raises(ValueError, match="sam_processor is a float; expected a segmenter's processor"):
        to_sam_image_processor(0.5)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_folder_s_own_statistics_of_pixels_count(file, kind, tmp_path):
    config = tiny_segmenter_config(kind)
    config.save_pretrained(tmp_path)
    without = geometry_of(to_sam_image_processor(tmp_path))
    assert without == geometry_of(config) and without.image_mean == (0.485, 0.456, 0.406)
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    published = {"image_processor_type": "Sam2ImageProcessorFast", "size": {"height": 9, "width": 9}, **own}
    fields = (
        published if file.startswith("pre") else {"image_processor": published, "processor_class": "Sam2Processor"}
    )
    (tmp_path / file).write_text(json.dumps(fields))
    for source in (tmp_path, str(tmp_path)):
        found = geometry_of(to_sam_image_processor(source))
        assert found == replace(without, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))  # the rest as before


@pytest.mark.parametrize("given", [{"canvas": 128}, {"fit": "stretch"}], ids=str)
def test_a_processor_of_another_segmenter_is_refused(given):
    vlm, sam = tiny_model().vlm, tiny_segmenter("sam")
    other = replace(geometry_of(sam.config), **given).image_processor()
    processor = SegCompassProcessor.from_parts(tiny_processor().vlm_processor, other)
    with pytest.raises(ValueError, match="pass the processor of the same checkpoint"):
        SegCompassForReasoningSegmentation.from_pretrained_parts(vlm, sam, processor=processor)


# Files


def test_a_folder_loads_as_its_own_class_with_all_its_weights(segmenter, tmp_path):
    segmenter.save_pretrained(tmp_path)
    loaded = load_segmenter(tmp_path)
    assert type(loaded) is type(segmenter)
    for name, weight in segmenter.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    stage, again = MaskStage(segmenter), MaskStage(realign(loaded))
    pixels, heatmaps = pixels_of(stage), heatmaps_of(stage)
    with torch.no_grad():
        masks = stage.decode(stage.encode_image(pixels), heatmaps)
        torch.testing.assert_close(again.decode(again.encode_image(pixels), heatmaps), masks, atol=1e-6, rtol=1e-6)


def test_missing_and_surplus_weights_are_refused(segmenter, tmp_path):
    weights = segmenter.state_dict()
    lacking = {name: weight for name, weight in weights.items() if "upscale" not in name}
    count = len(weights) - len(lacking)
    segmenter.save_pretrained(tmp_path / "lacking", state_dict=lacking)
    with pytest.raises(
        ValueError, match=rf"lacks {count} weights of this model \(mask_decoder.upscale.*it is no whole"
    ):
        load_segmenter(tmp_path / "lacking")
    segmenter.save_pretrained(
        tmp_path / "more", state_dict=segmenter.state_dict() | {"mask_decoder.unheard_of": torch.ones(1)}
    )
    with pytest.raises(ValueError, match=r"holds 1 weights \(mask_decoder.unheard_of\) for which"):
        load_segmenter(tmp_path / "more")


def video_config(kind: str) -> PretrainedConfig:
    """A tiny SAM 2 or SAM 3 for videos around the parts of `tiny_segmenter_config`."""
    image = tiny_segmenter_config(kind)
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    parts = {name: getattr(image, name).to_dict() for name in names}
    for name in names[1:]:
        del parts[name]["model_type"]
    memory = {"memory_attention_hidden_size": 32, "memory_attention_num_layers": 1, "memory_encoder_hidden_size": 32}
    memory |= {"memory_attention_feed_forward_hidden_size": 64, "memory_encoder_output_channels": 8}
    memory |= {"mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32, "memory_fuser_intermediate_dim": 32}
    memory |= {"memory_attention_rope_feat_sizes": [8, 8]}
    return AutoConfig.for_model(f"{kind}_video", **parts, image_size=64, **memory)


@pytest.mark.parametrize("kind", ["sam2", "sam3_tracker"])
def test_of_a_checkpoint_for_videos_the_image_part_is_loaded(kind, tmp_path):
    config = video_config(kind)
    torch.manual_seed(0)
    video = AutoModel.from_config(config)
    video.save_pretrained(tmp_path)
    loaded = load_segmenter(tmp_path)
    assert (loaded.config.model_type, type(loaded)) == (kind, segmenter_class(tiny_segmenter_config(kind)))
    weights = video.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    with pytest.raises(
        ValueError, match=f"which takes no single image and mask prompt; load .* as {type(loaded).__name__}"
    ):
        check_segmenter(video)


def test_what_takes_no_mask_prompt_is_refused(tmp_path):
    config = AutoConfig.for_model("sam3")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'sam3' model; expected a SAM .*Sam3TrackerModel.from_pretrained"):
        load_segmenter(tmp_path)
    with pytest.raises(
        ValueError, match=r"'llava' model; expected a SAM or .*\(sam, sam_hq, .*sam2, sam3_tracker, edgetam"
    ):
        segmenter_class(AutoConfig.for_model("llava"))
    with pytest.raises(ValueError, match="'sam3' model"):
        to_sam_image_processor(tmp_path)


def test_targets_of_odd_masks_fit_every_map(segmenter):
    geometry = geometry_of(segmenter.config)
    masks = torch.from_numpy(tiny_mask(2, (7, 91)))
    targets = geometry.soft_mask_targets(masks)
    assert targets.shape == (2, geometry.map_size, geometry.map_size) and 0 <= targets.min() and targets.max() <= 1
