# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Expert iteration: rows with the model's own right answers, and a stage that trains on them."""

import json

import datasets
import pytest
from grpo import tiny_rows
from PIL import Image

from segcompass_hf.training import with_right_samples
from segcompass_hf.training.segmentation.own_reasoning import MOST_WORDINGS


def write_samples(folder, wordings):
    """What `segcompass evaluate --pass-at-k` leaves: `sample_id` -> distinct right answers."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"sample_id": name, "right": [1, 0], "right_reasoning": words} for name, words in wordings.items()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prediction.json").write_text("{}")
    return folder


def rows(*reasonings):
    made = tiny_rows((1,) * len(reasonings))
    feature = made.features["reasoning"]
    return made.remove_columns("reasoning").add_column("reasoning", list(reasonings), feature=feature)


def test_rows_get_their_right_answers_and_the_others_go(tmp_path):
    many = [f"thought {number}" for number in range(MOST_WORDINGS + 2)]
    folder = write_samples(tmp_path / "s", {"row-0": ["a", "b"], "row-1": [], "row-2": many, "row-3": ["unused"]})
    dataset = rows(None, None, "", "its own", None)  # row-4 was not asked
    filled = with_right_samples(dataset, folder)
    assert list(filled["sample_id"]) == ["row-0"] * 2 + ["row-2"] * MOST_WORDINGS + ["row-3"]
    assert list(filled["reasoning"]) == ["a", "b", *many[:MOST_WORDINGS], "its own"]
    assert filled.features == dataset.features and filled.column_names == dataset.column_names
    assert (
        isinstance(filled[0]["image"], Image.Image) and filled[0]["image"].tobytes() == dataset[0]["image"].tobytes()
    )
    without = with_right_samples(dataset.remove_columns("reasoning"), folder)
    assert (
        list(without["reasoning"])[-1] == "unused" and without.features["reasoning"] == dataset.features["reasoning"]
    )


def test_nothing_to_train_on_is_an_error(tmp_path):
    folder = write_samples(tmp_path / "s", {"row-0": []})
    with pytest.raises(
        ValueError, match=r"no row has reasoning or a right answer in .* \(1 never right, 1 not asked\)"
    ):
        with_right_samples(rows(None, None), folder)
    with pytest.raises(ValueError, match="holds no measured pass rates"):
        with_right_samples(rows(None), tmp_path / "nowhere")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_rows(tmp_path, stage="segmentation", **keys):
    pytest.importorskip("trl")
    from segcompass_hf.training.recipe.rows import load_rows
    from segcompass_hf.training.recipe.settings import read_recipe

    keys = {"max_steps": 2, "batch_size": 2, "use_cpu": True, "dataset": "scenes:train", "num_samples": 4} | keys
    (tmp_path / "recipe.yaml").write_text(f"output_dir: out\nmodel: bundled\n{stage}: {json.dumps(keys)}\n")
    stage = read_recipe(tmp_path / "recipe.yaml").stages[0]
    return load_rows(stage, stage.arguments())


def test_a_stage_of_a_recipe_takes_them(tmp_path):
    from segcompass_hf.training.recipe.settings import RecipeError

    wordings = {"scenes-train-0-000001": ["a", "b"], "scenes-train-0-000003": ["c"]}
    folder = write_samples(tmp_path / "s", wordings)
    found = recipe_rows(tmp_path, without=["reasoning"], own_samples=str(folder)).train
    assert list(found["reasoning"]) == ["a", "b", "c"]
    with pytest.raises(RecipeError, match="segmentation.own_samples: .*holds no measured pass rates"):
        recipe_rows(tmp_path, without=["reasoning"], own_samples=str(tmp_path))
    with pytest.raises(RecipeError, match="grpo.own_samples: only segmentation trains on right answers"):
        recipe_rows(tmp_path, "grpo", num_generations=2, own_samples=str(folder))
