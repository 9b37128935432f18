# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of the warm-up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ..loop.resume import RobustTrainingArguments


@dataclass
class WarmupConfig(RobustTrainingArguments, TrainingArguments):
    r"""Settings of [`WarmupTrainer`]: those of [`~transformers.TrainingArguments`], and its own.

    The objective is `L_lm + alignment_weight * L_align(alignment_layer) + embedding_alignment_weight * L_align(0) +
    reading_weight * L_read(alignment_layer)`.

    Args:
        trainable (`str`, defaults to `"without_vision"`): What trains where there is no `peft_config`: `"all"` of the
            VLM, all `"without_vision"` encoder (its projector trains), or the `"decoder"` layers and final norm alone,
            with the rows of the added tokens.
        learning_rate_factors (`dict[str, float]`, *optional*): Prefix of the VLM's parameter names -> factor on
            `learning_rate`, for instance `{"model.vision_tower": 0.1}`; the longest prefix that fits wins.
        optimizer (`str`, defaults to `"trainer"`): `"trainer"` follows `optim`; `"muon"` is [`MuonWithAdamW`]: Muon on
            hidden matrices at `learning_rate`, AdamW on the rest. From random weights it learns many times as fast.
        missing_reasoning (`str`, defaults to `"format"`): Rows without reference reasoning, see
            [`SegmentationCollator`].
        alignment_weight (`float`, defaults to 0.0): Of the word-patch alignment, see `training.alignment`; 0 is off.
        embedding_alignment_weight (`float`, defaults to 0.0): Of the same loss before the first layer, on projected
            patches and word embeddings.
        alignment_pairs (`str`, defaults to `"target"`): `"target"` holds all words that mean the target against its
            masks; `"names"` every name against the patches of what it names, whichever object of the row it is (see
            `training.alignment.names`), with the trainer's `names`. It then reads the whole text.
        alignment_layer (`int`, *optional*): Index into `hidden_states` of the states it acts on; 0 are the embeddings
            and projected patches. The layer the SAE reads (or will by default) when left out.
        alignment_text (`str`, defaults to `"instruction"`): Where the words stand that mean the target: there or in
            the `"reasoning"`; for `alignment_pairs="target"`.
        alignment_temperature (`float`, defaults to 0.07): Of its softmax. What is aligned takes up the more of a state
            the higher it is, and an SAE has features for what takes up much: 0.25 or more where one follows.
        reading_weight (`float`, defaults to 0.0): Of the reading loss, see `training.warmup.reading`: a small head,
            dropped after training, has to find the objects of the answer in the states of `alignment_layer`. 0 is off.
            The head is new: its parameters, `reading_head` in `learning_rate_factors`, may learn faster than a VLM's.
        num_eval_generations (`int`, defaults to 16): First rows of the evaluation set that are answered freely and
            greedily at each evaluation, for `eval_format_share`; 0 for none, -1 for all.
        eval_max_new_tokens (`int`, defaults to 512): Of those answers.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "learning_rate_factors"]

    learning_rate: float = field(default=1e-5, metadata={"help": "Of the VLM; higher (1e-4) for LoRA."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the rows' columns."})

    trainable: Literal["all", "without_vision", "decoder"] = field(
        default="without_vision", metadata={"help": "What of the VLM trains."}
    )
    learning_rate_factors: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Prefix of parameter names -> factor on the learning rate."}
    )
    optimizer: Literal["trainer", "muon"] = field(
        default="trainer", metadata={"help": "What `optim` says, or Muon with AdamW."}
    )
    missing_reasoning: Literal["format", "empty", "skip"] = field(
        default="format", metadata={"help": "Language loss of rows without reference reasoning."}
    )
    alignment_weight: float = field(default=0.0, metadata={"help": "Of the word-patch alignment; 0: off."})
    embedding_alignment_weight: float = field(default=0.0, metadata={"help": "Of the same before the first layer."})
    alignment_pairs: Literal["target", "names"] = field(default="target", metadata={"help": "What is held together."})
    alignment_layer: int | None = field(default=None, metadata={"help": "hidden_states index; default: the SAE's."})
    alignment_text: Literal["instruction", "reasoning"] = field(
        default="instruction", metadata={"help": "Where the words stand that mean the target."}
    )
    alignment_temperature: float = field(default=0.07, metadata={"help": "Of the alignment's softmax."})
    reading_weight: float = field(default=0.0, metadata={"help": "Of the reading loss; 0: off."})
    num_eval_generations: int = field(default=16, metadata={"help": "Answers written per evaluation; -1: all rows."})
    eval_max_new_tokens: int = field(default=512, metadata={"help": "Of those answers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alignment_weight", "embedding_alignment_weight", "reading_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}.")
        if self.alignment_temperature <= 0:
            raise ValueError(f"alignment_temperature must be above 0, got {self.alignment_temperature}.")

    @property
    def alignment_weights(self) -> dict[str, float]:
        """Place of the states -> weight of the alignment there, where it is not 0."""
        weights = {"layer": self.alignment_weight, "embeddings": self.embedding_alignment_weight}
        return {place: weight for place, weight in weights.items() if weight}
