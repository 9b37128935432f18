"""Recipes read from yaml: types, unknown keys, what stages inherit, batches of several processes."""

import pytest

pytest.importorskip("trl")

from segcompass_hf.training.recipe.settings import RecipeError, read_recipe  # noqa: E402


def recipe_of(tmp_path, text, *changes):
    (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(tmp_path / "recipe.yaml", changes)


WHOLE = """
output_dir: out
model: bundled
dataset: scenes:train
without: [reasoning]
seed: 7
config: {num_slots: 2}
warmup: {max_steps: 3, learning_rate: 2e-6, batch_size: 8, learning_rate_factors: {model.vision_tower: 0.5}}
segmentation: {max_steps: 4, seed: 1, dataset: "folder:pictures", bf16: false, use_cpu: true}
"""


def test_values_arrive_in_the_type_of_their_field_and_are_inherited(tmp_path):
    recipe = recipe_of(tmp_path, WHOLE)
    assert [stage.name for stage in recipe.stages] == ["warmup", "segmentation"]
    assert recipe.settings.config == {"num_slots": 2}
    warmup, segmentation = recipe.stages
    arguments = warmup.arguments()
    assert arguments.learning_rate == warmup.written["learning_rate"] == 2e-6  # yaml reads 2e-6 as a string
    assert arguments.learning_rate_factors == {"model.vision_tower": 0.5}
    assert (arguments.seed, segmentation.arguments().seed) == (7, 1)
    assert (warmup.own.dataset, segmentation.own.dataset) == ("scenes:train", "folder:pictures")
    assert warmup.own.without == segmentation.own.without == ["reasoning"]
    assert arguments.output_dir == "out/warmup" and arguments.save_total_limit == 1


def test_a_step_has_the_same_rows_whatever_the_number_of_processes(tmp_path):
    warmup = recipe_of(tmp_path, WHOLE).stages[0]
    assert warmup.arguments(1).per_device_train_batch_size == 8
    assert warmup.arguments(2).per_device_train_batch_size == 4
    with pytest.raises(RecipeError, match=r"warmup.batch_size is 8, .* 3 processes x 1 .* choose a multiple of 3"):
        warmup.arguments(3)
    both = recipe_of(tmp_path, WHOLE, "warmup.per_device_train_batch_size=4").stages[0]
    with pytest.raises(RecipeError, match="say the same; leave one out"):
        both.arguments()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("warmup.learning_rat=1", "warmup has no setting 'learning_rat'; did you mean learning_rate"),
        ("output_di=1", "the recipe has no setting 'output_di'; did you mean output_dir"),
        ("warmup.max_steps=ten", r"warmup.max_steps is 'ten'; it takes int: "),
        ("warmup.max_steps=1.5", r"warmup.max_steps is 1.5; it takes int: "),
        ("warmup.bf16=perhaps", r"warmup.bf16 is 'perhaps'; it takes true or false: "),
        ("warmup.trainable=some", "warmup.trainable is 'some'; it takes one of all, without_vision, decoder: "),
        ("num_samples=many", "num_samples is 'many'; it takes int: Rows"),
        ("warmup.output_dir=x", "warmup.output_dir is set by the recipe: out/warmup"),
        ("warmup=5", "warmup is 5; a stage is keys and values"),
        ("output_dir=null", r"the recipe lacks output_dir"),
        ("output_dir=''", r"the recipe lacks output_dir"),
        ("seed=-1", r"the recipe: seed is -1; expected a finite number of 0 or more"),
        ("warmup", "--set takes KEY=VALUE"),
    ],
)
def test_wrong_keys_and_types_are_named(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, WHOLE, change)


def test_settings_that_contradict_each_other_are_named_with_their_stage(tmp_path):
    stage = recipe_of(tmp_path, WHOLE, "warmup.alignment_weight=-1").stages[0]
    with pytest.raises(RecipeError, match="warmup: alignment_weight cannot be negative"):
        stage.arguments()


def test_sae_is_a_stage_or_a_part_or_both(tmp_path):
    text = "output_dir: out\nvlm: x\nsae: {sae}\nsegmentation: {{}}\n"
    part = recipe_of(tmp_path, text.format(sae="runs/sae"))
    assert part.settings.sae == "runs/sae" and [stage.name for stage in part.stages] == ["segmentation"]
    stage = recipe_of(tmp_path, text.format(sae="{max_steps: 3}"))
    assert stage.settings.sae is None and [one.name for one in stage.stages] == ["sae", "segmentation"]
    both = recipe_of(tmp_path, text.format(sae="{start: runs/sae, max_steps: 3}"))
    assert both.settings.sae == "runs/sae" and "start" not in both.stages[0].written


def test_a_stage_set_to_null_is_left_out_and_one_is_needed(tmp_path):
    assert [stage.name for stage in recipe_of(tmp_path, WHOLE, "warmup=null").stages] == ["segmentation"]
    with pytest.raises(RecipeError, match="has no stage; it may have warmup, sae, segmentation, grpo"):
        recipe_of(tmp_path, WHOLE, "warmup=null", "segmentation=null")


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot read the recipe .*nowhere.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="is no yaml file"):
        recipe_of(tmp_path, "a: [")
    with pytest.raises(RecipeError, match="holds list; a recipe is keys and values"):
        recipe_of(tmp_path, "- a")


def test_groups_of_completions_are_counted_over_all_processes(tmp_path):
    text = "output_dir: out\nmodel: bundled\ngrpo: {batch_size: 8, num_generations: 8}\n"
    arguments = recipe_of(tmp_path, text).stages[0].arguments(num_processes=2)
    assert arguments.per_device_train_batch_size == 4  # less than a group, but two processes have one
    with pytest.raises(RecipeError, match="grpo: .*divisible by.*num_generations"):
        recipe_of(tmp_path, text, "grpo.batch_size=4").stages[0].arguments()


@pytest.mark.parametrize(
    "change", ["learning_rate=.nan", "learning_rate=-1", "num_train_epochs=.inf", "weight_decay=-1"]
)
def test_numbers_with_which_no_training_can_be_are_named(tmp_path, change):
    name = change.partition("=")[0]
    recipe = recipe_of(tmp_path, WHOLE, f"warmup.{change}")
    with pytest.raises(RecipeError, match=rf"^warmup: {name} is .*; expected a finite number of 0 or more\.$"):
        recipe.stages[0].arguments(1)
