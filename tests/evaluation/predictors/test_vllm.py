# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers and masks through vLLM's interface are those of the model that writes freely."""

import sys

import pytest
import stand_in_vllm
import torch
from bulk import INSTRUCTIONS, job_of, rows_of, save_checkpoint, save_pictures
from supervised import tiny_row
from tiny import tiny_processor

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data.vllm_states import VllmStates
from segcompass_hf.evaluation.predictors.model import ModelPredictor
from segcompass_hf.evaluation.predictors.vllm import VllmPredictor
from segcompass_hf.training.vllm_folder import export_for_vllm


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Model, processor, and the states of an engine that runs its VLM."""
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    model = SegCompassForReasoningSegmentation.from_pretrained(checkpoint)
    processor = SegCompassProcessor.from_pretrained(checkpoint)
    export_for_vllm(model, processor, tmp_path / "vlm")
    layers = [model.config.sae_layer, 4]
    return model, processor, VllmStates.open(tmp_path / "vlm", processor, layers, tmp_path / "states")


def calls_of_the_vlm(model):
    calls = []
    model.vlm.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_answers_are_those_of_the_model_that_writes_freely(parts):
    model, processor, states = parts
    rows = [tiny_row(0), tiny_row(1) | {"instruction": "the ring at the top right of the picture"}]
    plain, _, expected = ModelPredictor(model, processor, max_new_tokens=6, constrain_format=False).segment(rows)
    calls = calls_of_the_vlm(model)
    through = VllmPredictor(model, processor, states, max_new_tokens=6)
    output, _, found = through.segment(rows)
    assert not calls
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.equal(output.completion_mask, plain.completion_mask) and plain.completion_mask.any()
    for name in ("slot_logits", "pred_masks", "slot_scores", "reasoning_surprisal"):
        assert plain[name].isfinite().all()
        torch.testing.assert_close(output[name], plain[name], atol=1e-3, rtol=1e-3)
    assert [answer["text"] for answer in found] == [answer["text"] for answer in expected]
    assert [len(answer["masks"]) for answer in found] == [len(answer["masks"]) for answer in expected] != [0, 0]


def test_settings_say_what_wrote_the_answers(parts):
    model, processor, states = parts
    settings = VllmPredictor(model, processor, states, max_new_tokens=6).settings
    assert (settings["engine"], settings["constrain_format"]) == ("vLLM 0.0-stand-in", False)
    with pytest.raises(ValueError, match="reasoning, votes: .*max_new_tokens and output_concepts"):
        VllmPredictor(model, processor, states, reasoning="none", votes=3)


def test_a_data_set_in_bulk(parts, tmp_path):
    from segcompass_hf.bulk import predict_dataset

    model, processor, states = parts
    pictures = save_pictures(tmp_path / "pictures", count=3)
    found = []
    for name, predictor in (
        ("plain", ModelPredictor(model, processor, max_new_tokens=6, output_concepts=True, constrain_format=False)),
        ("through", VllmPredictor(model, processor, states, max_new_tokens=6, output_concepts=True)),
    ):
        job = job_of(tmp_path / "checkpoint", pictures, tmp_path / name, concepts=3)
        summary = predict_dataset(job, predictor=predictor)
        assert (summary.rows, summary.errors, summary.is_complete) == (3 * len(INSTRUCTIONS), 0, True)
        found.append(rows_of(tmp_path / name))
    assert tiny_processor().image_token_id and states.engine.prompts
    for plain, through in zip(*found, strict=True):
        for name in ("sample_id", "question", "reasoning"):
            assert plain[name] == through[name]
        assert len(plain["masks"]) == len(through["masks"])
        assert through["scores"] == pytest.approx(plain["scores"], abs=1e-3)
