"""The study's second part: which start is taken, what an arm's prompts show, and that its settings are settings."""

import sys
from dataclasses import replace

import datasets
import pytest
import yaml
from places import ROOT

pytest.importorskip("trl")

sys.path.insert(0, str(ROOT / "benchmarks" / "scenes_study"))

import second  # noqa: E402
import second_settings  # noqa: E402

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
