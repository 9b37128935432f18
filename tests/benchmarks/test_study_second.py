"""The study's second part: which start is taken, what an arm's prompts show, that its settings are settings, and what
its report makes of finished runs."""

import functools
import json
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import yaml
from places import ROOT

pytest.importorskip("trl")

sys.path.insert(0, str(ROOT / "benchmarks" / "scenes_study"))

import second  # noqa: E402
import second_report  # noqa: E402
import second_settings  # noqa: E402

from segcompass_hf.data import scenes  # noqa: E402
from segcompass_hf.data.schema import decode_masks  # noqa: E402
from segcompass_hf.evaluation import Prediction, evaluate_dataset, measure_pass_at_k  # noqa: E402
from segcompass_hf.training import read_recipe  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def kind(passed, mixed):
    by_k = {"16": {"pass": {"value": passed}}, "8": {"mixed": {"value": mixed}}}
    return {"by_k": by_k}


def test_kinds_that_can_be_learned_are_sampled_now_and_then_and_were_not_taught():
    by_kind = {
        "attribute": kind(0.9, 0.9),  # taught
        "relation": kind(0.2, 0.1),
        "ordinal": kind(0.19, 0.5),
        "count": kind(0.9, 0.09),
        "no-target": kind(0.8, 0.4),
    }
    assert second.learnable({"by_kind": by_kind}) == ["relation", "no-target"]


@pytest.mark.parametrize(("arm", "places"), [("both", []), ("both_guided", [0, 8, 16]), ("reference", range(18))])
def test_prompts_show_the_reasoning_that_the_arm_may_see(arm, places):
    size = replace(second_settings.SMOKE, prompts=18)
    rows = second.prompts_of(arm, 0, size)
    assert [index for index, words in enumerate(rows["reasoning"]) if words] == list(places)
    assert list(rows["instruction"]) == list(second.prompts_of("both", 0, size)["instruction"])


@pytest.mark.parametrize("arm", second_settings.SEEDS)
def test_settings_of_every_arm_make_a_recipe(tmp_path, arm):
    stage = "segmentation" if arm in ("expert", "reference") else "grpo"
    if stage == "grpo":
        arms = second_settings.ARMS[arm]
        settings = {**second_settings.GRPO, **arms, **second.SHARED, "max_steps": 2, "dataset": "scenes:train"}
    else:
        settings = second.supervised(2, 0)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "model": "bundled", stage: settings}))
    arguments = read_recipe(path).stages[0].arguments()
    assert arguments.learning_rate == second_settings.GRPO["learning_rate"]
    if stage == "grpo":
        per_step = second_settings.PROMPTS_PER_STEP * second_settings.GROUP
        assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == per_step
        assert arguments.generation_batch_size == per_step  # so that no completion is older than the policy


class Answers:
    """Right on some kinds of instruction, empty on all others; of several samples only the first is right."""

    name, num_samples = "answers", 16
    settings = {"num_samples": 16, "temperature": 1.0}

    def __init__(self, kinds, sampled=False):
        self.kinds, self.sampled = kinds, sampled

    def predict(self, rows):
        answers = []
        for row in rows:
            size = row["image"].size[::-1]
            masks, nothing = decode_masks(row["masks"], size), np.zeros((1, *size), dtype=bool)
            nothing[0, 0, 0] = True  # a pixel of the background
            samples = [Prediction(masks if row["kind"] in self.kinds else nothing)] + [Prediction(nothing)] * 15
            answers.append(samples if self.sampled else samples[0])
        return answers


@functools.cache
def rows_of(split, seed):
    return list(scenes.iterate(split, 12, seed=seed))


def finish(folder, kinds, log=(), seed=second.EVALUATION_SEED):
    """A run as `second.py` leaves it."""
    for split in second.SPLITS:
        evaluate_dataset(Answers(kinds), rows_of(split, seed), folder / "evaluation" / split, page_samples=0)
    rows = rows_of("val", second_settings.PREDICTION_SEED)
    measure_pass_at_k(Answers(kinds, sampled=True), rows, folder / "samples", (1, 8, 16))
    (folder / "run" / "grpo").mkdir(parents=True)
    (folder / "run" / "grpo" / "stage_done.json").write_text(json.dumps({"log": [*log, {"train_runtime": 1.0}]}))
    (folder / "done.json").write_text("{}")


@pytest.mark.slow
def test_the_report_pairs_scenes_and_says_what_came_of_the_prediction(tmp_path):
    size = replace(second_settings.SMOKE, folder=tmp_path)
    with pytest.raises(SystemExit, match="the start is not evaluated: run second.py --evaluate-start first"):
        second_report.report(size)
    finish(tmp_path / "start", ["attribute"])
    line = {"reward": 0.5, "answers_right": 0.25}
    finish(
        tmp_path / "both-0", ["attribute", "relation"], [line | {"groups/dropped": 0.5}, line | {"answers_right": 1}]
    )
    finish(tmp_path / "both-1", ["attribute"])
    (tmp_path / "rl_only-0").mkdir()  # begun, not finished
    (tmp_path / "start.json").write_text('{"start": "bundled"}')
    rows = rows_of("val", second_settings.PREDICTION_SEED)
    measure_pass_at_k(Answers(["attribute"], sampled=True), rows, tmp_path / "predictions" / "bundled", (1, 8, 16))
    page, record = second_report.report(size)
    right = record["measures"]["right"]
    value, (low, high) = right["by_kind"]["relation"]["both"]
    assert (value, low, high) == (0.5, 0.0, 1.0)  # all with one seed, none with the other
    assert right["less_the_start"]["relation"]["both"][0] == 0.5
    assert right["less_the_start"]["attribute"]["both"] == (0.0, [0.0, 0.0])
    assert right["by_kind"]["ordinal"]["start"] == (0.0, [0.0, 0.0])
    seeds = right["differences"]["both - start"]["each seed"]
    assert seeds[0] > 0 == seeds[1] and set(right["differences"]) == {"both - start"}
    assert record["measures"]["iou"]["by_kind"]["relation"]["both"][0] == pytest.approx(0.5)
    # One of 16 samples is right: pass@1 is 1/16, pass@8 8/16; of two seeds one has it.
    predicted = record["prediction"]["relation"]
    assert predicted["start, pass@16"] == 0 and record["prediction"]["attribute"]["start, pass@8"] == 0.5
    assert predicted["both, pass@1"][0] == pytest.approx(1 / 32)
    # 128 completions a step; in the first step half of all groups were dropped, so that it sampled 256.
    assert record["runs"]["both-0"]["completions"] == 384 and record["runs"]["both-1"]["completions"] == 0
    assert "| both, seed 0 | 0.250 to 1.000 | 0.50 | 384 |" in page
    assert "Not finished: both-2, both_guided-0" in page and "99% intervals" in page


def test_the_report_refuses_runs_on_other_scenes(tmp_path):
    finish(tmp_path / "start", [])
    finish(tmp_path / "both-0", [], seed=8)
    with pytest.raises(SystemExit, match="both was evaluated on other scenes than the start"):
        second_report.report(replace(second_settings.SMOKE, folder=tmp_path))
