# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What decides the memory of training beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Stage = Literal["warmup", "sae", "segmentation", "grpo"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"]
Sharding = Literal["none", "fsdp", "zero3"]


@dataclass(frozen=True)
class TrainingSetup:
    """Settings of a stage as far as memory depends on them.

    Args:
        stage (`str`): `"warmup"`, `"sae"`, `"segmentation"` or `"grpo"`.
        batch_size (`int`): Sequences per GPU in one forward pass (`per_device_train_batch_size`); tokens for the SAE.
        rollouts (`int`): Completions per GPU that are sampled at once (GRPO: `batch_size * steps_per_generation`).
        prompt_tokens, completion_tokens (`int`): Per sequence; image tokens are part of the prompt.
        active_concepts (`int`): Concepts above the threshold per token.
        objects (`int`): Objects per sample, each of which is decoded to a mask; at most the number of slots.
        trainable (`str`): What trains: of the VLM in the warm-up, see [`WarmupConfig`]; in the segmentation stage
            `"masks"` leaves the VLM and the slots alone, see [`SegmentationConfig`].
        rows_per_batch, buffer_tokens (`int`): See [`SaeTrainingConfig`].
        cached (`bool`): Whether the SAE trains on a cache (`cache_dir`), not on states of passes beside its steps.
        dtype, trainable_dtype (`torch.dtype`): Of the weights that are frozen and of those that train.
        autocast (`bool`): Whether computation runs in bfloat16 (`bf16`).
        gradient_checkpointing (`bool`): Whether layers are computed again in the backward pass.
        optim (`str`): Name of the optimizer, as in `TrainingArguments`.
        reference (`bool`): Whether there is a KL term (`beta > 0`).
        load_in_4bit (`bool`): Whether the linear layers of the decoder are held in NF4.
        gpus (`int`): Processes that share the work; 0: a CPU alone.
        sharding (`str`): `"none"` (one GPU or DDP), `"fsdp"` (FSDP2, everything sharded) or `"zero3"`.
    """

    stage: Stage = "grpo"
    batch_size: int = 4
    rollouts: int = 16
    prompt_tokens: int = 700
    completion_tokens: int = 512
    active_concepts: int = 64
    objects: int = 4
    trainable: str = "without_vision"
    rows_per_batch: int = 8
    buffer_tokens: int = 262_144
    cached: bool = False
    dtype: torch.dtype = torch.float32
    trainable_dtype: torch.dtype = torch.float32
    autocast: bool = True
    gradient_checkpointing: bool = True
    optim: Optimizer = "adamw_torch_fused"
    reference: bool = True
    load_in_4bit: bool = False
    gpus: int = 1
    sharding: Sharding = "none"

    def __post_init__(self):
        for name, choices in (("stage", Stage), ("optim", Optimizer), ("sharding", Sharding)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"the memory of {name}={getattr(self, name)!r} is not known; known are "
                    f"{', '.join(get_args(choices))}."
                )
        if self.sharding != "none" and self.gpus < 2:
            raise ValueError(
                f"sharding={self.sharding!r} divides weights between GPUs and needs 2 or more, got {self.gpus}."
            )
        if self.stage == "grpo" and self.batch_size > self.rollouts:
            raise ValueError(
                f"a forward pass takes {self.batch_size} completions but only {self.rollouts} are sampled per GPU."
            )

    @classmethod
    def from_arguments(cls, stage: Stage, arguments: Any, **others) -> TrainingSetup:
        """Read what the arguments of a stage's trainer say.

        Args:
            stage (`str`): The stage.
            arguments (`TrainingArguments`): Of its trainer.
            others: Further fields, and in place of what is read.
        """
        fields = {
            "batch_size": arguments.per_device_train_batch_size,
            "autocast": bool(arguments.bf16),
            "gradient_checkpointing": bool(arguments.gradient_checkpointing),
            "optim": getattr(arguments.optim, "value", arguments.optim),
        }
        if stage == "grpo":
            fields["rollouts"] = arguments.per_device_train_batch_size * arguments.steps_per_generation
            fields["completion_tokens"] = arguments.max_completion_length
            fields["reference"] = arguments.beta > 0
        if stage in ("warmup", "segmentation"):
            fields["trainable"] = arguments.trainable
        if stage == "sae":
            fields |= {name: getattr(arguments, name) for name in ("rows_per_batch", "buffer_tokens")}
            fields["cached"] = arguments.cache_dir is not None
        return cls(stage=stage, **(fields | others))
