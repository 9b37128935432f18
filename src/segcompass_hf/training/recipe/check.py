# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Everything that can be known to be wrong with a recipe before its first step."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.readable_rows import keep_images_encoded
from ...data.schema import decode_masks
from ...files import free_space, readable_size
from ...images_segcompass import to_rgb_image
from ..memory.estimate import MemoryEstimate, readable_memory
from ..memory.stages import estimate_stage
from ..sae.rows import RowEncoder
from .parts import DTYPES, PartLoader, Parts
from .record import BEGUN, DONE, check_unchanged, expected_record, read_record
from .rows import StageRows, load_rows
from .settings import Recipe, RecipeError, Stage
from .trainers import names_of

UNKNOWN = "unknown"
FIRST_ROWS = 100  # of a data set, of which one must be usable


@dataclass
class StagePlan:
    """What a stage will do.

    Args:
        name (`str`): The stage.
        state (`str`): `to do`, `begun` or `done`.
        start (`str`): What it starts from.
        rows, eval_rows (`int`): Rows to train and evaluate on.
        per_step (`int`): Rows (SAE: tokens; GRPO: completions) of an optimizer step, of all processes together.
        steps (`int`, *optional*): Optimizer steps; `None` where the SAE trainer counts tokens first.
        memory ([`MemoryEstimate`], *optional*): Of one process; `None` where its optimizer is not known.
    """

    name: str
    state: str
    start: str
    rows: int
    eval_rows: int
    per_step: int
    steps: int | None
    memory: MemoryEstimate | None = None


def check_recipe(recipe: Recipe, num_processes: int = 1, with_memory: bool = True) -> list[StagePlan]:
    """Check a recipe: parts there and fitting, settings, data readable, batches divisible, room on the disk.

    Args:
        recipe ([`Recipe`]): From `read_recipe`.
        num_processes (`int`, defaults to 1): That will share the work.
        with_memory (`bool`, defaults to `True`): Estimate memory, which takes seconds per stage for large models.

    Returns:
        `list[StagePlan]`: one per stage.

    Raises:
        RecipeError: At the first thing that is wrong; says what to change.
    """
    start = parts = Parts.of(recipe.settings)
    loader, plans = PartLoader(recipe.settings), []
    _check_parts(recipe, start)
    try:
        processor = loader.processor(start)
    except (ValueError, OSError, TypeError) as error:
        raise RecipeError(f"no processor can be made of the parts ({start.model or start.vlm}): {error}") from error
    sae_settings = None
    for stage in recipe.stages:
        arguments = stage.arguments(num_processes)
        names_of(stage)
        if stage.name == "sae" and start.sae is None:
            sae_settings = arguments
        config = loader.configuration(start, sae_settings)
        rows = load_rows(stage, arguments, num_processes)
        tokens = _tokens_of_first_row(stage, rows, processor)
        plan = _plan(recipe, stage, parts, arguments, rows, num_processes)
        if with_memory:
            plan.memory = _memory(recipe, stage, arguments, config, tokens, num_processes)
        plans.append(plan)
        parts = parts.after(stage.name, stage.folder)
    _check_disk(recipe, plans)
    return plans


def describe_plans(plans: list[StagePlan]) -> str:
    """The plan as a table."""
    titles = ("stage", "state", "starts from", "rows", "evaluated on", "per step", "steps", "trains", "memory")
    lines = [titles, *[_described(plan) for plan in plans]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = "memory: expected, of one process at the fullest moment; see docs/how-to/one-24-gb-gpu.md"
    return "\n".join([*shown, note] if any(plan.memory for plan in plans) else shown)


def _described(plan: StagePlan) -> tuple[str, ...]:
    steps = "by its tokens" if plan.steps is None else f"{plan.steps:,}"
    memory, trains = UNKNOWN, UNKNOWN
    if plan.memory is not None:
        trains, memory = f"{plan.memory.trainable / 1e6:.1f} M", readable_memory(plan.memory.peak)
        if plan.memory.peak > (there := _memory_here()):
            memory += f" (more than the {readable_memory(there)} here)"
    counts = (f"{plan.rows:,}", f"{plan.eval_rows:,}", f"{plan.per_step:,}")
    return (plan.name, plan.state, plan.start, *counts, steps, trains, memory)


def _check_parts(recipe: Recipe, start: Parts) -> None:
    names = [stage.name for stage in recipe.stages]
    with_masks = [name for name in names if name in ("segmentation", "grpo")]
    if with_masks and start.sam is None and start.model is None:
        raise RecipeError(f"{with_masks[0]} needs a SAM: name one (sam), such as facebook/sam-vit-base.")
    if with_masks and start.sae is None and start.model is None and "sae" not in names:
        raise RecipeError(f"{with_masks[0]} needs an SAE of this VLM: name one (sae), or add a section sae before it.")
    if "warmup" in names and (start.sae is not None or (with_masks and "sae" not in names)):
        raise RecipeError("warmup changes the states that the SAE reads; train one behind it: a section sae alone.")
    if recipe.settings.load_in_4bit and (names != with_masks or len(names) > 1 or not start.is_whole):
        raise RecipeError(
            f"load_in_4bit is for a recipe of one stage, segmentation or grpo, from a model; this one has {names}."
        )
    for stage in recipe.stages:
        if recipe.settings.load_in_4bit and not stage.own.lora_r:
            raise RecipeError(f"load_in_4bit trains adapters; set {stage.name}.lora_r, such as 16.")
        if stage.own.lora_r and stage.name == "sae":
            raise RecipeError("sae.lora_r: an SAE trains whole; leave it out.")


def _tokens_of_first_row(stage: Stage, rows: StageRows, processor: Any) -> tuple[int, int]:
    """Tokens of a prompt and of a reference answer, of the first row that training will not skip."""
    prompt = completion = 0
    for name, some in (("dataset", rows.train), ("eval_dataset", rows.evaluation)):
        problems, some = [], None if some is None else keep_images_encoded(some)
        for index in range(0 if some is None else min(len(some), FIRST_ROWS)):
            try:
                lengths = _tokens_of_row(stage, some[index], processor)
            except (ValueError, OSError, TypeError, KeyError) as error:
                problems.append(str(error))
                continue
            prompt, completion = max(prompt, lengths[0]), max(completion, lengths[1])
            break
        else:
            if problems:
                found = f"none of its first {len(problems)} rows can be used; the first: {problems[0]}"
                raise RecipeError(f"{stage.name}.{name}: {found}")
    return prompt, completion


def _tokens_of_row(stage: Stage, row: dict[str, Any], processor: Any) -> tuple[int, int]:
    if stage.name == "sae":
        return RowEncoder(processor, unreadable_rows="error")([(0, row)])["input_ids"].shape[1], 0
    image = to_rgb_image(row["image"])
    decode_masks(row.get("masks") or [], (image.height, image.width))
    inputs = processor(images=[image], instruction=[row["instruction"]])
    whole = processor(images=[image], instruction=[row["instruction"]], reasoning=[row.get("reasoning") or ""])
    prompt = inputs["input_ids"].shape[1]
    return prompt, whole["input_ids"].shape[1] - prompt


def _plan(
    recipe: Recipe, stage: Stage, parts: Parts, arguments: Any, rows: StageRows, num_processes: int
) -> StagePlan:
    state = "to do"
    for name, title in ((BEGUN, "begun"), (DONE, "done")):
        record = read_record(stage.folder, name)
        if record is not None:
            check_unchanged(stage, record, expected_record(recipe, stage, parts))
            state = title
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    if steps is None and stage.name == "sae":
        steps = None if arguments.train_tokens is None else max(1, arguments.train_tokens // per_step)
    elif steps is None:
        completions = len(rows.train) * getattr(arguments, "num_generations", 1)
        steps = math.ceil(completions / per_step * arguments.num_train_epochs)
    if stage.name != "sae" and per_step > len(rows.train) * getattr(arguments, "num_generations", 1):
        raise RecipeError(f"{stage.name}: a step takes {per_step} rows, but the data set has {len(rows.train)}.")
    start = ", ".join(f"{part} {Path(source).name}" for part, source in parts.used_by(stage.name).items())
    evaluated = 0 if rows.evaluation is None else len(rows.evaluation)
    return StagePlan(stage.name, state, start, len(rows.train), evaluated, per_step, steps)


def _memory(
    recipe: Recipe, stage: Stage, arguments: Any, config: Any, tokens: tuple[int, int], num_processes: int
) -> MemoryEstimate | None:
    gpus = num_processes if torch.cuda.is_available() and not arguments.use_cpu else 0
    sharding = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "none"
    sharding = "zero3" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else sharding
    try:
        return estimate_stage(
            stage.name,
            arguments,
            config,
            lora_r=stage.own.lora_r,
            dtype=DTYPES[recipe.settings.dtype],
            load_in_4bit=recipe.settings.load_in_4bit,
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            gpus=gpus,
            sharding=sharding,
        )
    except ValueError:  # settings whose memory is not known, such as an optimizer's
        return None


def _check_disk(recipe: Recipe, plans: list[StagePlan]) -> None:
    """A stage leaves its result and the checkpoints that it keeps, of which one is written before one goes."""
    needed = 0.0
    for plan, stage in zip(plans, recipe.stages, strict=True):
        if plan.memory is None or plan.state == "done":
            continue
        size = plan.memory.parameters * DTYPES[recipe.settings.dtype].itemsize
        kept = int(stage.written.get("save_total_limit") or 1) + 1
        needed += size + kept * (size + plan.memory.optimizer)
    folder = Path(recipe.settings.output_dir).absolute()
    place = next(one for one in (folder, *folder.parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise RecipeError(f"output_dir: {place} cannot be written to; name another folder.")
    free = free_space(place)
    if needed > free:
        raise RecipeError(
            f"the stages leave up to {readable_size(needed)} and {place} has {readable_size(free)} free; make room, "
            "name another output_dir, or keep fewer checkpoints (save_total_limit)."
        )


def _memory_here() -> float:
    """Bytes of the first GPU, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


__all__ = ["StagePlan", "check_recipe", "describe_plans"]
