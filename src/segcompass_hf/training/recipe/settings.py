# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A recipe's yaml file, read and checked: which stages, with which settings, from which parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from ..arguments import SettingsError, build_settings, check_names, field_names, parse_words, read_yaml

# Stage, in the order they run in -> module and name of its trainer's settings.
STAGES = {
    "warmup": ("warmup.config", "WarmupConfig"),
    "sae": ("sae.config", "SaeTrainingConfig"),
    "segmentation": ("segmentation.config", "SegmentationConfig"),
    "grpo": ("grpo.config", "SegCompassGRPOConfig"),
}
SET_BY_THE_RECIPE = ("output_dir", "resume_from_checkpoint")  # fields of a trainer's settings that a stage cannot set


RecipeError = SettingsError  # by the name that recipes raise it


@dataclass
class RecipeSettings:
    """What a recipe says beside its stages.

    Args:
        output_dir (`str`): Folder of the run: one folder per stage, `checkpoint` and `summary.html`.
        model (`str`, *optional*): Hub id or folder of a SegCompass to start from, or `scenes-tiny` (also `bundled`) or
            `photos-small`.
        vlm, sam, sae (`str`, *optional*): Hub ids or folders of parts, in place of the model's own.
        dtype (`str`, defaults to `"float32"`): What weights are loaded in.
        save_dtype (`str`, *optional*): Of the weights in the final `checkpoint`, which still loads in `dtype`.
        attn_implementation (`str`, *optional*): Of the VLM, such as `eager`.
        load_in_4bit (`bool`): The decoder in NF4; only where `grpo` or `segmentation` alone trains adapters.
        config (`dict`, *optional*): Fields of [`SegCompassConfig`] for a model composed of parts, such as `num_slots`;
            `heatmap_concepts` also switches these on in a whole model.
        processor (`dict`, *optional*): Arguments of [`SegCompassProcessor`] for it, such as `instruction_template`.
        processes (`int`, *optional*): Processes that share the work on a CPU.
        seed (`int`, defaults to 0): Of every stage that sets none.
        dataset, num_samples, without, eval_dataset, num_eval_samples: Of every stage that sets none, see
            [`StageSettings`].
    """

    output_dir: str = field(metadata={"help": "Folder of the run."})
    model: str | None = field(default=None, metadata={"help": "Hub id, folder or bundled name of a SegCompass."})
    vlm: str | None = field(default=None, metadata={"help": "Hub id or folder of a VLM."})
    sam: str | None = field(default=None, metadata={"help": "Hub id or folder of a SAM."})
    sae: str | None = field(default=None, metadata={"help": "Hub id or folder of an SAE trained on that VLM."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    save_dtype: str | None = field(default=None, metadata={"help": "Of the final checkpoint's weights on disk."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of the VLM, such as eager."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The decoder in NF4, with adapters (lora_r)."})
    config: dict[str, Any] | None = field(default=None, metadata={"help": "Fields of SegCompassConfig."})
    processor: dict[str, Any] | None = field(default=None, metadata={"help": "Arguments of SegCompassProcessor."})
    processes: int | None = field(default=None, metadata={"help": "Processes that share the work on a CPU."})
    seed: int = field(default=0, metadata={"help": "Of every stage that sets none."})
    dataset: str | None = field(default=None, metadata={"help": "As in `segcompass evaluate --dataset`."})
    num_samples: int | None = field(default=None, metadata={"help": "Rows, the first ones; all when left out."})
    without: list[str] | None = field(default=None, metadata={"help": "Columns left out, such as [reasoning]."})
    eval_dataset: str | None = field(default=None, metadata={"help": "As `dataset`."})
    num_eval_samples: int | None = field(default=None, metadata={"help": "Rows of it."})


@dataclass
class StageSettings:
    """A stage's own keys, beside the fields of its trainer's settings.

    Args:
        dataset (`str`): As in `segcompass evaluate --dataset`: `scenes:SPLIT[:SEED]`, `folder:ROOT`, `FILE.parquet`,
            `OWNER/NAME[:SPLIT]`, ...
        num_samples (`int`, *optional*): Rows, the first ones; all when left out. Scenes, without an end of its own,
            needs it, or gets as many as the steps need.
        without (`list[str]`, *optional*): Columns that the stage does not see, such as `reasoning`.
        eval_dataset, num_eval_samples (*optional*): The same for evaluation.
        own_samples (`str`, *optional*): Of `segmentation`: folder that `segcompass evaluate --pass-at-k` wrote of
            these rows with the model that the stage starts from; its right answers are the reasoning of rows that have
            none (expert iteration, see [`with_right_samples`]).
        batch_size (`int`, *optional*): Rows (SAE: tokens; GRPO: completions) of an optimizer step, of all processes
            and accumulated micro-batches together; in place of `per_device_train_batch_size`.
        names (`str`, *optional*): `MODULE:FUNCTION` or `FILE.py:FUNCTION`, row -> its [`Name`]s, for
            `alignment_pairs` (warmup) and `pair_loss` (sae); those of the target when left out.
        lora_r (`int`): Rank of LoRA adapters; 0 trains the weights themselves. Merged afterwards, unless quantised.
        new_weights (`bool`): Random weights for what the stage trains: the VLM (warmup), the heads (segmentation).
    """

    dataset: str | None = field(default=None, metadata={"help": "As in `segcompass evaluate --dataset`."})
    num_samples: int | None = field(default=None, metadata={"help": "Rows, the first ones; all when left out."})
    without: list[str] | None = field(default=None, metadata={"help": "Columns left out, such as [reasoning]."})
    eval_dataset: str | None = field(default=None, metadata={"help": "As `dataset`."})
    num_eval_samples: int | None = field(default=None, metadata={"help": "Rows of it."})
    own_samples: str | None = field(default=None, metadata={"help": "Folder of `segcompass evaluate --pass-at-k`."})
    batch_size: int | None = field(default=None, metadata={"help": "Rows of a step, of all processes together."})
    names: str | None = field(default=None, metadata={"help": "MODULE:FUNCTION or FILE.py:FUNCTION: row -> names."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains the weights themselves."})
    new_weights: bool = field(default=False, metadata={"help": "Random weights for what the stage trains."})


INHERITED = ("dataset", "num_samples", "without", "eval_dataset", "num_eval_samples", "seed")


@dataclass
class Stage:
    """One stage of a recipe.

    Args:
        name (`str`): One of `STAGES`.
        folder (`Path`): Where it writes.
        written (`dict`): Its keys as the recipe gives them, those it inherits included.
        own ([`StageSettings`]): Its own keys.
    """

    name: str
    folder: Path
    written: dict[str, Any]
    own: StageSettings

    def arguments(self, num_processes: int = 1) -> Any:
        """A new object of its trainer's settings, for so many processes. Making one sets up accelerate's state.

        Raises:
            RecipeError: They contradict each other, or `batch_size` cannot be divided among the processes.
        """
        settings_class = _settings_class(self.name)
        words = {name: value for name, value in self.written.items() if name not in field_names(StageSettings)}
        words |= {"output_dir": str(self.folder), **_for_this_machine(words)}
        words = {"report_to": "none", "save_total_limit": 1} | words
        per_device = self._per_device_batch(settings_class, words, num_processes)
        # Alone, this process stands for all of them: TRL divides the batch of all into groups of completions.
        others = num_processes if int(os.environ.get("WORLD_SIZE", "1")) == 1 else 1
        arguments = _parse(settings_class, words | {"per_device_train_batch_size": per_device * others}, self.name)
        arguments.per_device_train_batch_size = per_device
        return arguments

    def _per_device_batch(self, settings_class: Any, words: dict[str, Any], num_processes: int) -> int:
        if self.own.batch_size is None:
            own = settings_class.per_device_train_batch_size
            return int(words.get("per_device_train_batch_size", own))
        if "per_device_train_batch_size" in words:
            raise RecipeError(f"{self.name}: batch_size and per_device_train_batch_size say the same; leave one out.")
        parts = num_processes * int(words.get("gradient_accumulation_steps", 1))
        if parts < 1:
            steps = words["gradient_accumulation_steps"]
            raise RecipeError(f"{self.name}.gradient_accumulation_steps is {steps}; expected 1 or more.")
        if self.own.batch_size < 1 or self.own.batch_size % parts:
            raise RecipeError(
                f"{self.name}.batch_size is {self.own.batch_size}, which cannot be divided into {num_processes} "
                f"processes x {parts // num_processes} accumulated batches; choose a multiple of {parts}."
            )
        return self.own.batch_size // parts


@dataclass
class Recipe:
    """A recipe that can be parsed; whether it can be run says [`check_recipe`].

    Args:
        path (`Path`): Of the file.
        settings ([`RecipeSettings`]): What it says beside its stages.
        stages (`list[Stage]`): In the order they run in.
    """

    path: Path
    settings: RecipeSettings
    stages: list[Stage]


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path (`str` or `Path`): A yaml file.
        changes (`Sequence[str]`): Keys set over the file's, such as `"sae.d_sae=256"` or `"output_dir=runs/other"`; a
            stage set to `null` is left out.

    Raises:
        RecipeError: No such file, no stage, an unknown key (with the nearest known one), or a value of a wrong type.
    """
    content = read_yaml(Path(path), "recipe")
    for change in changes:
        _apply(content, change)
    sections = {name: content.pop(name, None) for name in STAGES}
    sections["sae"], named_sae = _stage_or_part(sections["sae"])
    if named_sae is not None:
        content["sae"] = named_sae
    if content.get("output_dir") in (None, ""):
        raise RecipeError("the recipe lacks output_dir: the folder of the run.")
    settings = _parse(RecipeSettings, content, "", also=tuple(STAGES))
    settings.config, settings.processor = settings.config or {}, settings.processor or {}
    inherited = {name: content[name] for name in INHERITED if content.get(name) is not None}
    stages = [_stage(name, section, inherited, settings) for name, section in sections.items() if section is not None]
    if not stages:
        raise RecipeError(f"{path} has no stage; it may have {', '.join(STAGES)}.")
    return Recipe(Path(path), settings, stages)


def _apply(content: dict[str, Any], change: str) -> None:
    """Set one key, written as `key=value` or `stage.key=value`, the value in yaml."""
    key, equals, value = change.partition("=")
    if not equals:
        raise RecipeError(f"--set takes KEY=VALUE, such as segmentation.max_steps=10; got {change!r}.")
    *above, last = key.strip().split(".")
    place = content
    for name in above:
        if not isinstance(place.setdefault(name, {}), dict):
            place[name] = {}
        place = place[name]
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change!r}: the value is no yaml: {error}") from error


def _stage_or_part(section: Any) -> tuple[Any, str | None]:
    """`sae:` with keys below it is the stage, with a word the SAE to start from; both as `sae: {start: WORD, ...}`."""
    if isinstance(section, str):
        return None, section
    if isinstance(section, dict) and "start" in section:
        return {name: value for name, value in section.items() if name != "start"}, str(section["start"])
    return section, None


def _stage(name: str, section: Any, inherited: dict[str, Any], settings: RecipeSettings) -> Stage:
    if not isinstance(section, dict):
        raise RecipeError(f"{name} is {section!r}; a stage is keys and values, at least {{}}.")
    for taken in SET_BY_THE_RECIPE:
        if taken in section:
            raise RecipeError(f"{name}.{taken} is set by the recipe: {settings.output_dir}/{name}; leave it out.")
    written = inherited | section
    own_names = field_names(StageSettings)
    known = (*own_names, *field_names(_settings_class(name)))
    check_names(section, known, name)
    own = _parse(StageSettings, {key: value for key, value in written.items() if key in own_names}, name)
    folder = Path(settings.output_dir) / name
    words = {key: value for key, value in written.items() if key not in own_names}
    parsed = parse_words(_settings_class(name), words, f"{name}.")
    plain = {key: parsed[key] for key in words if key in parsed and not isinstance(words[key], (dict, list))}
    return Stage(name, folder, written | plain, own)  # 1e-4, which yaml reads as a word, is the number


def _settings_class(stage: str) -> type:
    module, name = STAGES[stage]
    return getattr(import_module(f"..{module}", __package__), name)


def _for_this_machine(words: dict[str, Any]) -> dict[str, bool]:
    """On a machine without an accelerator the trainers want to be told."""
    import torch

    return {} if "use_cpu" in words or torch.accelerator.is_available() else {"use_cpu": True}


def _parse(settings_class: type, words: dict[str, Any], where: str, also: Sequence[str] = ()) -> Any:
    """An object of a settings class from what yaml gave."""
    check_names(words, (*field_names(settings_class), *also), where or "the recipe")
    values = parse_words(settings_class, words, f"{where}." if where else "")
    return build_settings(settings_class, values, f"{where or 'the recipe'}: ")
