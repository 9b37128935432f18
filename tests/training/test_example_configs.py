"""The example configurations: every key is a field, every column of the paper is reproduced, memory is up to date."""

import re
import shlex

import pytest
import yaml
from places import ROOT
from scripts import module

RECIPES = [  # of `segcompass train`
    "examples/configs/your_vlm_your_folder.yaml",
    "examples/configs/scenes_expert_iteration.yaml",
    "examples/configs/scenes_reinforcement.yaml",
    "examples/scenes_tiny/recipe.yaml",
]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS if f"examples/configs/{path.name}" not in RECIPES]
# End of the file's name -> script, its own arguments, those of its trainer.
SCRIPTS = {
    "_warmup": ("train_warmup", "ScriptArguments", "WarmupConfig"),
    "_sae": ("train_sae", "DataArguments", "SaeTrainingConfig"),
    "_segmentation": ("train_segmentation", "ScriptArguments", "SegmentationConfig"),
    "": ("train_grpo", "ScriptArguments", "SegCompassGRPOConfig"),
}
MEMORY = re.compile(
    r"# Expected memory: (?P<figure>[\d.]+ [GM]iB)(?: per GPU| of tensors)?, by\n"
    r"#   python benchmarks/memory_estimate\.py (?P<flags>.*)\n"
)


def parse(name: str):
    """(arguments of the script, arguments of the trainer), by the dataclasses that the script parses."""
    from segcompass_hf.training.arguments import read_arguments

    script, own, trainer = next(SCRIPTS[end] for end in SCRIPTS if name.endswith(end))
    example = module(f"examples/{script}.py")
    path = ROOT / "examples" / "configs" / f"{name}.yaml"
    flags = ["--config", str(path), "--use_cpu", "true"]  # bf16 is refused where there is neither GPU nor this flag
    return read_arguments(getattr(example, own), getattr(example, trainer), argv=flags)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_field_and_arrives_as_written(name):
    parsed = parse(name)  # raises at unknown keys
    for key, value in yaml.safe_load((ROOT / "examples" / "configs" / f"{name}.yaml").read_text()).items():
        arrived = next(getattr(arguments, key) for arguments in parsed if hasattr(arguments, key))
        if key == "report_to":
            assert arrived in ("none", [])
        elif isinstance(value, bool | int | float | list | dict):
            assert arrived == value and not isinstance(arrived, str), key  # YAML reads 2e-6 as a string
        else:
            assert getattr(arrived, "value", arrived) == value, key


@pytest.mark.parametrize("path", RECIPES)
def test_every_key_of_a_recipe_is_a_field_and_arrives_as_written(path):
    from segcompass_hf.training import read_recipe

    content, recipe = yaml.safe_load((ROOT / path).read_text()), read_recipe(ROOT / path)
    for stage in recipe.stages:
        section, arguments = content.pop(stage.name), stage.arguments(num_processes=2)
        for key, value in section.items():
            arrived = getattr(stage.own, key) if hasattr(stage.own, key) else getattr(arguments, key)
            assert getattr(arrived, "value", arrived) == value, key
    assert content == {name: getattr(recipe.settings, name) for name in content}
    named = re.findall(r"examples/[\w./]+", (ROOT / path).read_text().split("\n\n")[0])
    assert path in named and all((ROOT / name).is_file() for name in named)


# lambda_s, lambda_c, heatmap Dice, mask Dice, focal, learning rate, factors of codebook, slot mapper, prompt encoder
# and mask decoder, slots; the columns of the paper, the code's defaults and its scripts.
PAPER = (1.0, 0.2, 0.6, 0.6, 0.0, 2e-6, 25, 80, 10, 10, 6)
CODE = (0.3, 0.2, 0.8, 0.8, 0.0, 1e-6, 150, 80, 10, 25, 4)
RELEASED = (0.3, 0.2, 0.8, 0.8, 0.0, 1.6e-6, 30, 25, 10, 5, 4)
COLUMNS = {
    "llava_1_5_7b_full_8gpu": PAPER,
    "llava_1_5_13b_full_8gpu": PAPER,
    "qwen2_5_vl_7b_full_8gpu": PAPER,
    "llava_1_5_7b_code_default_8gpu": CODE,
    "llava_1_5_7b_scripts_8gpu": RELEASED,
    "qwen2_5_vl_7b_scripts_8gpu": RELEASED,
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_the_paper_and_its_code(name):
    from segcompass_hf import SegCompassConfig

    script, arguments = parse(name)
    model_config = SegCompassConfig(vlm_config={"model_type": "llava"})
    names = ("seg_loss_weight", "conf_loss_weight", "heatmap_dice_weight", "mask_dice_weight", "mask_focal_weight")
    weights = arguments.loss_weights(model_config, step=0)
    factors = arguments.learning_rate_factors()
    parts = ("codebook", "slot_mapper", "sam.prompt_encoder", "sam.mask_decoder")
    row = (*[weights[n] for n in names], arguments.learning_rate, *[factors[p] for p in parts], script.num_slots)
    assert row == COLUMNS[name]
    late = arguments.loss_weights(model_config, step=1500)
    switched = {"heatmap_dice_weight": 2.0, "mask_dice_weight": 2.0, "mask_focal_weight": 5.0}
    assert late == weights | (switched if COLUMNS[name] is RELEASED else {})
    assert arguments.loss_weights(model_config, step=1499) == weights
    assert weights["heatmap_bce_weight"] == 1.0
    # Common to all columns: 16 prompts x 8 completions, clip 0.2, KL 0.2, one update per rollout, rewards 0.3 : 0.7.
    assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16 * 8
    assert (arguments.num_generations, arguments.epsilon, arguments.beta, arguments.num_iterations) == (8, 0.2, 0.2, 1)
    assert (arguments.loss_type, arguments.reward_weights) == ("bnpo", [0.3, 0.7])
    assert (arguments.lr_schedule, arguments.one_cycle_final_factor) == ("one_cycle", 6.7)
    assert arguments.weight_decay == 0.01
    assert (model_config.sae_config.d_sae, model_config.d_slot, model_config.concept_threshold) == (65536, 512, 2.0)


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_header_name_files_that_exist(name):
    header = (ROOT / "examples" / "configs" / f"{name}.yaml").read_text().split("\n\n")[0]
    files = re.findall(r"(?:examples|benchmarks)/[\w./]+\.(?:py|yaml)", header)
    assert f"examples/configs/{name}.yaml" in files
    assert [file for file in files if not (ROOT / file).is_file()] == []


def _memory(name: str) -> tuple[str, str]:
    """The figure that a configuration states, and the one that its command computes now."""
    estimator = module("benchmarks/memory_estimate.py")
    stated = MEMORY.search((ROOT / "examples" / "configs" / f"{name}.yaml").read_text())
    flags = shlex.split(stated["flags"])
    flags[flags.index("--config") + 1] = str(ROOT / "examples" / "configs" / f"{name}.yaml")
    return stated["figure"], estimator.readable_memory(estimator.estimate(estimator.parse(flags)).peak)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("scenes_tiny")])
def test_stated_memory_is_current(name):
    stated, computed = _memory(name)
    assert stated == computed


@pytest.mark.slow  # seconds each on an idle machine: 7B and 13B, one operation after the other
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("scenes_tiny")])
def test_stated_memory_of_large_models_is_current_and_fits(name):
    stated, computed = _memory(name)
    assert stated == computed
    assert float(computed.split()[0]) < (24 if "4bit" in name else 80)
