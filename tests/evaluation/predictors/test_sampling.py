# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sampled answers of a model: as many as asked for, the same again, those of its own distribution."""

import pytest
import torch
from grpo import tiny_rows
from tiny import tiny_model, tiny_processor

from segcompass_hf.evaluation import ModelPredictor, SamplingPredictor
from segcompass_hf.training.rewards.rewards import is_well_formed


def predictor(**settings):
    settings = {"num_samples": 11, "max_new_tokens": 12} | settings
    return SamplingPredictor(tiny_model(), tiny_processor(), **settings)


def test_samples_differ_repeat_and_stay_with_their_rows():
    rows = [tiny_rows()[index] for index in (0, 2)]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = predictor().predict(rows)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws change
    assert [len(answers) for answers in first] == [11, 11]  # in passes of 8 and 3
    texts = [[answer.text for answer in answers] for answers in first]
    assert len(set(texts[0])) > 5
    torch.manual_seed(2)
    assert [[answer.text for answer in answers] for answers in predictor().predict(rows)] == texts
    assert [[answer.text for answer in answers] for answers in predictor(seed=1).predict(rows)] != texts
    assert all(answer.masks.shape[1:] == (30, 40) for answers in first for answer in answers)


def test_a_low_temperature_comes_to_the_greedy_answer():
    row = tiny_rows()[0]
    free = {"max_new_tokens": 12, "constrain_format": False}
    greedy = ModelPredictor(tiny_model(), tiny_processor(), **free).predict([row])[0]
    cold = predictor(num_samples=3, temperature=1e-4).predict([row])[0]
    assert [answer.text for answer in cold] == [greedy.text] * 3
    assert all((answer.masks == greedy.masks).all() for answer in cold)


def test_the_format_is_imposed_no_more_than_in_reinforcement():
    row = tiny_rows()[0]
    formed = [is_well_formed(answer.text) for answer in predictor(constrain_format=True).predict([row])[0]]
    free = [is_well_formed(answer.text) for answer in predictor().predict([row])[0]]
    assert all(formed) and not any(free)  # a random model knows no format


def test_settings_say_how_it_was_sampled():
    settings = predictor(temperature=0.7, seed=5).settings
    assert settings["decoding"] == "sampled" and settings["constrain_format"] is False
    assert {name: settings[name] for name in ("num_samples", "temperature", "seed")} == {
        "num_samples": 11, "temperature": 0.7, "seed": 5
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_settings_are_refused(settings):
    with pytest.raises(ValueError, match="expected 1 or more answers|expected a positive number"):
        predictor(**settings)
