# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of supervised segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from ..loop.resume import RobustTrainingArguments
from ..objective import SEGMENTATION_LOSS_WEIGHTS, SegmentationObjective

LOSS_WEIGHTS = ("lm_loss_weight", *SEGMENTATION_LOSS_WEIGHTS)


@dataclass
class SegmentationConfig(RobustTrainingArguments, SegmentationObjective, TrainingArguments):
    r"""Settings of [`SegmentationTrainer`]: those of [`~transformers.TrainingArguments`], of
    [`SegmentationObjective`], and its own.

    The objective is `lm_loss_weight * L_lm + seg_loss_weight * L_seg + conf_loss_weight * L_conf`, on reference
    answers.

    Args:
        lm_loss_weight (`float`, *optional*): Of L_lm; the model configuration's when left out. This and the weights
            of [`SegmentationObjective`] replace the configuration's, where they are then also saved.
        optimizer (`str`, defaults to `"trainer"`): `"trainer"` follows `optim`; `"muon"` is [`MuonWithAdamW`], which
            made the bundled checkpoint: Muon on hidden matrices at `learning_rate`, AdamW on the rest.
        codebook_init (`str`, defaults to `"keep"`): `"sae_decoder"` starts the codebook from the SAE's decoder, so
            that concept embeddings begin with the geometry of the states (for a new codebook, not a trained one).
        slots_alone_share (`float`, defaults to 0.0): First share of the steps in which reference states are zeroed,
            so that slots are all there is. On Scenes the slots stayed unused without it; 0.6 there.
        drop_references_share (`float`, defaults to 0.0): Share of the samples without reference states after that; 0.5
            on Scenes.
        missing_reasoning (`str`, defaults to `"format"`): Rows without reference reasoning, see
            [`SegmentationCollator`].
        num_eval_segmentations (`int`, defaults to 64): First rows of the evaluation set that are segmented greedily at
            each evaluation; 0 for none, -1 for all.
        eval_max_new_tokens (`int`, *optional*): Of those answers; the model's own limit when left out.
        embedding_cache_dir (`str`, *optional*): A folder for SAM's image embeddings, see [`EmbeddingCache`]: its image
            encoder then runs once per image, not once per image and epoch.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "switched_loss_weights"]
    weight_names = LOSS_WEIGHTS

    learning_rate: float = field(default=2e-6, metadata={"help": "Of the decoder layers."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the rows' columns."})

    lm_loss_weight: float | None = field(default=None, metadata={"help": "Of the language loss."})
    optimizer: Literal["trainer", "muon"] = field(
        default="trainer", metadata={"help": "What `optim` says, or Muon with AdamW."}
    )
    codebook_init: Literal["keep", "sae_decoder"] = field(
        default="keep", metadata={"help": "Where the codebook starts."}
    )
    slots_alone_share: float = field(
        default=0.0, metadata={"help": "First share of the steps without reference states."}
    )
    drop_references_share: float = field(
        default=0.0, metadata={"help": "Share of the samples without reference states after that."}
    )
    missing_reasoning: Literal["format", "empty", "skip"] = field(
        default="format", metadata={"help": "Language loss of rows without reference reasoning."}
    )
    num_eval_segmentations: int = field(default=64, metadata={"help": "Rows segmented per evaluation; -1: all."})
    eval_max_new_tokens: int | None = field(default=None, metadata={"help": "Of the answers in evaluation."})
    embedding_cache_dir: str | None = field(default=None, metadata={"help": "Folder for SAM's image embeddings."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("slots_alone_share", "drop_references_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in [0, 1], got {getattr(self, name)}.")
