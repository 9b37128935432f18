"""Rows of a stage by name: Scenes made when asked for, folders, columns left out, rows held out."""

import json

import datasets
import pytest
from PIL import Image

pytest.importorskip("trl")

from segcompass_hf.data import scenes  # noqa: E402
from segcompass_hf.training.recipe.rows import load_rows  # noqa: E402
from segcompass_hf.training.recipe.settings import RecipeError, read_recipe  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(tmp_path, stage="warmup", **keys):
    keys = {"max_steps": 3, "batch_size": 4, "use_cpu": True} | keys
    text = f"output_dir: out\nmodel: bundled\n{stage}: {json.dumps(keys)}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    stage = read_recipe(tmp_path / "recipe.yaml").stages[0]
    return load_rows(stage, stage.arguments())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (30, 20)).save(root / f"{number}.png")
        masks = [[[2, 3, 7, 3, 7, 8, 2, 8]]]
        lines.append({"image": f"{number}.png", "instruction": "it", "masks": masks, "reasoning": "there"})
    (root / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_scenes_are_as_many_as_the_steps_need_and_the_same_as_evaluation_reads(tmp_path):
    rows = rows_of(tmp_path, dataset="scenes:train:5", eval_dataset="scenes:val", num_eval_samples=2)
    assert len(rows.train) == 3 * 4 and len(rows.evaluation) == 2
    assert rows.train[11]["sample_id"] == scenes.SceneRows("train", 12, 5)[11]["sample_id"]


def test_completions_of_a_group_share_a_row(tmp_path):
    rows = rows_of(tmp_path, "grpo", dataset="scenes:train", num_generations=2)
    assert len(rows.train) == 3 * 4 // 2 and isinstance(rows.train, datasets.Dataset)


def test_columns_can_be_left_out(tmp_path, folder):
    lazy = rows_of(tmp_path, dataset="scenes:train", without=["reasoning"]).train
    assert "reasoning" not in lazy[0] and lazy[0]["masks"] and len(lazy[:2]) == 2
    stored = rows_of(tmp_path, dataset=f"folder:{folder}", without=["reasoning", "kind"], batch_size=1).train
    assert not {"reasoning", "kind"} & set(stored.column_names)
    with pytest.raises(RecipeError, match=r"warmup.without names \['resoning'\]; the data set has .*reasoning"):
        rows_of(tmp_path, dataset="scenes:train", without=["resoning"])
    with pytest.raises(RecipeError, match="the stage reads image, instruction, masks"):
        rows_of(tmp_path, "segmentation", dataset="scenes:train", without=["masks"])
    assert "masks" not in rows_of(tmp_path, "sae", dataset="scenes:train", num_samples=2, without=["masks"]).train[0]
    texts = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"texts": [["a"], ["b"]], "images": [[None], [None]]}).to_parquet(texts)
    assert len(rows_of(tmp_path, "sae", dataset=str(texts)).train) == 2
    with pytest.raises(RecipeError, match=r"warmup.dataset has the columns .* lacks \['image', 'instruction'\]"):
        rows_of(tmp_path, dataset=str(texts), batch_size=1)


def test_a_folder_without_splits_trains_on_all_or_holds_images_out(tmp_path, folder):
    assert len(rows_of(tmp_path, dataset=f"folder:{folder}", batch_size=1).train) == 5
    rows = rows_of(tmp_path, dataset=f"folder:{folder}", eval_dataset="held_out", batch_size=1)
    assert (len(rows.train), len(rows.evaluation)) == (4, 1)  # a fifth of the images
    assert not set(rows.train["image_id"]) & set(rows.evaluation["image_id"])
    assert len(rows_of(tmp_path, dataset=f"folder:{folder}", num_samples=2, batch_size=1).train) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "warmup.dataset is missing"),
        ({"dataset": "scenes:tran"}, "warmup.dataset: Scenes has no split 'tran'"),
        ({"dataset": "nothing"}, "warmup.dataset: there is no data set 'nothing'"),
        ({"dataset": "scenes:train", "max_steps": -1}, "warmup.num_samples is missing: scenes:train has no end"),
        ({"dataset": "scenes:train", "eval_dataset": "held_out"}, "held_out is for data with an end"),
        ({"dataset": "folder:nowhere"}, "warmup.dataset: there is no folder"),
    ],
)
def test_what_names_no_rows(tmp_path, keys, message):
    with pytest.raises(RecipeError, match=message):
        rows_of(tmp_path, **keys)


def test_more_rows_than_there_are(tmp_path, folder):
    with pytest.raises(RecipeError, match="warmup.num_samples is 9, but the data set has 5 rows"):
        rows_of(tmp_path, dataset=f"folder:{folder}", num_samples=9, batch_size=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"guidance": "sometimes"}, "grpo.*guidance"),
        ({"max_resamplings": -1}, "grpo: max_resamplings is -1"),
        ({"stratify_by": "size"}, "grpo: stratify_by='size' reads the column 'size'; train_dataset has"),
        ({"stratify_by": "sample_id", "num_samples": 9}, "grpo: a generation takes 2 prompts, but .* has 9 values"),
        ({"pass_rates": "nowhere"}, "grpo: 'nowhere' holds no measured pass rates"),
    ],
)
def test_choices_that_cannot_be_made_are_known_before_the_first_step(tmp_path, keys, message):
    with pytest.raises(RecipeError, match=message):
        rows_of(tmp_path, "grpo", dataset="scenes:train", num_generations=2, **keys)


def test_choices_that_can_be_made_pass(tmp_path):
    rows = rows_of(tmp_path, "grpo", dataset="scenes:train", num_generations=2, num_samples=9, max_resamplings=1)
    assert len(rows.train) == 9
