# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Fit scores that say how often masks are right, on rows that the model has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..configuration_segcompass import SCORE_FEATURES
from ..metrics.calibration import RIGHT_IOU, best_ious, calibration_figures
from ..scoring_segcompass import calibrated_scores
from .rows import EvaluationRow
from .threshold import AnswersByThreshold, choose_threshold

# Which way each feature may move a score; what a sample fits the other way is chance, and left out.
_SIGNS = {"slot_logit": 1, "reasoning_surprisal": -1, "mask_certainty": 1}
MIN_MASKS = 10  # right ones, and wrong ones, below which nothing is fitted
_RIDGE = 1e-3  # of the weights, per mask: keeps them finite where a feature separates right from wrong
_NEWTON_STEPS = 50


def fit_calibration(features: np.ndarray, is_right: Sequence[bool]) -> dict[str, Any]:
    """Logistic regression of "the mask is right" on standardised features, by Newton's method.

    Args:
        features (`np.ndarray` of shape `(num_masks, 3)`): In the order of `SCORE_FEATURES`; NaN where missing.
        is_right (`Sequence[bool]`): Whether the mask is right.

    Returns:
        `dict`: `features` and `bias`, as in the configuration's `score_calibration`. A feature is left out that is the
        same for all masks, or that would lower the score where slot or mask are surer or the reasoning less surprised.

    Raises:
        ValueError: There are fewer than 10 right or fewer than 10 wrong masks.
    """
    features, truth = np.asarray(features, dtype=float), np.asarray(is_right, dtype=bool)
    right, wrong = int(truth.sum()), int((~truth).sum())
    if min(right, wrong) < MIN_MASKS:
        raise ValueError(
            f"{right} masks are right and {wrong} wrong; fitting needs at least {MIN_MASKS} of each. Take more rows "
            "(num_samples, --num-samples), or harder ones."
        )
    known = np.isfinite(features)
    counts = known.sum(0).clip(min=1)
    means = np.where(known, features, 0.0).sum(0) / counts
    centred = np.where(known, features - means, 0.0)  # what is missing counts as the mean
    scales = np.sqrt((centred**2).sum(0) / counts)
    used = [i for i, scale in enumerate(scales) if scale > 1e-9]
    while True:
        columns = np.column_stack([centred[:, used] / scales[used], np.ones(len(features))])
        *weights, bias = _logistic_regression(columns, truth).tolist()
        signed = [weight * _SIGNS[SCORE_FEATURES[i]] for i, weight in zip(used, weights, strict=True)]
        if min(signed, default=0.0) >= 0:
            break
        del used[int(np.argmin(signed))]
    fitted = {
        SCORE_FEATURES[i]: {"mean": float(means[i]), "scale": float(scales[i]), "weight": weight}
        for i, weight in zip(used, weights, strict=True)
    }
    return {"features": fitted, "bias": bias}


def _logistic_regression(columns: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """Coefficients of columns `(num_masks, n)`, the last of which is the constant and not shrunk."""
    penalty = np.full(columns.shape[1], _RIDGE * len(columns))
    penalty[-1] = 0.0
    coefficients = np.zeros(columns.shape[1])
    for _ in range(_NEWTON_STEPS):
        chances = 1 / (1 + np.exp(-np.clip(columns @ coefficients, -30, 30)))
        gradient = columns.T @ (chances - is_right) + penalty * coefficients
        curvature = (columns.T * (chances * (1 - chances))) @ columns + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        coefficients -= step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def calibrate(
    predictor: Any, rows: Iterable[EvaluationRow], batch_size: int = 8, with_threshold: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Segment held-out rows as a user would, and fit scores that say how often such masks are right.

    Rows that cannot be read are left out. The model is not changed: set its configuration's `score_calibration`.

    Args:
        predictor (`ModelPredictor`): The model with its processor.
        rows (`Iterable[EvaluationRow]`): Not seen in training, like those that the model is for.
        batch_size (`int`, defaults to 8): Rows at a time.
        with_threshold (`bool`, defaults to `False`): First choose the confidence from which slots are shown, see
            [`choose_threshold`], and fit scores of the masks that it shows. The predictor must show all slots
            (`slot_logit_threshold=-math.inf`), of a model without `score_calibration`.

    Returns:
        `tuple[dict, dict]`: the calibration, and figures: `before` and `after` as in [`calibration_figures`], both on
        these rows, `samples`, and `threshold`, what was chosen or `None`.

    Raises:
        ValueError: see [`fit_calibration`] and [`choose_threshold`].
    """
    found, confidences, ious, answers, samples = [], [], [], [], 0
    told = logging.tqdm(rows, desc="calibration", disable=None)  # on a terminal
    readable = (row for row in told if row.problem is None)
    while batch := list(islice(readable, batch_size)):
        output, sizes, results = predictor.segment([row.columns for row in batch])
        maps = output.slot_logits, output.pred_masks, output.reasoning_surprisal
        every = predictor.model.score_features(*maps, sizes).cpu()  # (rows, num_slots, 3)
        for index, (row, result) in enumerate(zip(batch, results, strict=True)):
            masks, shown = result["masks"].numpy(), result["slots"]
            own = output.slot_logits[index].float().cpu()[shown]  # (num_masks,)
            found.append(every[index, shown])
            confidences.append(own)
            ious += best_ious(masks, row.read_targets, row.ignore)
            if with_threshold:
                answers.append(AnswersByThreshold.of(masks, own.numpy(), row.read_targets, row.ignore))
        samples += len(batch)
    features = torch.cat(found) if found else torch.zeros(0, len(SCORE_FEATURES))  # (num_masks, 3)
    logits = torch.cat(confidences) if confidences else torch.zeros(0)  # (num_masks,)
    threshold = choose_threshold(answers) if with_threshold else None
    lowest: Any = threshold["slot_logit_threshold"] if threshold else -torch.inf
    kept = torch.tensor([iou is not None for iou in ious], dtype=torch.bool) & (logits > lowest)
    features, logits = features[kept], logits[kept]
    fits = [iou for iou, is_kept in zip(ious, kept.tolist(), strict=True) if is_kept and iou is not None]
    calibration = fit_calibration(features.numpy(), [iou >= RIGHT_IOU for iou in fits])
    scores = calibrated_scores(features, calibration).tolist()
    before, after = (calibration_figures(each, fits) for each in (logits.sigmoid().tolist(), scores))
    return calibration, {"before": before, "after": after, "samples": samples, "threshold": threshold}


__all__ = ["calibrate", "fit_calibration"]
