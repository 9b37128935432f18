# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of supervised segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from ..loop.resume import RobustTrainingArguments
from ..objective import SEGMENTATION_LOSS_WEIGHTS, SegmentationObjective

_OF_SLOTS = ("slot_pull_weight", "slots_first_share", "heads_only_share")
LOSS_WEIGHTS = ("lm_loss_weight", *SEGMENTATION_LOSS_WEIGHTS)


@dataclass
class SegmentationConfig(RobustTrainingArguments, SegmentationObjective, TrainingArguments):
    r"""Settings of [`SegmentationTrainer`]: those of [`~transformers.TrainingArguments`], of
    [`SegmentationObjective`], and its own.

    The objective is `lm_loss_weight * L_lm + seg_loss_weight * L_seg + conf_loss_weight * L_conf`, on reference
    answers, and where asked for `slot_pull_weight * L_pull`. New heads take three stages: slots (`slots_first_share`),
    heads (`heads_only_share`), everything. Another segmenter (`segcompass init --from`) takes `trainable="masks"`.

    Args:
        trainable (`str`, defaults to `"joint"`): `"joint"` trains what the method trains. `"masks"` trains what turns
            slots into masks, slot mapper and SAM's mask path, and leaves the VLM, codebook and slot encoder as they
            are, so that there is no language loss.
        slot_cache_dir (`str`, *optional*): With `trainable="masks"`, a folder for the slots and reference states of
            all rows, see [`SlotCache`]: the VLM then reads every row once, before training, and does not run again.
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
        slot_pull_weight (`float`, defaults to 0.0): Of the loss that makes every slot point at the image tokens under
            its object's mask, see [`slot_pull_loss`]. New slots learn what to attend to many times sooner with it. The
            VLM's image tokens must form one grid.
        slots_first_share (`float`, defaults to 0.0): First share of the steps in which codebook, slot encoder and
            confidences learn from that loss alone: SAM and the VLM's layers above the SAE do not run, so that such a
            step costs a third or less. Needs a `slot_pull_weight`.
        heads_only_share (`float`, defaults to 0.0): First share of the steps in which only the heads and SAM's decoder
            train, without reference states: the VLM's layers above the SAE do not run, and there is no language loss.
            Steps of `slots_first_share` count.
        missing_reasoning (`str`, defaults to `"format"`): Rows without reference reasoning, see
            [`SegmentationCollator`].
        num_eval_segmentations (`int`, defaults to 64): First rows of the evaluation set that are segmented greedily at
            each evaluation; 0 for none, -1 for all.
        eval_max_new_tokens (`int`, *optional*): Of those answers; the model's own limit when left out.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "switched_loss_weights"]
    weight_names = LOSS_WEIGHTS

    learning_rate: float = field(default=2e-6, metadata={"help": "Of the decoder layers."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the rows' columns."})

    trainable: Literal["joint", "masks"] = field(
        default="joint", metadata={"help": "Everything the method trains, or what turns slots into masks."}
    )
    slot_cache_dir: str | None = field(default=None, metadata={"help": "Folder for slots and reference states."})
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
    slot_pull_weight: float = field(default=0.0, metadata={"help": "Of the loss that slots point at their objects."})
    slots_first_share: float = field(default=0.0, metadata={"help": "First share of the steps with that loss alone."})
    heads_only_share: float = field(
        default=0.0, metadata={"help": "First share of the steps without the VLM's layers above the SAE."}
    )
    missing_reasoning: Literal["format", "empty", "skip"] = field(
        default="format", metadata={"help": "Language loss of rows without reference reasoning."}
    )
    num_eval_segmentations: int = field(default=64, metadata={"help": "Rows segmented per evaluation; -1: all."})
    eval_max_new_tokens: int | None = field(default=None, metadata={"help": "Of the answers in evaluation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slots_alone_share", "drop_references_share", "slots_first_share", "heads_only_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in [0, 1], got {getattr(self, name)}.")
        if (self.slots_first_share or self.heads_only_share) and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters: bool | None = True  # these stages leave most of the model alone
        stages = [name for name in _OF_SLOTS if getattr(self, name)]
        if self.trainable == "masks" and (stages or self.codebook_init != "keep"):
            raise ValueError(
                f'trainable="masks" leaves codebook and slots as they are, and {", ".join(stages) or "codebook_init"} '
                "is there to train or change them; leave it out."
            )
        if self.slot_cache_dir is not None and self.trainable != "masks":
            raise ValueError('slot_cache_dir keeps the states of a frozen VLM; set trainable="masks" with it.')
        if self.slots_first_share and not self.slot_pull_weight:
            raise ValueError(
                f"slots_first_share={self.slots_first_share} leaves the slots to the slot pull, which "
                "slot_pull_weight=0 switches off; set a weight."
            )
