# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`embedding_cache_dir` and the VLM's frozen vision encoder: it runs once per image, and training stays what it is."""

import functools
from contextlib import nullcontext

import pytest
import torch
from sae import harvester, rows, seeded, settings
from safetensors.torch import load_file
from supervised import arguments, make_trainer, tiny_row
from tiny import tiny_model, tiny_processor, tiny_sam_image_processor, tiny_vlm_config
from transformers import CLIPImageProcessorPil, EfficientNetConfig, FastVlmConfig, FastVlmForConditionalGeneration

from segcompass_hf import SegCompassProcessor
from segcompass_hf.data.vision_cache import VisionCache
from segcompass_hf.training.sae import metrics
from segcompass_hf.training.sae.trainer import SaeTrainer
from segcompass_hf.training.vision import vision_encoder
from segcompass_hf.training.warmup.config import WarmupConfig
from segcompass_hf.training.warmup.trainer import WarmupTrainer


@pytest.fixture
def warnings(monkeypatch):
    said = []
    for module in ("data.vision_cache", "training.vision"):
        monkeypatch.setattr(f"segcompass_hf.{module}.logger.warning", said.append)
    return said


def counted(vlm):
    """Calls of a VLM's vision encoder's own forward."""
    encoder, calls = vision_encoder(vlm), []
    compute = encoder.forward

    @functools.wraps(compute)
    def forward(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs)

    encoder.forward = forward
    return calls


def tiny_rows():
    return [tiny_row(index, image_id=str(index)) for index in range(4)]


def lines_of(trainer):
    kept = ("loss", "grad_norm", "eval_loss", "language_loss", "segmentation/loss", "explained_variance")
    lines = [{name: line[name] for name in kept if name in line} for line in trainer.state.log_history]
    return [line for line in lines if line]


def run(stage, family, folder, cache, resume=None, **options):
    """Log lines and weights after two epochs over four rows; calls of the vision encoder."""
    model = tiny_model(family)
    calls = counted(model.vlm)
    if stage == "warmup":  # the Qwens' projector is inside of their vision encoder
        options |= {"trainable": "decoder", "num_eval_generations": 0}
    shared = {"per_device_train_batch_size": 2, "max_steps": 4, "embedding_cache_dir": str(cache)}
    trainer = make_trainer(stage, family, folder, tiny_rows(), model=model, **shared, **options)
    trainer.train(resume_from_checkpoint=resume)
    return lines_of(trainer), {name: value.clone() for name, value in model.state_dict().items()}, len(calls)


@pytest.fixture
def kept(monkeypatch):
    """Images that every cache has put to those it found, one entry per cache that was left."""
    numbers, leave = [], VisionCache.__exit__

    def counting(self, *exception):
        leave(self, *exception)
        numbers.append(len(self._shards or ()) - self.found_at_first)

    enter = VisionCache.__enter__

    def entering(self):
        self.found_at_first = len(self.shards)
        return enter(self)

    monkeypatch.setattr(VisionCache, "__enter__", entering)
    monkeypatch.setattr(VisionCache, "__exit__", counting)
    return numbers


def assert_same(got, expected):
    assert got[0] == expected[0]
    assert all(torch.equal(got[1][name], weight) for name, weight in expected[1].items())


def without_the_cache(monkeypatch):
    """SAM's stays: it encodes images in other batches than a step does."""
    monkeypatch.setattr("segcompass_hf.training.loop.resume.kept_vision", lambda *_: nullcontext())


@pytest.mark.parametrize(
    ("stage", "family", "options"),
    [
        ("segmentation", "llava", {}),
        ("segmentation", "qwen2_5_vl", {"gradient_checkpointing": True}),
        ("warmup", "qwen3_vl", {"bf16": True}),
    ],
)
def test_training_is_the_same_to_the_bit(stage, family, options, tmp_path, monkeypatch, warnings, kept):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        without_the_cache(patched)
        expected = run(stage, family, tmp_path / "plain", cache, **options)
    assert expected[2] >= 4 and len(expected[0]) >= 4
    first = run(stage, family, tmp_path / "first", cache, **options)
    again = run(stage, family, tmp_path / "again", cache, **options)
    for got in (first, again):
        assert_same(got, expected)
    assert kept[0] == 4 if family != "qwen3_vl" else kept[0] >= 8  # images; of Qwen3 more than one output is read
    assert kept[1] == 0
    assert warnings and all(text.startswith("vision cache: up to ") for text in warnings)


def test_a_resumed_run_reads_what_was_kept(tmp_path, kept):
    cache = tmp_path / "cache"
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = run("warmup", "llava", tmp_path / "run", cache, **options)
    resumed = run("warmup", "llava", tmp_path / "run", cache, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert kept == [4, 0]
    assert_same((resumed[0][-2:], resumed[1]), (whole[0][-2:], whole[1]))


def efficientnet_vlm():
    """FastVLM around an EfficientNet, which gives a map and has batch norms, as photos-small has it; its processor."""
    parts = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    processor = SegCompassProcessor(
        parts,
        tiny_processor().tokenizer,
        tiny_sam_image_processor(),
        vlm_processor_class="LlavaProcessor",
        vlm_processor_kwargs={
            "patch_size": 32,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
        },
    )
    vision = EfficientNetConfig(
        image_size=64,
        hidden_dim=1280,
        hidden_size=1280,
        in_channels=[32, 8, 8, 8],
        out_channels=[8] * 4,
        kernel_sizes=[3] * 4,
        strides=[2] * 4,
        num_block_repeats=[1] * 4,
        expand_ratios=[1] * 4,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        drop_connect_rate=0.0,
    )
    llava = tiny_vlm_config("llava")
    config = FastVlmConfig(
        vision_config=vision, text_config=llava.text_config, image_token_index=llava.image_token_index
    )
    torch.manual_seed(0)
    vlm = FastVlmForConditionalGeneration(config)
    encoder = vlm.model.vision_tower
    for module in encoder.modules():  # as new ones are, nothing would come out
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the batch below
    encoder.train()(torch.randn(8, 3, 64, 64))
    return vlm, processor


def test_an_encoder_with_batch_norms(tmp_path, kept):
    """They keep to their stored statistics in training, so that the encoder can be kept; the projector trains."""
    results = []
    for name in ("plain", "first", "again"):
        vlm, processor = efficientnet_vlm()
        calls = counted(vlm)
        options = {"per_device_train_batch_size": 2, "max_steps": 4, "num_eval_generations": 0}
        cache = None if name == "plain" else str(tmp_path / "cache")
        args = arguments(WarmupConfig, tmp_path / name, embedding_cache_dir=cache, **options)
        trainer = WarmupTrainer(vlm, args, tiny_rows(), None, processor)
        trainer.train()
        results.append((lines_of(trainer), vlm.state_dict(), len(calls)))
    plain, first, again = results
    assert_same(first, plain)
    assert_same(again, plain)
    assert plain[2] == 4 and kept == [4, 0]
    before = efficientnet_vlm()[0].model.multi_modal_projector.linear_1.weight
    assert not torch.allclose(again[1]["model.multi_modal_projector.linear_1.weight"], before)


@pytest.mark.parametrize(
    ("family", "message"),
    [("qwen2_5_vl", "because it trains"), ("qwen3_vl", "because it trains"), ("git", "it is not found")],
)
def test_what_cannot_be_kept_is_said_once(family, message, tmp_path, monkeypatch, warnings):
    if family == "git":  # a family whose encoder has another name
        monkeypatch.setattr("segcompass_hf.training.vision.VISION_ENCODERS", ("eyes",))
    args = arguments(WarmupConfig, tmp_path, embedding_cache_dir=str(tmp_path / "cache"), num_eval_generations=0)
    args.trainable = "decoder" if family == "git" else "without_vision"  # Qwen's projector is inside its encoder
    family = "llava" if family == "git" else family
    vlm = tiny_model(family).vlm
    trainer = WarmupTrainer(vlm, args, tiny_rows(), None, tiny_processor(family))
    before = {name: p.detach().clone() for name, p in vlm.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(warnings) == 1 and message in warnings[0]
    assert not [name for name, parameter in before.items() if torch.equal(vlm.get_parameter(name), parameter)]


def test_a_disk_too_small_stops_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("segcompass_hf.data.vision_cache.free_space", lambda folder: 2**30)
    with pytest.raises(OSError, match="for 4 images .* 0.00 MiB too little"):
        run("warmup", "llava", tmp_path, tmp_path / "cache")


class TestSae:
    def test_the_harvest_reads_it(self, tmp_path, kept):
        results = []
        for cache in (None, *[str(tmp_path / "cache")] * 2):
            model = tiny_model()
            calls = counted(model.vlm)
            args = settings(tmp_path / "out", max_steps=4, logging_steps=1, embedding_cache_dir=cache)
            trainer = SaeTrainer(model, args, rows(8), processing_class=tiny_processor())
            trainer.train()
            results.append((lines_of(trainer), trainer.model.state_dict(), len(calls)))
        for got in results[1:]:
            assert_same(got, results[0])
        assert kept[0] > 0 and kept[1] == 0

    def test_the_announcement_is_in_the_precision_of_the_harvest(self, tmp_path, monkeypatch):
        """The SAE's own steps run in bfloat16, the passes that it reads do not."""
        announced, model = [], tiny_model()
        monkeypatch.setattr(VisionCache, "announce", lambda self, images, size: announced.append(size))
        args = settings(tmp_path / "out", max_steps=1, bf16=True, embedding_cache_dir=str(tmp_path / "cache"))
        SaeTrainer(model, args, rows(8), processing_class=tiny_processor()).train()
        (file,) = (tmp_path / "cache").rglob("*.safetensors")
        assert {tensor.nbytes for tensor in load_file(file).values()} == set(announced)

    def test_evaluation_sees_an_image_once(self, monkeypatch):
        model, results = tiny_model(), []
        calls = counted(model.vlm)
        for once in (True, False):
            if not once:
                monkeypatch.setattr(metrics, "vision_read_once", lambda vlm: nullcontext())
            evaluation = metrics.SaeEvaluation()
            of_states = seeded(32, 64)
            metrics.evaluate_rows(evaluation, of_states, harvester(model, tiny_processor()), list(enumerate(rows(2))))
            results.append((len(calls), evaluation.metrics()))
            calls.clear()
        assert [number for number, _ in results] == [1, 3] and results[0][1] == results[1][1]
