# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""pass@k of answers that are given: figures by hand, resumed runs, and what training reads of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from made_rows import HEIGHT, WIDTH, box, make_row

from segcompass_hf.evaluation import Prediction, measure_pass_at_k, read_pass_rates
from segcompass_hf.evaluation.pass_at_k import prediction_markdown, read_prompts

NOTHING = np.zeros((0, HEIGHT, WIDTH), dtype=bool)


class Sampler:
    """Gives every row the answers that stand under its `sample_id`: 1 right, 0 none."""

    name, num_samples, temperature = "sampler", 4, 1.0

    def __init__(self, answers):
        self.answers, self.asked = answers, []
        self.settings = {"num_samples": 4, "temperature": 1.0}

    def predict(self, rows):
        self.asked += [row["sample_id"] for row in rows]
        return [
            [
                Prediction(box(0, 4)[None] if right else NOTHING, reasoning=f"thought {right}{number // 2}")
                for number, right in enumerate(self.answers[row["sample_id"]])
            ]
            for row in rows
        ]


def rows():
    """Four prompts of three images, all with the same target; of each kind two."""
    made = [make_row(index, [box(0, 4)]) for index in range(4)]
    for row, image, kind in zip(made, ("x", "x", "y", "z"), ("one", "one", "two", None), strict=True):
        row["image_id"], row["kind"] = image, kind
    return made


ANSWERS = [(1, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 0, 0)]


def answers():
    return {row["sample_id"]: given for row, given in zip(rows(), ANSWERS, strict=True)}


def test_figures_by_hand(tmp_path):
    figures = measure_pass_at_k(Sampler(answers()), rows(), tmp_path, ks=(2, 1, 4), batch_size=2)
    assert figures["k"] == [1, 2, 4] and set(figures["by_kind"]) == {"(none)", "one", "two"}
    every = figures["all"]
    assert (every["num_prompts"], every["num_images"]) == (4, 3)
    assert (every["never"], every["sometimes"], every["always"]) == (0.25, 0.5, 0.25)
    values = {k: {name: its["value"] for name, its in of.items()} for k, of in every["by_k"].items()}
    # pass@2: 1 - C(3,2)/C(4,2) = 1/2; 1; 0; 1 - C(2,2)/C(4,2) = 5/6. Mixed: 1/2; 0; 0; 1 - 2/6 = 2/3.
    assert values["1"]["pass"] == pytest.approx((1 / 4 + 1 + 0 + 1 / 2) / 4)
    assert values["2"]["pass"] == pytest.approx((1 / 2 + 1 + 0 + 5 / 6) / 4)
    assert values["4"]["pass"] == pytest.approx(3 / 4)
    assert values["2"]["mixed"] == pytest.approx((1 / 2 + 2 / 3) / 4) and values["1"]["mixed"] == 0
    assert values["4"]["well_drawn"] == pytest.approx(3 / 4)
    low, high = (every["by_k"]["1"]["pass"][name] for name in ("low", "high"))
    assert low < values["1"]["pass"] < high
    one = figures["by_kind"]["one"]
    assert one["num_images"] == 1 and one["by_k"]["1"]["pass"]["low"] == one["by_k"]["1"]["pass"]["high"] == 0.625
    assert json.loads((tmp_path / "prediction.json").read_text()) == figures
    page = (tmp_path / "prediction.md").read_text()
    assert (
        page == prediction_markdown(figures) and "| one | 2 | 0.625 [0.625, 0.625] |" in page and "mixed@1" not in page
    )


def test_what_training_reads(tmp_path):
    measure_pass_at_k(Sampler(answers()), rows(), tmp_path, ks=(4,), batch_size=3)
    ids = [row["sample_id"] for row in rows()]
    assert read_pass_rates(tmp_path) == dict(zip(ids, (0.25, 1.0, 0.0, 0.5), strict=True))
    wordings = [record["right_reasoning"] for record in read_prompts(tmp_path)]
    assert wordings == [["thought 10"], ["thought 10", "thought 11"], [], ["thought 10"]]
    (tmp_path / "prediction.json").unlink()
    with pytest.raises(ValueError, match="holds no measured pass rates.*--pass-at-k"):
        read_pass_rates(tmp_path)


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(tmp_path):
    class Stopped(Sampler):
        def predict(self, given):
            if len(self.asked) >= 2:
                raise KeyboardInterrupt
            return super().predict(given)

    with pytest.raises(KeyboardInterrupt):
        measure_pass_at_k(Stopped(answers()), rows(), tmp_path / "a", ks=(4,), batch_size=1)
    second = Sampler(answers())
    figures = measure_pass_at_k(second, rows(), tmp_path / "a", ks=(4,), batch_size=1)
    assert second.asked == [row["sample_id"] for row in rows()[2:]]
    whole = measure_pass_at_k(Sampler(answers()), rows(), tmp_path / "b", ks=(4,), batch_size=1)
    assert figures["all"] == whole["all"] and figures["by_kind"] == whole["by_kind"]
    for name in ("prompts.jsonl",):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = Sampler(answers())
    other.settings = {"num_samples": 4, "temperature": 0.5}
    with pytest.raises(ValueError, match="results of another run.*temperature was 1.0, is 0.5"):
        measure_pass_at_k(other, rows(), tmp_path / "a", ks=(4,), batch_size=1)


def test_unreadable_rows_are_fatal_or_listed(tmp_path):
    broken = rows()
    broken[1]["image"] = SimpleNamespace()
    with pytest.raises(ValueError, match="unreadable"):
        measure_pass_at_k(Sampler(answers()), broken, tmp_path / "a", ks=(1,))
    figures = measure_pass_at_k(Sampler(answers()), broken, tmp_path / "b", ks=(1,), unreadable="count")
    assert figures["unreadable"] == [broken[1]["sample_id"]] and figures["all"]["num_prompts"] == 3
    assert len(read_pass_rates(tmp_path / "b")) == 3


def test_images_are_told_apart_whatever_they_are_named_by(tmp_path):
    named = rows()
    for row, image in zip(named, (1, 1, "1", None), strict=True):
        row["image_id"] = image
    figures = measure_pass_at_k(Sampler(answers()), named, tmp_path, ks=(1,))
    assert figures["all"]["num_images"] == 3


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"unreadable": "skip"}])
def test_settings_that_are_none_are_refused_before_a_folder_is_made(tmp_path, settings):
    with pytest.raises(ValueError, match="batch_size is 0|unreadable is 'skip'"):
        measure_pass_at_k(Sampler(answers()), rows(), tmp_path / "out", ks=(1,), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ks", [(), (0,), (5,)])
def test_k_beyond_the_samples_is_refused(tmp_path, ks):
    with pytest.raises(ValueError, match="and 4 samples are drawn"):
        measure_pass_at_k(Sampler(answers()), rows(), tmp_path, ks=ks)
