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

    The objective is `L_lm + alignment_weight * L_align`.

    Args:
        trainable (`str`, defaults to `"without_vision"`): What trains where there is no `peft_config`: `"all"` of the
            VLM, all `"without_vision"` encoder (its projector trains), or the `"decoder"` layers and final norm alone,
            with the rows of the added tokens.
        learning_rate_factors (`dict[str, float]`, *optional*): Prefix of the VLM's parameter names -> factor on
            `learning_rate`, for instance `{"model.vision_tower": 0.1}`; the longest prefix that fits wins.
        missing_reasoning (`str`, defaults to `"format"`): Rows without reference reasoning, see
            [`SegmentationCollator`].
        alignment_weight (`float`, defaults to 0.0): Of the word-patch alignment, see `training.alignment`; 0 is off.
        alignment_pairs (`str`, defaults to `"target"`): `"target"` holds all words that mean the target against its
            masks; `"names"` every name against the patches of what it names, whichever object of the row it is (see
            `training.alignment.names`), with the trainer's `names`. It then reads the whole text.
        alignment_layer (`int`, *optional*): Index into `hidden_states` of the states it acts on; 0 are the embeddings
            and projected patches. The layer the SAE reads (or will by default) when left out.
        alignment_text (`str`, defaults to `"instruction"`): Where the words stand that mean the target: there or in
            the `"reasoning"`; for `alignment_pairs="target"`.
        alignment_temperature (`float`, defaults to 0.07): Of its softmax. What is aligned takes up the more of a state
            the higher it is, and an SAE has features for what takes up much: 0.25 or more where one follows.
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
    missing_reasoning: Literal["format", "empty", "skip"] = field(
        default="format", metadata={"help": "Language loss of rows without reference reasoning."}
    )
    alignment_weight: float = field(default=0.0, metadata={"help": "Of the word-patch alignment; 0: off."})
    alignment_pairs: Literal["target", "names"] = field(default="target", metadata={"help": "What is held together."})
    alignment_layer: int | None = field(default=None, metadata={"help": "hidden_states index; default: the SAE's."})
    alignment_text: Literal["instruction", "reasoning"] = field(
        default="instruction", metadata={"help": "Where the words stand that mean the target."}
    )
    alignment_temperature: float = field(default=0.07, metadata={"help": "Of the alignment's softmax."})
    num_eval_generations: int = field(default=16, metadata={"help": "Answers written per evaluation; -1: all rows."})
    eval_max_new_tokens: int = field(default=512, metadata={"help": "Of those answers."})

    def __post_init__(self):
        super().__post_init__()
        if self.alignment_weight < 0:
            raise ValueError(f"alignment_weight cannot be negative, got {self.alignment_weight}.")
        if self.alignment_temperature <= 0:
            raise ValueError(f"alignment_temperature must be above 0, got {self.alignment_temperature}.")
