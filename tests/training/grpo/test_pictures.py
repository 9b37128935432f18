# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sample pictures of training: what is in them, when they are made, and that they never stop a run."""

import doctest
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_processor
from transformers.integrations import CometCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from segcompass_hf.training.grpo import pictures as sample_pictures
from segcompass_hf.training.grpo.pictures import SamplePictureLogger, picture_sample

ANSWER = "<think>the left one is larger</think><REF_POS><REF_POS>"


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("llava", num_slots=2)


def a_row(**overrides) -> dict:
    """A photo of 48 x 24 pixels on a canvas of 64, with maps of 32 x 32: slot 0 is kept and covers its left half."""
    left = torch.zeros(2, 32, 32)
    left[:, :, :16] = 1
    row = {
        "image": Image.new("RGB", (48, 24), "gray"),
        "instruction": "the larger cup",
        "sample_id": "photo-1",
        "pred_masks": left * 20 - 10,
        "heatmap_logits": left * 4 - 2,
        "slot_logits": torch.tensor([2.0, -1.0]),
        "mask_labels": left,
        "num_objects": 1,
        "slot_logit_threshold": 0.0,
        "valid_area": torch.ones(32, 32, dtype=torch.bool),
    }
    return row | overrides


def a_sample(processor, completion=ANSWER, rewards=None, **overrides) -> dict:
    rewards = {"format_reward": 1.0, "mask_reward": 0.5} if rewards is None else rewards
    return picture_sample(processor, a_row(**overrides), completion, [24, 48], torch.tensor([32, 64]), rewards)


def test_masks_are_cut_at_the_models_own_threshold(processor):
    logits = torch.zeros(2, 32, 32) - 5
    logits[:, :, :16] = 1.0
    sample = a_sample(processor, pred_masks=logits)  # above 0 without a threshold
    assert sample["masks"].mean() == pytest.approx(0.5, abs=0.05)
    assert not a_sample(processor, pred_masks=logits, mask_logit_threshold=2.0)["masks"].any()
    assert a_sample(processor, pred_masks=logits, mask_logit_threshold=-9.0)["masks"].all()


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the module's warnings."""
    messages = []
    monkeypatch.setattr(sample_pictures.logger, "warning", messages.append)
    return messages


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_docstring_examples():
    results = doctest.testmod(sample_pictures)
    assert results.attempted > 0 and results.failed == 0


class TestPictureSample:
    def test_maps_at_the_size_of_the_image(self, processor):
        sample = a_sample(processor)
        assert sample["masks"].shape == sample["true_masks"].shape == (1, 24, 48)
        assert sample["heatmaps"].shape == (2, 24, 48)
        for mask in (sample["masks"][0], sample["true_masks"][0]):
            assert mask.dtype == bool and mask[:, :23].all() and not mask[:, 25:].any()  # the left half
        assert sample["slots"].tolist() == [0]
        assert sample["confidences"] == pytest.approx(torch.tensor([2.0, -1.0]).sigmoid().numpy())
        assert sample["scores"] == pytest.approx(sample["confidences"][:1])
        assert (sample["instruction"], sample["completion"], sample["problem"]) == ("the larger cup", ANSWER, None)

    def test_nothing_kept_and_nothing_there(self, processor):
        sample = a_sample(processor, num_objects=0, slot_logit_threshold=3.0)
        assert sample["masks"].shape == sample["true_masks"].shape == (0, 24, 48)
        assert sample["heatmaps"].shape == (2, 24, 48)

    def test_prompts_and_conversations_of_trl(self, processor):
        prompt = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "a cup"}]}]
        sample = a_sample(processor, [{"role": "assistant", "content": "no"}], instruction=None, prompt=prompt)
        assert (sample["instruction"], sample["completion"]) == ("a cup", "no")
        assert sample["problem"] == "no <think>"

    def test_low_precision(self, processor):
        row = a_row()
        low = {name: row[name].bfloat16() for name in ("pred_masks", "heatmap_logits", "slot_logits", "mask_labels")}
        sample = a_sample(processor, **low)
        assert np.array_equal(sample["masks"], a_sample(processor)["masks"])


class TestWants:
    def test_multiples(self, tmp_path):
        pictures = SamplePictureLogger(tmp_path, every_steps=2, num_samples=1)
        wanted = []
        for step in range(7):
            if pictures.wants(step):
                pictures.log(step, [])
                wanted.append(step)
        assert wanted == [0, 2, 4, 6]
        assert not list(tmp_path.iterdir())

    def test_a_resumed_run_waits_for_the_next_multiple(self, tmp_path):
        pictures = SamplePictureLogger(tmp_path, every_steps=100, num_samples=1)
        assert [step for step in (137, 199, 200) if pictures.wants(step)] == [200]

    @pytest.mark.parametrize("numbers", [(0, 4), (100, 0)])
    def test_off(self, tmp_path, numbers):
        pictures = SamplePictureLogger(tmp_path, *numbers)
        assert not any(pictures.wants(step) for step in (0, 100))

    def test_refuses_negative_numbers(self, tmp_path):
        with pytest.raises(ValueError, match="every_steps is -1"):
            SamplePictureLogger(tmp_path, -1, 4)


class TestFiles:
    def test_pictures_and_words(self, processor, tmp_path):
        pictures = SamplePictureLogger(tmp_path, every_steps=100, num_samples=2)
        made = []

        def samples():
            for index in range(5):
                made.append(index)
                yield a_sample(processor, sample_id=f"photo-{index}", completion=[ANSWER, "no"][index])

        random_state = torch.get_rng_state()
        pictures.log(100, samples())
        assert torch.equal(torch.get_rng_state(), random_state)  # or the run with pictures would be another run
        folder = tmp_path / "step-000100"
        assert made == [0, 1]  # no more than asked for
        assert sorted(path.name for path in folder.iterdir()) == ["sample-0.png", "sample-1.png", "samples.jsonl"]
        with Image.open(folder / "sample-0.png") as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
        first, second = read(folder)
        assert first == {
            "step": 100,
            "picture": "sample-0.png",
            "sample_id": "photo-0",
            "instruction": "the larger cup",
            "completion": ANSWER,
            "problem": None,
            "rewards": {"format_reward": 1.0, "mask_reward": 0.5},
            "slots": [0],
            "confidences": [0.8808, 0.2689],
            "num_objects": 1,
        }
        assert (second["picture"], second["completion"], second["problem"]) == ("sample-1.png", "no", "no <think>")

    def test_what_the_picture_says(self, processor, tmp_path, monkeypatch):
        rows = []
        figure = SimpleNamespace(savefig=lambda path: path.write_bytes(b""))
        monkeypatch.setattr("segcompass_hf.figure.plot_segmentations", lambda given: rows.extend(given) or figure)
        pictures = SamplePictureLogger(tmp_path, every_steps=1, num_samples=2)
        broken = "<think>a cup</think><REF_POS>"
        pictures.log(0, [a_sample(processor), a_sample(processor, broken, {"format_reward": 0.0})])
        assert [row.reasoning for row in rows] == ["the left one is larger", broken]  # the whole of a broken answer
        assert rows[0].caption == "format_reward 1.00,  mask_reward 0.50"
        assert rows[1].caption == "format_reward 0.00,  1 <REF_POS> instead of 2"
        assert rows[0].masks.shape == rows[0].true_masks.shape == (1, 24, 48)

    def test_logging_a_step_again_replaces_it(self, processor, tmp_path):
        for answer in ("first", "second"):
            SamplePictureLogger(tmp_path, 1, 1).log(7, [a_sample(processor, answer)])
        assert [record["completion"] for record in read(tmp_path / "step-000007")] == ["second"]

    def test_main_process_only(self, processor, tmp_path, monkeypatch):
        monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(is_main_process=False))
        pictures = SamplePictureLogger(tmp_path / "samples", every_steps=10, num_samples=1)
        pictures.log(10, (pytest.fail("made for nothing") for _ in range(1)))
        assert not pictures.wants(11) and pictures.wants(20)  # in step with the main process
        assert not (tmp_path / "samples").exists()


class TestFailures:
    def test_a_sample_that_cannot_be_made(self, processor, tmp_path, warnings):
        pictures = SamplePictureLogger(tmp_path, every_steps=1, num_samples=4)
        nan = torch.full((2, 32, 32), torch.nan)
        for step in (1, 2):
            pictures.log(step, (a_sample(processor, **fields) for fields in ({}, {"pred_masks": nan}, {})))
        assert len(read(tmp_path / "step-000001")) == len(read(tmp_path / "step-000002")) == 1
        assert len(warnings) == 1  # told once
        assert "sample pictures of step 1 are incomplete: ValueError" in warnings[0] and "NaN" in warnings[0]

    def test_a_folder_that_cannot_be_written(self, processor, tmp_path, warnings):
        (tmp_path / "samples").write_text("a file")
        SamplePictureLogger(tmp_path / "samples", 1, 1).log(1, [a_sample(processor)])
        assert len(warnings) == 1 and "step 1 are incomplete" in warnings[0]

    def test_without_matplotlib_the_words_are_written(self, processor, tmp_path, monkeypatch, warnings):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
        pictures = SamplePictureLogger(tmp_path, every_steps=1, num_samples=2)
        pictures.log(1, [a_sample(processor)] * 2)
        assert [record["picture"] for record in read(tmp_path / "step-000001")] == [None, None]
        assert len(warnings) == 1
        assert "only samples.jsonl is written: figures need matplotlib: pip install" in warnings[0]


class TestTrackers:
    """Callbacks without their packages: what they hold is a stand-in that notes what it is given."""

    def test_tensorboard(self, processor, tmp_path, warnings):
        given = []
        writer = SimpleNamespace(
            add_image=lambda name, pixels, step, dataformats: given.append((name, pixels.shape, step, dataformats)),
            add_text=lambda name, words, step: given.append((name, words, step)),
        )
        callback = object.__new__(TensorBoardCallback)
        callback.tb_writer = writer
        SamplePictureLogger(tmp_path, 1, 1, callbacks=[callback]).log(3, [a_sample(processor)])
        with Image.open(tmp_path / "step-000003" / "sample-0.png") as picture:
            assert given[0] == ("samples/0", (picture.height, picture.width, 3), 3, "HWC")
        assert given[1] == ("samples/0", "the larger cup | format_reward 1.00,  mask_reward 0.50", 3)
        callback.tb_writer = None  # before training has begun
        SamplePictureLogger(tmp_path, 1, 1, callbacks=[callback]).log(4, [a_sample(processor)])
        assert len(given) == 2 and not warnings

    @pytest.mark.parametrize(("kind", "attribute"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
    def test_wandb_and_trackio(self, processor, tmp_path, kind, attribute, warnings):
        given = []
        module = SimpleNamespace(Image=lambda path, caption: (path, caption), log=given.append)
        callback = object.__new__(kind)
        setattr(callback, attribute, module)
        SamplePictureLogger(tmp_path, 1, 2, callbacks=[callback]).log(3, [a_sample(processor, rewards={})] * 2)
        path = tmp_path / "step-000003"
        assert given == [
            {f"samples/{index}": (str(path / f"sample-{index}.png"), "the larger cup"), "train/global_step": 3}
            for index in range(2)
        ]
        assert not warnings

    def test_a_tracker_that_takes_none_or_fails(self, processor, tmp_path, warnings):
        failing = object.__new__(WandbCallback)
        failing._wandb = SimpleNamespace(Image=lambda path, caption: path, log=lambda values: 1 / 0)
        callbacks = [object.__new__(CometCallback), failing]
        pictures = SamplePictureLogger(tmp_path, 1, 2, callbacks=callbacks)
        for step in (1, 2):
            pictures.log(step, [a_sample(processor)] * 2)
        assert warnings == [
            f"sample pictures do not go to Comet; they are in {tmp_path}.",
            "Wandb did not take a sample picture: ZeroDivisionError: division by zero",
        ]
        assert len(read(tmp_path / "step-000002")) == 2
