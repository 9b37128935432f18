# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A model's own answers: its inputs go where the model is, features from a cache too."""

import pytest
import torch
from supervised import tiny_row
from tiny import tiny_model, tiny_processor, tiny_segmenter

from segcompass_hf import ImageFeatures, SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data.embedding_cache import EmbeddingCache
from segcompass_hf.evaluation.predictors.model import ModelPredictor


@pytest.fixture
def parts():
    """A model around a SAM 2, whose features are more than a tensor, and its processor."""
    sam = tiny_segmenter("sam2")
    processor = SegCompassProcessor.from_parts(tiny_processor(), sam.config)
    vlm = tiny_model().vlm
    fields = {"d_slot": 32, "slot_encoder_heads": 4, "sae_config": {"d_sae": 32, "layer": 1}}
    torch.manual_seed(0)
    return SegCompassForReasoningSegmentation.from_pretrained_parts(vlm, sam, processor=processor, **fields), processor


def test_features_of_a_cache_go_where_the_model_is(parts, tmp_path, monkeypatch):
    model, processor = parts
    cache = EmbeddingCache(tmp_path / "cache", model, processor, dtype="float32")
    moved, to = [], ImageFeatures.to
    monkeypatch.setattr(ImageFeatures, "to", lambda self, *args, **kw: moved.append(args) or to(self, *args, **kw))
    rows = [tiny_row(0), tiny_row(1)]
    cached, sizes, _ = ModelPredictor(model, cache.caching_processor(processor), max_new_tokens=8).segment(rows)
    assert (model.device,) in moved
    plain, _, _ = ModelPredictor(model, processor, max_new_tokens=8).segment(rows)
    torch.testing.assert_close(cached.pred_masks, plain.pred_masks, atol=1e-5, rtol=1e-5)
    assert sizes.tolist() == [[model.mask_stage.canvas] * 2] * 2  # stretched


def test_only_slots_that_are_shown_are_decoded_and_the_answers_are_the_same(parts):
    model, processor = parts
    rows = [tiny_row(0), tiny_row(1)]
    every, _, answers = ModelPredictor(model, processor, max_new_tokens=8).segment(rows)
    middle = float(every.slot_logits.flatten().sort().values[[3, 4]].mean())  # half of the slots are above
    predictor = ModelPredictor(model, processor, slot_logit_threshold=middle, max_new_tokens=8)
    model.config.slot_logit_threshold = middle
    decoded = []
    model.sam.mask_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: decoded.append(len(kwargs["image_embeddings"])), with_kwargs=True
    )
    _, _, answers = predictor.segment(rows)
    shown = predictor.predict(rows)
    assert decoded == [8, 4]
    for answer, prediction in zip(answers, shown, strict=True):
        assert (prediction.masks == answer["masks"].numpy()).all()
        assert prediction.scores == pytest.approx(answer["scores"].tolist(), abs=1e-5)
        assert (prediction.reasoning, prediction.text) == (answer["reasoning"], answer["text"])
    assert sum(len(prediction.masks) for prediction in shown)
