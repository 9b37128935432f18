# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of the joint objective: reinforcement of the reasoning, segmentation losses on the masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from trl import GRPOConfig

from ..loop.resume import RobustTrainingArguments
from ..objective import SegmentationObjective

DEFAULT_REWARD_WEIGHTS = [0.3, 0.7]  # format, mask


@dataclass
class SegCompassGRPOConfig(RobustTrainingArguments, SegmentationObjective, GRPOConfig):
    r"""Settings of [`SegCompassGRPOTrainer`]: those of [`trl.GRPOConfig`] with the method's defaults, of
    [`SegmentationObjective`], and its own.

    The objective is `policy_loss_weight * L_grpo + seg_loss_weight * L_seg + conf_loss_weight * L_conf`.

    Args:
        policy_loss_weight (`float`, defaults to 1.0): Of L_grpo; 0 trains on the segmentation losses alone, still on
            the model's own completions.
        segmentation_completions (`str`, defaults to `"all"`): Which completions L_seg and L_conf learn from: `"all"`
            (the method), or those rewarded `"at_least_mean"` of their group. Masks asked for behind reasoning that
            means other objects teach the heads not to follow the reasoning.
        train_heads (`bool`, defaults to `True`): Whether codebook, slot encoder, slot mapper and SAM's decoder train.
            This and `train_token_rows` are up to the adapter where there is one; a warning names what it does
            otherwise. `train_token_rows="both"` is refused unless embeddings are tied: joint training sends no
            gradient below the SAE.
        mask_reward (`str`, defaults to `"overlap"`): Default reward of the masks: `"overlap"` (the method's
            `mask_reward`), or `"objects"` (`object_reward`), which tells right objects from wrong ones without noise.
        max_resamplings (`int`, defaults to 0): How often at most other prompts are sampled in the place of groups
            whose rewards are exactly equal, so that all of a batch teaches (DAPO's dynamic sampling, within a budget).
        pass_rates (`str`, *optional*): Folder that `segcompass evaluate --pass-at-k` wrote of the training rows.
            Prompts whose samples were all right or all wrong there, or when last sampled in this training, are mostly
            left out; prompts known to teach are drawn in their place.
        stratify_by (`str`, *optional*): Column, such as `kind`, all of whose values every batch of prompts holds.
        guidance (`str`, defaults to `"none"`): Help for groups all of whose samples are wrong, where the row has a
            reference `reasoning`: it takes the place of one sample (`"rollout"`, ViSurf), or the group is sampled
            again behind its first sentences (`"prefix"`, BREAD). Without a reference nothing happens.
        guidance_share (`float`, defaults to 0.5): Share of the training over which help fades: fewer groups get the
            rollout, prefixes get shorter.
        lr_schedule (`str`, defaults to `"trainer"`): `"trainer"` follows `lr_scheduler_type`; `"one_cycle"` falls from
            the learning rate along a cosine to a `one_cycle_final_factor`-th of it, without warm-up (the paper's).
        one_cycle_final_factor (`float`, defaults to 6.7): First learning rate over last.
        sample_pictures_steps (`int`, defaults to 0): Every so many optimizer steps, pictures with masks and reasoning
            are written to `output_dir/samples` and to the trackers; 0 writes none.
        num_sample_pictures (`int`, defaults to 4): Pictures each time.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "switched_loss_weights"]

    learning_rate: float = field(default=2e-6, metadata={"help": "Of the decoder layers."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    num_generations: int | None = field(default=8, metadata={"help": "Completions per prompt (group size)."})
    max_completion_length: int | None = field(default=512, metadata={"help": "Tokens per completion at most."})
    beta: float = field(default=0.2, metadata={"help": "KL coefficient."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Weight the KL by the importance ratio; TRL's default, not the method's."}
    )
    loss_type: str = field(default="bnpo", metadata={"help": "GRPO loss: mean over the tokens of a micro-batch."})

    policy_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the GRPO loss."})
    segmentation_completions: Literal["all", "at_least_mean"] = field(
        default="all", metadata={"help": "Completions that the segmentation losses learn from."}
    )
    mask_reward: Literal["overlap", "objects"] = field(
        default="overlap", metadata={"help": "Default reward of the masks."}
    )
    max_resamplings: int = field(default=0, metadata={"help": "Rounds that replace groups of equal rewards."})
    pass_rates: str | None = field(default=None, metadata={"help": "Folder of `segcompass evaluate --pass-at-k`."})
    stratify_by: str | None = field(default=None, metadata={"help": "Column whose values every batch holds."})
    guidance: Literal["none", "rollout", "prefix"] = field(
        default="none", metadata={"help": "Help of a reference where all samples are wrong."}
    )
    guidance_share: float = field(default=0.5, metadata={"help": "Share of the training over which help fades."})
    train_heads: bool = field(default=True, metadata={"help": "Whether the segmentation heads train."})
    lr_schedule: Literal["trainer", "one_cycle"] = field(
        default="trainer", metadata={"help": "transformers' schedule, or the paper's."}
    )
    one_cycle_final_factor: float = field(default=6.7, metadata={"help": "First learning rate over last."})
    sample_pictures_steps: int = field(default=0, metadata={"help": "Steps between sample pictures; 0: none."})
    num_sample_pictures: int = field(default=4, metadata={"help": "Sample pictures each time."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16: bool | None = False  # TRL's default is True, which transformers refuses without a GPU
        super().__post_init__()
        if self.segmentation_completions not in ("all", "at_least_mean"):
            raise ValueError(
                f"segmentation_completions is 'all' or 'at_least_mean', got {self.segmentation_completions!r}."
            )
        for name, choices in (("mask_reward", ("overlap", "objects")), ("guidance", ("none", "rollout", "prefix"))):
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {known}.")
        if self.max_resamplings < 0:
            raise ValueError(f"max_resamplings is {self.max_resamplings}; it counts rounds: 0 or more.")
        if not 0 < self.guidance_share <= 1:
            raise ValueError(
                f"guidance_share is {self.guidance_share}; it is a share of the training: above 0, up to 1."
            )
        if self.one_cycle_final_factor < 1:
            raise ValueError(f"one_cycle_final_factor divides the learning rate, got {self.one_cycle_final_factor}.")
        if self.sync_ref_model:
            raise ValueError(
                "sync_ref_model=True is not supported: the reference policy is the model as it was given to the "
                "trainer. For a newer reference start a new run from the newer checkpoint."
            )

    @property
    def chooses_groups(self) -> bool:
        """Whether groups are sampled and looked at before TRL gets them."""
        return self.max_resamplings > 0 or self.pass_rates is not None or self.guidance != "none"
