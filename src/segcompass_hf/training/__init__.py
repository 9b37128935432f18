# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Training, stage by stage: warm-up, SAE, supervised segmentation, joint training with reinforcement.

Each name is loaded when first used, so that an SAE can be trained where TRL is not installed. The modules `scenes_*`
are the recipe that made the bundled checkpoint.
"""

from __future__ import annotations

from .._lazy import lazy_names

# Public name -> submodule that defines it.
_EXPORTS = {
    "SegCompassGRPOConfig": "grpo.config",
    "SegCompassGRPOTrainer": "grpo.trainer",
    "SaeTrainer": "sae.trainer",
    "SaeTrainingConfig": "sae.config",
    "WarmupConfig": "warmup.config",
    "WarmupTrainer": "warmup.trainer",
    "SegmentationConfig": "segmentation.config",
    "SegmentationTrainer": "segmentation.trainer",
    "format_reward": "rewards.rewards",
    "mask_reward": "rewards.rewards",
    "is_well_formed": "rewards.rewards",
    "format_problem": "rewards.rewards",
    "lora_config": "adapters",
    "check_peft_config": "adapters",
    "load_adapter": "adapters",
    "quantization_config": "quantization",
    "load_sae_lens": "sae.sae_lens",
    "save_sae_lens": "sae.sae_lens",
    "export_for_vllm": "grpo.vllm",
    "prepare_fsdp2": "fsdp",
    "estimate_memory": "memory.estimate",
    "with_own_reasoning": "segmentation.own_reasoning",
    "RobustTrainerMixin": "loop.resume",
    "RobustTrainingArguments": "loop.resume",
}
__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
