# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How sure an answer is of each mask: features of a slot, and the calibrated score made of them."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessor

from .configuration_segcompass import SCORE_FEATURES


class TokenSurprisal(LogitsProcessor):
    """Changes no score; notes -log p of every token written, as the VLM has it before format and sampling."""

    def __init__(self):
        self._surprisals: list[torch.Tensor] = []  # of each step, (rows, 1)
        self._log_probs: torch.Tensor | None = None  # of the token to be chosen next, (rows, vocab_size)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._note(input_ids)
        self._log_probs = scores.float().log_softmax(-1)
        return scores

    def _note(self, input_ids: torch.Tensor) -> None:
        if self._log_probs is not None:
            self._surprisals.append(-self._log_probs.gather(1, input_ids[:, -1:]))

    def of_reasoning(self, sequences: torch.Tensor, is_reasoning: torch.Tensor) -> torch.Tensor:
        """Mean surprisal of the tokens of each row's reasoning, in nats, to be asked for once, after generation.

        The n-th token of a reasoning has the weight n: later words are nearer to the answer, earlier ones more often
        describe what does not matter for it.

        Args:
            sequences (`torch.LongTensor` of shape `(rows, sequence_length)`): Prompts and completions, as generated.
            is_reasoning (`torch.Tensor` of shape `(rows, completion_length)`): 1 on tokens of the reasoning.

        Returns:
            `torch.Tensor` of shape `(rows,)`: float32; NaN where there is no reasoning, and where `generate` was
            replaced by something that does not call its processors.
        """
        prompt_length = sequences.shape[1] - is_reasoning.shape[1]
        self._note(sequences[:, : prompt_length + len(self._surprisals) + 1])
        chosen = len(self._surprisals)  # tokens; the format may have had the others follow at once
        if not 0 < chosen <= is_reasoning.shape[1] or is_reasoning[:, chosen:].any():
            return torch.full((len(sequences),), torch.nan, device=sequences.device)
        return mean_surprisal(torch.cat(self._surprisals, dim=1), is_reasoning[:, :chosen])


def mean_surprisal(surprisals: torch.Tensor, is_reasoning: torch.Tensor) -> torch.Tensor:
    """As [`~TokenSurprisal.of_reasoning`], of the surprisals of all tokens, both `(rows, completion_length)`."""
    is_reasoning = is_reasoning.to(surprisals.device).bool()
    weights = is_reasoning.cumsum(1) * is_reasoning
    return (surprisals.masked_fill(~is_reasoning, 0.0) * weights).sum(1) / weights.sum(1)


def mask_certainty(
    pred_masks: torch.Tensor, valid_area: torch.Tensor | None = None, mask_logit_threshold: float = 0.0
) -> torch.Tensor:
    """The IoU that each mask has in expectation, if its probabilities `p` are right.

    `sum of p inside / (pixels inside + sum of p outside)`; 0 for a mask without a pixel.

    Args:
        pred_masks (`torch.Tensor` of shape `(..., height, width)`): Mask logits.
        valid_area (`torch.BoolTensor`, *optional*): False on padding; broadcasts to the masks.
        mask_logit_threshold (`float`, defaults to 0.0): Pixels with a logit above it are inside.

    Returns:
        `torch.Tensor` of shape `(...,)`: float32, in [0, 1].
    """
    logits = pred_masks.float()
    valid_area = torch.ones_like(logits, dtype=torch.bool) if valid_area is None else valid_area.to(logits.device)
    inside = (logits > mask_logit_threshold) & valid_area
    probabilities = logits.sigmoid().masked_fill(~valid_area, 0.0)
    pixels, expected = inside.sum((-2, -1)), (probabilities * inside).sum((-2, -1))
    return expected / (pixels + probabilities.sum((-2, -1)) - expected).clamp(min=torch.finfo(torch.float32).tiny)


def score_features(
    slot_logits: torch.Tensor, certainty: torch.Tensor, reasoning_surprisal: torch.Tensor | None = None
) -> torch.Tensor:
    """What a calibrated score is made of, in the order of `SCORE_FEATURES`.

    `slot_logit` is the slot's confidence, `reasoning_surprisal` the square root of the reasoning's mean surprisal, and
    `mask_certainty` the mask's expected IoU.

    Args:
        slot_logits (`torch.Tensor` of shape `(rows, num_slots)`): Confidences, logits.
        certainty (`torch.Tensor` of shape `(rows, num_slots)`): See [`mask_certainty`].
        reasoning_surprisal (`torch.Tensor` of shape `(rows,)`, *optional*): In nats; NaN where a row has no reasoning.

    Returns:
        `torch.Tensor` of shape `(rows, num_slots, 3)`: float32; NaN where a feature is missing.
    """
    slot_logits = slot_logits.float()
    if reasoning_surprisal is None:
        reasoning_surprisal = torch.full_like(slot_logits[:, 0], torch.nan)
    surprisal = reasoning_surprisal.to(slot_logits).clamp(min=0).sqrt()[:, None].expand_as(slot_logits)
    return torch.stack([slot_logits, surprisal, certainty.to(slot_logits)], dim=-1)


def calibrated_scores(features: torch.Tensor, calibration: Mapping[str, Any]) -> torch.Tensor:
    """`sigmoid(bias + sum over features of weight * (value - mean) / scale)`; a missing feature counts as its mean.

    Args:
        features (`torch.Tensor` of shape `(..., 3)`): See [`score_features`].
        calibration (`Mapping`): The configuration's `score_calibration`.

    Returns:
        `torch.Tensor` of shape `(...,)`: in [0, 1].
    """
    logits = torch.full_like(features[..., 0], calibration["bias"])
    for name, values in zip(SCORE_FEATURES, features.unbind(-1), strict=True):
        if name in calibration["features"]:
            entry = calibration["features"][name]
            logits = logits + entry["weight"] * ((values - entry["mean"]) / entry["scale"]).nan_to_num(nan=0.0)
    return logits.sigmoid()


class ScoringMixin:
    """Scores of [`SegCompassForReasoningSegmentation`]; needs its `config` and `mask_stage`."""

    config: Any
    mask_stage: Any

    def score_features(
        self,
        slot_logits: torch.Tensor,
        pred_masks: torch.Tensor,
        reasoning_surprisal: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features `(rows, num_slots, 3)` of slots; arguments as in [`~ScoringMixin.score_slots`]."""
        area = None if reshaped_input_sizes is None else self.mask_stage.valid_area(reshaped_input_sizes)
        certainty = mask_certainty(pred_masks, area, self.config.mask_logit_threshold)  # (rows, num_slots)
        return score_features(slot_logits, certainty, reasoning_surprisal)

    def score_slots(
        self,
        slot_logits: torch.Tensor,
        pred_masks: torch.Tensor,
        reasoning_surprisal: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The probability that each slot's mask is right (an IoU of 0.5 or more with one of the objects asked for).

        Slots at or below `slot_logit_threshold`, and all of a model that is not calibrated (`score_calibration` of its
        configuration), have the plain confidence `sigmoid(slot_logit)`.

        Args:
            slot_logits (`torch.Tensor` of shape `(rows, num_slots)`): Of all slots, or of some.
            pred_masks (`torch.Tensor` of shape `(rows, num_slots, 4h, 4w)`): Mask logits of the same slots.
            reasoning_surprisal (`torch.Tensor` of shape `(rows,)`, *optional*): As from `segment`.
            reshaped_input_sizes (`torch.Tensor` of shape `(rows, 2)`, *optional*): (height, width) on the canvas.

        Returns:
            `torch.Tensor` of shape `(rows, num_slots)`: float32, in [0, 1].
        """
        plain, calibration = slot_logits.float().sigmoid(), self.config.score_calibration
        if calibration is None:
            return plain
        features = self.score_features(slot_logits, pred_masks, reasoning_surprisal, reshaped_input_sizes)
        is_kept = slot_logits > self.config.slot_logit_threshold
        return torch.where(is_kept, calibrated_scores(features, calibration), plain)


__all__ = [
    "ScoringMixin",
    "TokenSurprisal",
    "calibrated_scores",
    "mask_certainty",
    "score_features",
]
