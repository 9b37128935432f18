# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Training, stage by stage: warm-up, SAE, supervised segmentation, joint training with reinforcement.

Each name is loaded when first used, so that an SAE can be trained where TRL is not installed. `recipe` runs the
stages one after the other, as `segcompass train` does.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Submodule -> public names that it defines.
_EXPORTS = {
    "grpo.config": ("SegCompassGRPOConfig",),
    "grpo.trainer": ("SegCompassGRPOTrainer",),
    "sae.trainer": ("SaeTrainer",),
    "sae.config": ("SaeTrainingConfig",),
    "warmup.config": ("WarmupConfig",),
    "warmup.trainer": ("WarmupTrainer",),
    "segmentation.config": ("SegmentationConfig",),
    "segmentation.trainer": ("SegmentationTrainer",),
    "rewards.object_reward": ("object_reward",),
    "rewards.rewards": ("format_reward", "mask_reward", "is_well_formed", "format_problem"),
    "adapters": ("lora_config", "check_peft_config", "load_adapter"),
    "quantization": ("quantization_config",),
    "sae.sae_lens": ("load_sae_lens", "save_sae_lens"),
    "vllm_folder": ("export_for_vllm",),
    "fsdp": ("prepare_fsdp2",),
    "memory.estimate": ("estimate_memory",),
    "recipe.settings": ("read_recipe",),
    "recipe.check": ("check_recipe",),
    "recipe.running": ("run_recipe",),
    "segmentation.own_reasoning": ("with_own_reasoning", "with_right_samples"),
    "loop.resume": ("RobustTrainerMixin", "RobustTrainingArguments"),
}
__all__ = [name for names in _EXPORTS.values() for name in names]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
