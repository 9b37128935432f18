# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What joint training relies on in TRL without a promise of TRL's: compared when the trainer is imported."""

from __future__ import annotations

import inspect

import trl
import trl.trainer.utils

TRL_VERSIONS = "trl>=1.16,<1.17"

# Leading arguments of what is overridden or called. `compute_loss` alone is documented for it.
METHODS = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate": ("self", "prompts"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_get_train_sampler": ("self", "dataset"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_tokenize_prompts": ("self", "prompts"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
}
FUNCTIONS = {
    "add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "split_pixel_values_by_grid": ("batch",),
    "split_tensor_dict": ("tensor_dict", "num_chunks"),
    "unsplit_pixel_values_by_grid": ("batch",),
}


def check_trl() -> None:
    """Compare arguments of TRL's methods and functions with those that joint training was written for.

    Raises:
        ImportError: One is missing or takes others; the message names it and the versions to install.
    """
    for owner, expected in ((trl.GRPOTrainer, METHODS), (trl.trainer.utils, FUNCTIONS)):
        for name, arguments in expected.items():
            method = getattr(owner, name, None)
            found = () if method is None else tuple(inspect.signature(method).parameters)
            if found[: len(arguments)] != arguments:
                got = f"takes ({', '.join(found)})" if method is not None else "is missing"
                raise ImportError(
                    f"joint training needs {owner.__name__}.{name}({', '.join(arguments)}), which in trl "
                    f"{trl.__version__} {got}; install {TRL_VERSIONS}."
                )
