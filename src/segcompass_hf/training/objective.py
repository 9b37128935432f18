# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The objective that supervised segmentation and joint training share: weights of its losses, what learns how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

SEGMENTATION_LOSS_WEIGHTS = (
    "seg_loss_weight",
    "conf_loss_weight",
    "heatmap_bce_weight",
    "heatmap_dice_weight",
    "mask_dice_weight",
    "mask_focal_weight",
    "match_confidence_weight",
)


@dataclass
class SegmentationObjective:
    r"""Settings of `seg_loss_weight * L_seg + conf_loss_weight * L_conf`, to be mixed into any `TrainingArguments`.

    Args:
        seg_loss_weight, conf_loss_weight (`float`, *optional*): lambda_s and lambda_c; the model configuration's when
            left out.
        heatmap_bce_weight, heatmap_dice_weight, mask_dice_weight, mask_focal_weight (`float`, *optional*): Weights
            within L_seg; the model configuration's when left out.
        match_confidence_weight (`float`, *optional*): How much matching prefers confident slots; as above.
        loss_weight_switch_step (`int`, *optional*): From this optimizer step on, `switched_loss_weights` count.
        switched_loss_weights (`dict[str, float]`, *optional*): Names as above -> weights after the switch.
        train_token_rows (`str`, *optional*): `"head"`, `"none"` or `"both"`, see [`SegCompassConfig`]; its value when
            left out.
        codebook_lr_factor, slot_mapper_lr_factor, prompt_encoder_lr_factor, mask_decoder_lr_factor (`float`): Factors
            on `learning_rate` of codebook and slot encoder, slot mapper, SAM's prompt encoder, SAM's mask decoder.
        overflow (`str`, defaults to `"drop"`): What happens to objects beyond the number of slots; dropped ones are
            counted in the logs (`dropped_objects`).
    """

    weight_names: ClassVar[tuple[str, ...]] = SEGMENTATION_LOSS_WEIGHTS  # of all losses; a trainer with more adds them

    seg_loss_weight: float | None = field(default=None, metadata={"help": "lambda_s."})
    conf_loss_weight: float | None = field(default=None, metadata={"help": "lambda_c."})
    heatmap_bce_weight: float | None = field(default=None, metadata={"help": "Of the heatmaps' cross-entropy."})
    heatmap_dice_weight: float | None = field(default=None, metadata={"help": "Of the heatmaps' Dice loss."})
    mask_dice_weight: float | None = field(default=None, metadata={"help": "Of the masks' Dice loss."})
    mask_focal_weight: float | None = field(default=None, metadata={"help": "Of the masks' focal loss."})
    match_confidence_weight: float | None = field(default=None, metadata={"help": "Confidence in the matching cost."})
    loss_weight_switch_step: int | None = field(default=None, metadata={"help": "Step of the weight switch."})
    switched_loss_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Loss weights after the switch."}
    )
    train_token_rows: Literal["head", "none", "both"] | None = field(
        default=None, metadata={"help": "Which rows of the added tokens train."}
    )
    codebook_lr_factor: float = field(default=25.0, metadata={"help": "On the learning rate of codebook and slots."})
    slot_mapper_lr_factor: float = field(default=80.0, metadata={"help": "On that of the slot mapper."})
    prompt_encoder_lr_factor: float = field(default=10.0, metadata={"help": "On that of SAM's prompt encoder."})
    mask_decoder_lr_factor: float = field(default=10.0, metadata={"help": "On that of SAM's mask decoder."})
    overflow: Literal["drop", "merge", "error"] = field(
        default="drop", metadata={"help": "What happens to more objects than slots."}
    )

    def __post_init__(self):
        super().__post_init__()  # reads a switch given as text
        switched = self.switched_loss_weights or {}
        unknown = sorted(set(switched) - set(self.weight_names))
        if unknown:
            raise ValueError(f"switched_loss_weights names {unknown}; known are {list(self.weight_names)}.")
        if bool(switched) != (self.loss_weight_switch_step is not None):
            raise ValueError(
                "loss_weight_switch_step and switched_loss_weights go together, got "
                f"{self.loss_weight_switch_step} and {self.switched_loss_weights}."
            )

    def loss_weights(self, model_weights: Any, step: int) -> dict[str, float]:
        """The weights that count at optimizer step `step`, by name.

        Args:
            model_weights (`SegCompassConfig` or `Mapping[str, float]`): What counts where a setting is left out.
            step (`int`): 0 is the first.
        """
        defaults = model_weights if isinstance(model_weights, Mapping) else vars(model_weights)
        weights = {name: getattr(self, name) for name in self.weight_names}
        weights = {name: defaults[name] if value is None else value for name, value in weights.items()}
        if self.loss_weight_switch_step is not None and step >= self.loss_weight_switch_step:
            weights |= {name: float(value) for name, value in self.switched_loss_weights.items()}
        return weights

    def learning_rate_factors(self) -> dict[str, float]:
        """Prefix of parameter names -> factor on the learning rate."""
        return {
            "codebook": self.codebook_lr_factor,
            "slot_encoder": self.codebook_lr_factor,
            "slot_mapper": self.slot_mapper_lr_factor,
            "sam.prompt_encoder": self.prompt_encoder_lr_factor,
            "sam.mask_decoder": self.mask_decoder_lr_factor,
        }


__all__ = ["SEGMENTATION_LOSS_WEIGHTS", "SegmentationObjective"]
