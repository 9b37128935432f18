# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`trainable="masks"`: slots stay as they are, and with `slot_cache_dir` the VLM reads every row once."""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from grpo import tiny_rows
from supervised import Gradients, arguments, uneven_rows
from tiny import follow_concepts, tiny_model, tiny_processor

from segcompass_hf.training.segmentation.caches import use_caches
from segcompass_hf.training.segmentation.config import SegmentationConfig
from segcompass_hf.training.segmentation.trainer import SegmentationTrainer


@pytest.fixture
def passes(monkeypatch):
    """Rows that went through the VLM, one entry per pass."""
    calls, kind = [], type(tiny_model().vlm)
    forward = kind.forward

    @functools.wraps(forward)
    def counting(self, input_ids=None, **kwargs):
        calls.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    return calls


def run(folder, cache=None, rows=None, model=None, processor=None, **settings):
    """(trainer after training, gradients of its first step)."""
    gradients = Gradients()
    settings = {"trainable": "masks", "slot_cache_dir": cache, "num_eval_segmentations": 0} | settings
    trainer = SegmentationTrainer(
        model=follow_concepts(tiny_model() if model is None else model),
        args=arguments(SegmentationConfig, folder, **settings),
        train_dataset=uneven_rows() if rows is None else rows,
        eval_dataset=uneven_rows()[:3],
        processing_class=tiny_processor() if processor is None else processor,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients


def test_losses_and_gradients_are_those_without_a_cache(tmp_path, passes):
    plain, expected = run(tmp_path / "plain", per_device_train_batch_size=8)
    assert passes == [8]
    passes.clear()
    cached, got = run(tmp_path / "cached", str(tmp_path / "cache"), per_device_train_batch_size=8)
    assert sum(passes) == 8  # the rows of evaluation are among those of training
    assert expected.values.keys() == got.values.keys() and len(got.values) > 10
    for name, gradient in expected.values.items():
        torch.testing.assert_close(got.values[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in got.values.values()) > 1e-3
    names = ("loss", "segmentation/loss", "segmentation/confidence_loss", "segmentation/giou")
    one, other = (trainer.state.log_history[0] for trainer in (plain, cached))
    assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-6)
    assert "language_loss" not in one and "language_loss" not in other
    one, other = (trainer.evaluate()["eval_loss"] for trainer in (plain, cached))
    assert other == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_heatmap_concepts_train_from_the_caches_as_without(family, tmp_path, passes):
    settings = {"per_device_train_batch_size": 8}
    results = []
    for caches in ({}, {"cache": str(tmp_path / "cache"), "embedding_cache_dir": str(tmp_path / "embeddings")}):
        model = tiny_model(family, heatmap_concepts=True)
        processor = tiny_processor(family)  # the trainer tells it
        results.append(run(tmp_path / f"{len(caches)}", model=model, processor=processor, **settings, **caches))
        assert processor.image_token_grids is True
    (plain, expected), (cached, got) = results
    name = next(name for name in expected.values if name.endswith("concept_proj.weight"))
    assert expected.values[name].abs().max() > 1e-4
    for name, gradient in expected.values.items():
        torch.testing.assert_close(got.values[name], gradient, rtol=0, atol=1e-5, msg=name)
    one, other = (trainer.state.log_history[0]["loss"] for trainer in (plain, cached))
    assert other == pytest.approx(one, abs=1e-6)
    start = tiny_model(family, heatmap_concepts=True).slot_mapper.concept_proj.weight
    assert (cached.model.slot_mapper.concept_proj.weight - start).abs().max() > 0


def test_only_what_reads_the_segmenter_moves(tmp_path, passes):
    model = follow_concepts(tiny_model())
    before = copy.deepcopy(model.state_dict())
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "trainable": "masks"}
    args = arguments(SegmentationConfig, tmp_path, slot_cache_dir=str(tmp_path / "cache"), **settings)
    SegmentationTrainer(model, args, uneven_rows(), processing_class=tiny_processor()).train()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in moved} == {"slot_mapper", "sam"}
    assert moved >= {"slot_mapper.query_proj.weight", "slot_mapper.key_proj.weight", "slot_mapper.slot_proj.weight"}
    assert not any(name.startswith("sam.vision_encoder") for name in moved)
    assert sum(passes) == 8  # two epochs


def test_workers_both_caches_and_segmenting_evaluation(tmp_path, passes):
    features = tiny_rows((1,)).features
    rows = Dataset.from_list(list(tiny_rows((1, 0, 2, 1))), features=features)
    settings = {"embedding_cache_dir": str(tmp_path / "embeddings"), "num_eval_segmentations": 2}
    settings |= {"eval_max_new_tokens": 8, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 2}
    expected, _ = run(tmp_path / "one", str(tmp_path / "cache"), rows, **settings)
    got, _ = run(tmp_path / "two", str(tmp_path / "cache"), rows, dataloader_num_workers=1, **settings)
    kept = ("loss", "eval_loss", "eval_gIoU", "segmentation/loss")
    one, other = (
        [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]
        for trainer in (expected, got)
    )
    assert one == other and any("eval_gIoU" in entry for entry in one)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"slot_cache_dir": "x", "trainable": "joint"}, 'set trainable="masks"'),
        ({"slot_pull_weight": 1.0}, "slot_pull_weight is there to train"),
        ({"heads_only_share": 0.5}, "heads_only_share is there to train"),
        ({"codebook_init": "sae_decoder"}, "codebook_init is there"),
    ],
)
def test_settings_that_contradict_each_other(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(SegmentationConfig, tmp_path, **({"trainable": "masks"} | settings))


def test_what_is_to_train_or_never_ends_is_not_kept(tmp_path):
    from segcompass_hf.training.adapters import lora_config

    model, processor = tiny_model(), tiny_processor()
    cache = {"trainable": "masks", "slot_cache_dir": str(tmp_path / "cache")}
    args = arguments(SegmentationConfig, tmp_path, **cache)
    with pytest.raises(ValueError, match="leave the adapters"):
        SegmentationTrainer(model, args, uneven_rows(), processing_class=processor, peft_config=lora_config(model))
    stream = tiny_rows((1, 1)).to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream has no end"):
        SegmentationTrainer(model, args, stream, processing_class=processor)
    model.freeze_for_training(trainable="masks")
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"slot_mapper", "sam"}
    trainer = SegmentationTrainer(model, args, uneven_rows(), processing_class=processor)
    model.codebook.requires_grad_(True)
    with pytest.raises(ValueError, match="of these codebook trains"):
        use_caches(trainer)


def test_the_model_takes_states_or_a_sequence():
    model = tiny_model()
    slots, states = torch.zeros(1, 4, model.config.d_slot), torch.zeros(1, 4, model.config.hidden_size)
    assert model(slots=slots, reference_states=states).slot_logits.shape == (1, 4)
    for given in ({"slots": slots}, {"reference_states": states}, {}):
        with pytest.raises(ValueError, match="needs input_ids; or, read of them before, both slots"):
            model(**given)
    with pytest.raises(ValueError, match="needs input_ids; or, read of them"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), slots=slots, reference_states=states)
