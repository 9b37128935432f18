# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs a recipe's stages in order: done ones are skipped, one that was interrupted goes on."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ...evaluation.processes import Processes
from ...files import read_json_object, staged_folder
from .parts import DTYPES, PartLoader, Parts
from .record import BEGUN, DONE, alone_in, check_unchanged, expected_record, read_record, weights_digest, write_record
from .rows import StageRows, load_rows
from .settings import Recipe, RecipeError, RecipeSettings, Stage
from .summary import write_summary
from .trainers import MAKERS, finish

CHECKPOINT = "checkpoint"  # folder of the result, in the recipe's output_dir


def run_recipe(
    recipe: Recipe,
    command: str = "",
    report: Callable[[str], None] = lambda line: None,
    rows: Mapping[str, StageRows] | None = None,
) -> Path:
    """Run what of a recipe is not done yet, and write its result and summary.

    Kill it at any moment: the same call goes on from the last whole checkpoint of the stage that was running. Under
    torchrun or accelerate launch all processes call it; the main one writes.

    Args:
        recipe ([`Recipe`]): From `read_recipe`, checked by `check_recipe`.
        command (`str`): What was typed, for the summary.
        report (`Callable[[str], None]`): Told what happens, in lines; by the main process only.
        rows (`Mapping[str, StageRows]`, *optional*): Stage -> rows in place of those that the recipe names.

    Returns:
        `Path`: `<output_dir>/checkpoint`, a SegCompass with its processor, or the last stage's folder where only parts
        were trained.

    Raises:
        RecipeError: A stage that is done or has begun had other settings.
    """
    processes = Processes.current()
    with alone_in(recipe.settings.output_dir) if processes.is_main else nullcontext():
        return _run_stages(recipe, processes, command, report, rows or {})


def _run_stages(
    recipe: Recipe,
    processes: Processes,
    command: str,
    report: Callable[[str], None],
    rows: Mapping[str, StageRows],
) -> Path:
    parts = Parts.of(recipe.settings)
    tell = report if processes.is_main else lambda line: None
    for number, stage in enumerate(recipe.stages, 1):
        title = f"stage {number} of {len(recipe.stages)}: {stage.name}"
        expected = processes.from_main(expected_record(recipe, stage, parts) if processes.is_main else None)
        record = read_record(stage.folder, DONE)
        if record is not None:
            check_unchanged(stage, record, expected)
            tell(f"{title} is done, kept ({stage.folder})")
        else:
            tell(f"{title}, in {stage.folder}")
            _run_stage(recipe, stage, parts, expected, processes, rows.get(stage.name))
        parts = parts.after(stage.name, stage.folder)
    result = recipe.stages[-1].folder
    if processes.is_main:
        result = _export(recipe, parts)
        write_summary(recipe, result, command)
    processes.wait()
    return Path(processes.from_main(str(result)))


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    parts: Parts,
    expected: dict[str, Any],
    processes: Processes,
    rows: StageRows | None,
) -> None:
    begun = read_record(stage.folder, BEGUN)
    if begun is not None:
        check_unchanged(stage, begun, expected)
        if begun["processes"] != processes.count:
            raise RecipeError(
                f"stage {stage.name} has begun in {stage.folder} with {begun['processes']} processes and this run has "
                f"{processes.count}, which would see other rows; use as many, or delete that folder."
            )
    processes.wait()  # nobody writes before all have read
    if processes.is_main:
        starts = [] if begun is None else begun["starts"]
        record = {"fingerprint": expected, "processes": processes.count, "starts": [*starts, _now()]}
        write_record(stage.folder, BEGUN, record)
    began = time.monotonic()
    arguments = stage.arguments(processes.count)
    set_seed(arguments.seed)  # new weights are the same in every process and after every kill
    if rows is None:
        with processes.main_first():
            rows = load_rows(stage, arguments, processes.count)
    loader = PartLoader(recipe.settings)
    trainer = MAKERS[stage.name](loader, stage, parts, arguments, rows)
    trainer.train(resume_from_checkpoint=True)
    finish(trainer, stage, loader, parts)
    log, seconds = trainer.state.log_history, round(time.monotonic() - began, 1)
    processes.wait()
    if processes.is_main:
        starts = read_record(stage.folder, BEGUN)["starts"]
        write_record(
            stage.folder,
            DONE,
            {
                "stage": stage.name,
                "fingerprint": expected,
                "processes": processes.count,
                "starts": starts,
                "done": _now(),
                "seconds": seconds,
                "steps": trainer.state.global_step,
                "result": weights_digest(str(stage.folder)),
                "log": log,
            },
        )
    processes.wait()
    del trainer, rows
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _export(recipe: Recipe, parts: Parts) -> Path:
    """The last stage's SegCompass as `<output_dir>/checkpoint`; a stage that trained a part is the result itself."""
    last = recipe.stages[-1]
    if not parts.is_whole or last.name not in ("segmentation", "grpo"):
        return last.folder
    output = Path(recipe.settings.output_dir) / CHECKPOINT
    source = read_record(last.folder, DONE)["result"]
    stamp = output.parent / "checkpoint.json"
    if output.is_dir() and _is_stamped(stamp, source):
        return output
    stamp.unlink(missing_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    with staged_folder(output) as folder:
        write_checkpoint(last.folder, folder, recipe.settings)
    write_record(output.parent, stamp.name, {"from": source})
    return output


def _is_stamped(stamp: Path, source: str) -> bool:
    """Whether the export is of this result; where the stamp is damaged it is made again."""
    try:
        return read_json_object(stamp) == {"from": source}
    except (OSError, ValueError):
        return False


def write_checkpoint(source: Path, folder: Path, settings: RecipeSettings) -> None:
    """A stage's SegCompass or adapter as a recipe's result: without what training leaves, in `save_dtype` if any.

    Args:
        source (`Path`): Folder of a stage, or of one of its checkpoints.
        folder (`Path`): Where to; it is there.
        settings ([`RecipeSettings`]): `save_dtype`, `dtype`.

    Raises:
        RecipeError: There is no such type.
    """
    if settings.save_dtype is None or (source / "adapter_config.json").is_file():
        wanted = [path for path in source.iterdir() if path.is_file() and not _is_of_training(path.name)]
        for path in wanted:
            shutil.copy2(path, folder / path.name)
        return
    if settings.save_dtype not in DTYPES:
        raise RecipeError(f"save_dtype is {settings.save_dtype!r}; choose one of {', '.join(DTYPES)}.")
    from ...modeling_segcompass import SegCompassForReasoningSegmentation
    from ...processing_segcompass import SegCompassProcessor

    model = SegCompassForReasoningSegmentation.from_pretrained(source, dtype=DTYPES[settings.save_dtype])
    SegCompassProcessor.from_pretrained(source).save_pretrained(folder)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    _tidy(config, settings.dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _is_of_training(name: str) -> bool:
    return name in (BEGUN, DONE, "training_args.bin", "unreadable_rows.jsonl") or name.endswith(".part")


def _tidy(config: dict[str, Any], dtype: str) -> None:
    """Say what weights are loaded in, which may be wider than on the disk; and not where parts came from."""
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict):
            _tidy(value, dtype)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


__all__ = ["CHECKPOINT", "run_recipe", "write_checkpoint"]
