# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The trainer of each stage, made from parts, rows and settings; and what it leaves behind."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .parts import PartLoader, Parts
from .rows import StageRows
from .settings import RecipeError, Stage


def names_of(stage: Stage) -> dict[str, Any]:
    """The function that a stage names, as keyword argument of its trainer; nothing where it names none.

    Raises:
        RecipeError: There is no such function, or the stage reads no names.
    """
    if stage.own.names is None:
        return {}
    if stage.name not in ("warmup", "sae"):
        raise RecipeError(f"{stage.name}.names: only warmup and sae read names; leave it out.")
    module, _, name = stage.own.names.rpartition(":")
    try:
        if module.endswith(".py"):  # imports what lies beside it, as a script does
            file = Path(module).resolve(strict=True)
            sys.path.insert(0, str(file.parent))
            module = file.stem
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise RecipeError(
            f"{stage.name}.names is {stage.own.names!r}; expected MODULE:FUNCTION or FILE.py:FUNCTION that can be "
            f"imported: {error}"
        ) from error
    return {"names": found}


def _warmup(loader: PartLoader, stage: Stage, parts: Parts, arguments: Any, rows: StageRows) -> Any:
    from ..warmup.trainer import WarmupTrainer

    processor = loader.processor(parts)
    model = loader.vlm(parts, processor, stage.own.new_weights)
    adapter = None
    if stage.own.lora_r:
        from peft import LoraConfig

        layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        adapter = LoraConfig(r=stage.own.lora_r, lora_alpha=2 * stage.own.lora_r, target_modules=layers)
    return WarmupTrainer(model, arguments, rows.train, rows.evaluation, processor, adapter, **names_of(stage))


def _sae(loader: PartLoader, stage: Stage, parts: Parts, arguments: Any, rows: StageRows) -> Any:
    from ..sae.trainer import SaeTrainer

    processor = loader.processor(parts)
    vlm, sae = loader.vlm(parts, processor), loader.sae(parts)
    return SaeTrainer(vlm, arguments, rows.train, rows.evaluation, processor, sae, **names_of(stage))


def _segmentation(loader: PartLoader, stage: Stage, parts: Parts, arguments: Any, rows: StageRows) -> Any:
    from ..segmentation.trainer import SegmentationTrainer

    processor = loader.processor(parts)
    model = loader.model(parts, processor, stage.own.new_weights)
    adapter = _adapter(model, stage, arguments)
    return SegmentationTrainer(model, arguments, rows.train, rows.evaluation, processor, adapter)


def _grpo(loader: PartLoader, stage: Stage, parts: Parts, arguments: Any, rows: StageRows) -> Any:
    from ..grpo.trainer import SegCompassGRPOTrainer

    processor = loader.processor(parts)
    model = loader.model(parts, processor, stage.own.new_weights)
    adapter = _adapter(model, stage, arguments, heads="full" if arguments.train_heads else "none")
    return SegCompassGRPOTrainer(model, arguments, rows.train, rows.evaluation, processor, adapter)


MAKERS = {"warmup": _warmup, "sae": _sae, "segmentation": _segmentation, "grpo": _grpo}


def _adapter(model: Any, stage: Stage, arguments: Any, **choices: str) -> Any:
    if not stage.own.lora_r:
        return None
    from ..adapters import lora_config

    size = {"r": stage.own.lora_r, "alpha": 2 * stage.own.lora_r}
    return lora_config(model, **size, train_token_rows=arguments.train_token_rows, **choices)


def finish(trainer: Any, stage: Stage, loader: PartLoader, parts: Parts) -> None:
    """Save the stage's result into its folder: whole, adapters merged, but where weights are sharded or quantised."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if stage.name == "warmup":
        if not sharded:
            trainer.merge_adapters()
    elif stage.own.lora_r and not sharded and not loader.settings.load_in_4bit:
        if trainer.args.should_save:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(trainer.args.output_dir)
            trainer.processing_class.save_pretrained(trainer.args.output_dir)
        return
    trainer.save_model()
    processor = getattr(trainer, "processing_class", None)
    if processor is not None and trainer.args.should_save:
        processor.save_pretrained(trainer.args.output_dir)
    if stage.name == "sae" and trainer.args.validation_share:
        trainer.evaluate()  # its figures end the log


__all__ = ["MAKERS", "finish"]
