# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Whole models around every segmenter: files, processors, answers on any image, caches, trainers, baselines."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import ImageOps
from places import SAMPLES
from transformers import AutoModel, AutoProcessor

from segcompass_hf import SegCompassConfig, SegCompassForReasoningSegmentation
from segcompass_hf.data.embedding_cache import EmbeddingCache
from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation.predictors.baselines import IdealMasksPredictor, SamBoxCentrePredictor
from segcompass_hf.evaluation.predictors.sam_prompts import PromptedSam, SamPrompt
from segcompass_hf.explain import explain
from segcompass_hf.image_features_segcompass import ImageFeatures, parts_of
from segcompass_hf.modeling_masks import MaskStage

PHOTOGRAPHS = sorted((SAMPLES / "images").glob("*.jpg"))
ODD_SIZES = [(200, 31), (31, 200), (64, 64), (3, 90)]  # width, height


@pytest.fixture(scope="module", params=tiny.SEGMENTERS)
def kind(request):
    tiny.tiny_segmenter_config(request.param)  # skips where timm is missing
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return tiny.tiny_model(sam_config=tiny.tiny_segmenter_config(kind))


@pytest.fixture(scope="module")
def processor(kind):
    return tiny.tiny_processor(sam_image_processor=tiny.tiny_segmenter_config(kind))


def inputs_of(processor, images, training=False):
    kwargs = {}
    if training:
        kwargs["reasoning"] = ["there is one"] * len(images)
        kwargs["masks"] = [tiny.tiny_mask(1 + row % 2, image.size) for row, image in enumerate(images)]
    return processor(images=images, instruction="the largest red circle", return_tensors="pt", **kwargs)


def images_of(sizes):
    return [tiny.tiny_image(row, size) for row, size in enumerate(sizes)]


@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same(kind, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read = tiny.realign(AutoModel.from_pretrained(tmp_path)), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded.sam) is type(model.sam)
    assert json.loads((tmp_path / "config.json").read_text())["sam_config"]["model_type"] == kind
    assert read.geometry == processor.geometry == model.mask_stage.geometry
    images = images_of([(40, 30), (50, 44)])
    inputs, again = inputs_of(processor, images, training=True), inputs_of(read, images, training=True)
    assert inputs.keys() == again.keys() and all(torch.equal(inputs[name], again[name]) for name in inputs)
    expected, found = model(**inputs), loaded(**again)
    for name in ("loss", "heatmap_logits", "pred_masks"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_features_it_returns_can_be_passed_back(model, processor):
    inputs = inputs_of(processor, images_of([(40, 30), (50, 44)]))
    output = model.segment(**inputs, max_new_tokens=10, output_image_embeddings=True)
    del inputs["sam_pixel_values"]
    again = model.segment(**inputs, max_new_tokens=10, image_embeddings=output.image_embeddings)
    torch.testing.assert_close(again.pred_masks, output.pred_masks, atol=1e-5, rtol=1e-5)
    forward = model(**inputs, image_embeddings=output.image_embeddings, output_image_embeddings=True)
    assert parts_of(forward.image_embeddings)[0] is parts_of(output.image_embeddings)[0]
    two = {"do_sample": True, "num_return_sequences": 2}
    copies = model.segment(**inputs, **two, max_new_tokens=10, image_embeddings=output.image_embeddings)
    assert copies.pred_masks.shape[0] == 4


@torch.no_grad()
def test_images_of_odd_sizes_get_masks_of_their_own_size(model, processor):
    images = images_of(ODD_SIZES)
    inputs = inputs_of(processor, images)
    output = model.segment(**inputs, max_new_tokens=10)
    assert output.pred_masks.isfinite().all()
    results = processor.post_process_slots(output, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert [result["masks"].shape[1:] for result in results] == [size[::-1] for size in ODD_SIZES]


@pytest.mark.skipif(not PHOTOGRAPHS, reason="no photographs; set SEGCOMPASS_SAMPLES_DIR to the folder of images/")
@torch.no_grad()
def test_photographs_get_masks_of_their_own_size(model, processor):
    inputs = processor(images=PHOTOGRAPHS, instruction="the animal nearest to the camera", return_tensors="pt")
    output = model.segment(**inputs, max_new_tokens=10)
    results = processor.post_process_slots(output, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    from PIL import Image

    sizes = [ImageOps.exif_transpose(Image.open(path)).size[::-1] for path in PHOTOGRAPHS]
    assert [tuple(result["masks"].shape[1:]) for result in results] == sizes
    assert all(masks.std() > 1e-3 for masks in output.pred_masks)
    assert not torch.allclose(output.pred_masks[0], output.pred_masks[1], atol=1e-4)  # the photograph matters


def test_a_step_moves_what_trains_and_nothing_else(model, processor):
    model = SegCompassForReasoningSegmentation(model.config)
    model.freeze_for_training()
    inputs = inputs_of(processor, images_of([(40, 30), (50, 44)]), training=True)
    model.train()(**inputs).loss.backward()
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trains
    assert any(name.startswith("sam.mask_decoder.") for name in trains)
    assert not any(name.startswith("sam.vision_encoder.") for name in trains)


def test_units_of_sharding_are_the_segmenter_s(model):
    names = {type(part).__name__ for part in (model.sam.vision_encoder, model.sam.mask_decoder)}
    assert names <= set(model._no_split_modules)


@torch.no_grad()
def test_features_on_disk_are_those_of_the_encoder(model, processor, tmp_path):
    images = images_of([(40, 30), (50, 44), (31, 60)])
    expected = model.encode_image(processor._sam_inputs(images)["sam_pixel_values"])
    with EmbeddingCache(tmp_path, model, processor, dtype="float32", batch_size=2) as cache:
        cache.fill(images)
    again = EmbeddingCache(tmp_path, model, processor, dtype="float32")
    assert len(again) == 3 and again.num_encoded == 0
    found = again.get(images[::-1])
    assert type(found) is type(expected)
    for part, other in zip(parts_of(found), parts_of(expected), strict=True):
        torch.testing.assert_close(part, other.flip(0), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert EmbeddingCache(tmp_path, loaded, processor, dtype="float32").encoder_key == again.encoder_key
    assert again.size(1).per_image == 4 * sum(part[0].numel() for part in parts_of(expected))
    inputs = again.caching_processor(processor)(images=images, instruction="x", return_tensors="pt")
    assert "sam_pixel_values" not in inputs and model(**inputs).pred_masks.shape[0] == 3


@torch.no_grad()
def test_what_encodes_beside_the_encoder_is_part_of_the_key(tmp_path):
    model = tiny.tiny_model(sam_config=tiny.tiny_segmenter_config("sam2"))
    processor = tiny.tiny_processor(sam_image_processor=model.config.sam_config)
    cache = EmbeddingCache(tmp_path, model, processor)
    cache.get(images_of([(40, 30)]))
    before = cache.encoder_key
    model.sam.mask_decoder.conv_s0.weight.mul_(2)
    cache.get(images_of([(40, 30)]))
    assert cache.encoder_key != before and cache.num_encoded == 2


@pytest.mark.parametrize("segmenter", ["sam_hq", "sam2"])
def test_one_step_of_both_trainers(segmenter, tmp_path):
    pytest.importorskip("trl")
    from grpo import tiny_trainer
    from supervised import arguments, tiny_row

    from segcompass_hf.training.segmentation.config import SegmentationConfig
    from segcompass_hf.training.segmentation.trainer import SegmentationTrainer

    model = tiny.tiny_model(sam_config=tiny.tiny_segmenter_config(segmenter))
    processor = tiny.tiny_processor(sam_image_processor=model.config.sam_config)
    settings = {"embedding_cache_dir": str(tmp_path / "cache"), "per_device_train_batch_size": 2}
    trainer = SegmentationTrainer(
        model=model,
        args=arguments(SegmentationConfig, tmp_path / "supervised", **settings),
        train_dataset=[tiny_row(0), tiny_row(1, 2)],
        processing_class=processor,
    )
    before = model.sam.mask_decoder.upscale_conv1.weight.clone()
    trainer.train()
    assert trainer.state.global_step == 1 and np.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert not torch.equal(model.sam.mask_decoder.upscale_conv1.weight, before)
    joint = tiny_trainer(tmp_path / "joint", model=model, processor=processor, max_steps=1)
    before = model.sam.mask_decoder.upscale_conv1.weight.clone()
    joint.train()
    assert joint.state.global_step == 1
    assert not torch.equal(model.sam.mask_decoder.upscale_conv1.weight, before)


@torch.no_grad()
def test_boxes_and_points_land_where_the_image_lies(model, processor):
    """A box of image pixels, placed by hand on the canvas of the segmenter's own `forward`."""
    image = tiny.tiny_image(0, (40, 20))
    box, point = (4.0, 2.0, 24.0, 12.0), (10.0, 5.0)
    [(masks, scores)] = PromptedSam(model.sam, processor).segment([image], [[SamPrompt(box, (point,))]])
    geometry = model.mask_stage.geometry
    scale = torch.tensor([64 / 40, 64 / 20 if geometry.fit == "stretch" else 64 / 40])
    own = MaskStage(model.sam).segmenter(
        pixel_values=processor._sam_inputs([image])["sam_pixel_values"],
        input_points=(torch.tensor(point) * scale)[None, None, None],
        input_labels=torch.ones(1, 1, 1, dtype=torch.int),
        input_boxes=(torch.tensor(box).view(2, 2) * scale).view(1, 1, 4),
        multimask_output=False,
    )
    assert (masks[0] == (geometry.restore_map(own.pred_masks[0, 0, 0], (20, 40)) > 0).numpy()).mean() > 0.99
    assert scores[0] == pytest.approx(float(own.iou_scores[0, 0, 0].clamp(0, 1)), abs=1e-4)


def test_baselines(model, processor):
    size = (90, 44)
    row = {"image": tiny.tiny_image(0, size), "masks": [encode_mask(mask) for mask in tiny.tiny_mask(2, size)]}
    [ideal] = IdealMasksPredictor(processor).predict([row])
    wanted = tiny.tiny_mask(2, size)
    assert (ideal.masks & wanted).sum() / (ideal.masks | wanted).sum() > 0.9
    [prompted] = SamBoxCentrePredictor(model.sam, processor, "both").predict([row])
    assert prompted.masks.shape == (2, 44, 90)
    with pytest.raises(ValueError, match="pass the processor of the same checkpoint"):
        PromptedSam(model.sam, 128)


def test_an_explanation(model, processor):
    image = tiny.tiny_image(0, (50, 30))
    explanation = explain(model, processor, image=image, instruction="the ring", num_ablations=1, max_new_tokens=10)
    assert all(mask.mask.shape == (30, 50) for mask in explanation.masks)


@torch.no_grad()
def test_in_bf16_positions_stay_and_answers_are_finite(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    matrix = half.sam.shared_image_embedding.positional_embedding
    assert torch.equal(matrix, model.sam.shared_image_embedding.positional_embedding)
    output = half.segment(**inputs_of(processor, images_of([(40, 30)])).to(torch.bfloat16), max_new_tokens=10)
    assert output.pred_masks.isfinite().all()


@pytest.mark.parametrize("segmenter", ["sam2", "sam_hq"])
@torch.no_grad()
def test_offloaded_weights_are_at_hand(segmenter):
    accelerate = pytest.importorskip("accelerate")
    model = tiny.tiny_model(sam_config=tiny.tiny_segmenter_config(segmenter))
    processor = tiny.tiny_processor(sam_image_processor=model.config.sam_config)
    inputs = inputs_of(processor, images_of([(40, 30)]))
    expected = model.segment(**inputs, max_new_tokens=10).pred_masks
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(weight.is_meta for weight in model.sam.parameters())
    torch.testing.assert_close(model.segment(**inputs, max_new_tokens=10).pred_masks, expected)


def test_parts_are_loaded_by_class_and_refused_by_name(tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    vlm = AutoModelForImageTextToText.from_config(tiny.tiny_vlm_config())
    tiny.tiny_segmenter("sam_hq").save_pretrained(tmp_path / "sam_hq")
    processor = tiny.tiny_processor(sam_image_processor=tiny.tiny_segmenter_config("sam_hq"))
    fields = {"d_slot": 32, "slot_encoder_heads": 4, "sae_config": {"d_sae": 64}, "processor": processor}
    model = SegCompassForReasoningSegmentation.from_pretrained_parts(vlm, tmp_path / "sam_hq", **fields)
    assert type(model.sam).__name__ == "SamHQModel"
    with pytest.raises(ValueError, match="'clip_vision_model' model; expected a SAM"):
        SegCompassForReasoningSegmentation.from_pretrained_parts(vlm, vlm.model.vision_tower, **fields)
    with pytest.raises(Exception, match="'sam3' model; expected a SAM"):
        SegCompassConfig(vlm_config=vlm.config, sam_config=AutoConfig.for_model("sam3"))


def test_the_original_format_has_a_place_for_sam_alone(tmp_path):
    from segcompass_hf.hub.conversion.to_original import convert_to_original_checkpoint

    tiny.tiny_model(sam_config=tiny.tiny_segmenter_config("sam2")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="segments with a 'sam2' model; the original has a place for SAM alone"):
        convert_to_original_checkpoint(tmp_path / "model", tmp_path / "original")


def test_what_quantising_skips_and_adapters_copy(model):
    pytest.importorskip("peft")
    from segcompass_hf.loading_segcompass import full_precision_modules
    from segcompass_hf.training.adapters import head_modules

    assert "sam" in full_precision_modules(model.config, type(model))
    unused = {f"sam.{name}" for name, _ in model.mask_stage.unused_parameters()}
    copied = tuple(f"{name}." for name in head_modules(model))
    assert "sam.mask_decoder.transformer." in copied
    assert not [name for name in unused if name.startswith(copied)]


def test_a_card_tells_the_segmenter(model, tmp_path):
    from segcompass_hf.hub.publishing.card_facts import _model_lines

    [text] = [text for part, text in _model_lines(model.config.to_dict()) if part == "SAM"]
    kind = model.config.sam_config.model_type
    assert text.endswith("64 x 64 pixels") and (kind == "sam" or text.startswith(f"{kind}, "))


def test_plain_tensors_stay_what_sam_has(tmp_path):
    model = tiny.tiny_model()
    pixels = tiny.tiny_processor()._sam_inputs(images_of([(40, 30)]))["sam_pixel_values"]
    assert torch.is_tensor(model.encode_image(pixels)) and not isinstance(model.encode_image(pixels), ImageFeatures)
