# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""gIoU, cIoU, N-acc, T-acc and precision at an IoU, with the definitions of GRES (Liu, Ding, Jiang, CVPR 2023).

Every sample is reduced to four integers (`SampleScore`), or left out where its whole target is ignored. From these
all figures follow. Integers add up exactly, so results do not depend on the order of samples or on how they were
spread over processes.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .intervals import bootstrap_ratios, images_of, sums_by_image

METRIC_NAMES = ("gIoU", "cIoU", "N-acc", "T-acc")
PRECISION_NAMES = ("precision@0.5", "precision@0.7", "precision@0.9")
ALL_METRIC_NAMES = METRIC_NAMES + PRECISION_NAMES


class SampleScore(NamedTuple):
    """What one sample contributes to every metric: pixel counts outside the ignored area."""

    intersection: int
    union: int
    predicted_pixels: int
    target_pixels: int

    @property
    def left_out(self) -> bool:
        """Whether no metric counts it."""
        return False

    @property
    def iou(self) -> float:
        """Intersection over union in [0, 1]; 1 where neither prediction nor target has a pixel."""
        return self.intersection / self.union if self.union else 1.0


class LeftOutScore(SampleScore):
    """Of a sample with a target all of which is ignored: no answer is right or wrong, and no metric counts it."""

    @property
    def left_out(self) -> bool:
        return True


def score_sample(prediction: Any, reference: Any, ignore: Any = None) -> SampleScore:
    """Compare the union of the predicted masks with the union of the target masks.

    Args:
        prediction (`np.ndarray` of shape `(height, width)` or `(num_masks, height, width)`): Boolean masks; also a
            list of masks, or a `torch.Tensor`. No mask at all (`[]` or `num_masks == 0`) is an empty prediction.
        reference (`np.ndarray` of shape `(height, width)` or `(num_masks, height, width)`): Target masks.
        ignore (`np.ndarray` of shape `(height, width)` or `(num_masks, height, width)`, *optional*): Pixels left out
            of both.

    Returns:
        `SampleScore`: pixel counts; a `LeftOutScore` where there is a target and all of it is ignored.

    Raises:
        ValueError: if the sizes differ, the rank is not 2 or 3, or the values are not those of a mask.
    """
    prediction = _union(prediction, "prediction")
    reference = _union(reference, "reference")
    ignore = None if ignore is None else _union(ignore, "ignore")
    shapes = {
        name: mask.shape
        for name, mask in (("prediction", prediction), ("reference", reference), ("ignore", ignore))
        if mask is not None
    }
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"masks of one sample differ in size: {shapes} (height, width); bring them to the original image size, "
            "for instance with processor.post_process_segmentation(...)"
        )
    if not shapes:
        return SampleScore(0, 0, 0, 0)
    empty = np.zeros(next(iter(shapes.values())), dtype=bool)
    prediction = empty if prediction is None else prediction
    reference = empty if reference is None else reference
    kind: type[SampleScore] = SampleScore
    if ignore is not None:
        is_meant = reference.any()
        prediction, reference = prediction & ~ignore, reference & ~ignore
        kind = LeftOutScore if is_meant and not reference.any() else kind
    intersection = int(np.count_nonzero(prediction & reference))
    predicted, target = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    return kind(intersection, predicted + target - intersection, predicted, target)


def _union(masks: Any, name: str) -> np.ndarray | None:
    """Union of one or more masks `(height, width)`; `None` for an empty list, which has no size."""
    if isinstance(masks, (list, tuple)) and any(hasattr(mask, "detach") for mask in masks):
        masks = [_as_array(mask) for mask in masks]
    masks = np.asarray(_as_array(masks))
    if masks.ndim == 1 and masks.size == 0:
        return None
    if masks.ndim not in (2, 3):
        raise ValueError(
            f"{name} has shape {masks.shape} and dtype {masks.dtype}; expected an array of shape (height, width) or "
            "(num_masks, height, width) for one sample. Decode run-length encodings with decode_mask first."
        )
    if masks.dtype.kind == "i" and masks.min(initial=0) < 0:
        raise ValueError(
            f"{name} holds {masks.dtype} values below 0; expected 0 outside the mask and positive values inside. Of "
            "logits pass logits > mask_logit_threshold, of labels labels > 0."
        )
    if masks.dtype.kind not in "biu" and not np.isin(masks, (0, 1)).all():
        raise ValueError(
            f"{name} holds {masks.dtype} values other than 0 and 1; pass boolean masks (logits > mask_logit_threshold)"
        )
    masks = masks.astype(bool)
    return masks.any(axis=0) if masks.ndim == 3 else masks


def _as_array(masks: Any) -> Any:
    """A tensor of any device and dtype as an array, with numbers that numpy knows; anything else as it is."""
    if not hasattr(masks, "detach"):
        return masks
    masks = masks.detach().cpu()
    masks = masks.to_dense() if masks.is_sparse else masks
    return (masks.float() if masks.is_floating_point() and masks.element_size() < 4 else masks).numpy()


class SegmentationAccumulator:
    """Collect samples one by one, in groups if wanted, and compute the metrics at any time.

    Accumulators of several processes are merged with `merge`; the result is that of one process, exactly.

    Example:
        >>> import numpy as np
        >>> accumulator = SegmentationAccumulator()
        >>> accumulator.update(np.ones((2, 2), bool), np.array([[True, False], [False, False]]), group="attribute")
        SampleScore(intersection=1, union=4, predicted_pixels=4, target_pixels=1)
        >>> accumulator.compute()["gIoU"]
        0.25
    """

    def __init__(self) -> None:
        self._scores: dict[Hashable, list[SampleScore]] = {}

    def update(self, prediction: Any, reference: Any, ignore: Any = None, group: Hashable = None) -> SampleScore:
        """Add one sample (arguments as for `score_sample`) under `group`; returns its counts."""
        return self.add(score_sample(prediction, reference, ignore), group)

    def add(self, score: SampleScore, group: Hashable = None) -> SampleScore:
        """Add a sample that was scored before, under `group`."""
        self._scores.setdefault(group, []).append(score)
        return score

    def merge(self, other: "SegmentationAccumulator") -> None:
        """Add all samples of `other`."""
        for group, scores in other._scores.items():
            self._scores.setdefault(group, []).extend(scores)

    def regrouped(self, key: Callable[[Hashable], Hashable]) -> "SegmentationAccumulator":
        """The same samples under the groups `key(group)`.

        With `group=(source, kind)` for instance, `regrouped(lambda group: group[0])` has them by source.
        """
        other = SegmentationAccumulator()
        for group, scores in self._scores.items():
            other._scores.setdefault(key(group), []).extend(scores)
        return other

    @property
    def groups(self) -> list[Hashable]:
        """Groups seen so far, in order of appearance."""
        return list(self._scores)

    def scores(self, *groups: Hashable) -> list[SampleScore]:
        """Scores of the given groups, of all samples without arguments."""
        return [score for group in groups or self._scores for score in self._scores.get(group, ())]

    def __len__(self) -> int:
        return sum(map(len, self._scores.values()))

    def __iter__(self) -> Iterator[SampleScore]:
        return iter(self.scores())

    def compute(self, *groups: Hashable, names: str | Sequence[str] = METRIC_NAMES) -> dict[str, float]:
        """Metrics over the given groups, over all samples without arguments; see `metrics_of_scores`."""
        return metrics_of_scores(self.scores(*groups), names)

    def compute_by_group(self, names: str | Sequence[str] = METRIC_NAMES) -> dict[Hashable, dict[str, float]]:
        """Metrics of each group on its own."""
        return {group: metrics_of_scores(scores, names) for group, scores in self._scores.items()}


def segmentation_metrics(
    predictions: Sequence[Any], references: Sequence[Any], ignore: Sequence[Any] | None = None
) -> dict[str, float]:
    """Metrics of generalised referring segmentation over a list of samples.

    Per sample, the union of the predicted masks is compared with the union of the target masks.

    - `gIoU`: mean of the samples' IoU; an empty prediction for an empty target counts 1, any prediction for it 0.
    - `cIoU`: sum of intersections over sum of unions.
    - `N-acc`: share of no-target samples with an empty prediction.
    - `T-acc`: share of target samples with a non-empty prediction.

    A sample whose target is ignored as a whole has no part in any of them.

    A figure without any sample or pixel to be wrong about is 1 (N-acc where every sample has a target, T-acc where
    none has, cIoU where nothing is there and nothing is predicted): report it with the number of samples it stands on.

    Args:
        predictions (`Sequence` of boolean arrays `(height, width)` or `(num_masks, height, width)`): One entry per
            sample, at the original image size.
        references (`Sequence` of the same form): Targets; no positive pixel means no target.
        ignore (`Sequence` of arrays or `None`, *optional*): Per sample the pixels left out, or `None`.

    Returns:
        `dict[str, float]`: `gIoU`, `cIoU`, `N-acc`, `T-acc`, all in [0, 1].

    Raises:
        ValueError: without samples, if the lengths differ, or for masks that do not fit each other.
    """
    if ignore is None:
        ignore = [None] * len(references)
    if not len(predictions) == len(references) == len(ignore):
        raise ValueError(
            f"got {len(predictions)} predictions, {len(references)} references and {len(ignore)} ignore masks; "
            "pass one of each per sample (ignore may hold None)"
        )
    scores = []
    for index, (prediction, reference, ignored) in enumerate(zip(predictions, references, ignore, strict=True)):
        try:
            scores.append(score_sample(prediction, reference, ignored))
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from error
    return metrics_of_scores(scores)


def metrics_of_scores(scores: Iterable[SampleScore], names: str | Sequence[str] = METRIC_NAMES) -> dict[str, float]:
    """Metrics from per-sample counts; see `segmentation_metrics` for the first four.

    `precision@t` is the share of target samples whose IoU is at least `t`: as in GRES, samples without target have no
    part in it (N-acc speaks of them).

    Args:
        scores (iterable of `SampleScore`): At least one.
        names (`str` or `Sequence[str]`, *optional*): Of `METRIC_NAMES`, or `precision@t` with any `t` in (0, 1];
            `ALL_METRIC_NAMES` has the usual three.

    Returns:
        `dict[str, float]`: in the order of `names`, all in [0, 1]; 1 where no sample or pixel bears on a figure.

    Raises:
        ValueError: without samples, or for a name that is not known.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("got 0 samples; a metric needs at least one")
    values = {}
    for name in metric_names(names):
        if name == "cIoU":
            union = sum(score.union for score in scores if not score.left_out)
            values[name] = sum(score.intersection for score in scores) / union if union else 1.0
        else:
            outcome = _outcome_of(name)
            outcomes = [value for value in map(outcome, scores) if value is not None]
            # fsum is exact before rounding, so the order of samples cannot show.
            values[name] = math.fsum(outcomes) / len(outcomes) if outcomes else 1.0
    return values


def num_bearing_samples(scores: Iterable[SampleScore], name: str) -> int:
    """How many samples bear on a metric: those without target on N-acc, those with one on T-acc and precision, none
    that is left out."""
    outcome = _outcome_of("gIoU" if name == "cIoU" else name)
    return sum(outcome(score) is not None for score in scores)


def metric_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of metrics; a text is one."""
    return (names,) if isinstance(names, str) else tuple(names)


def _outcome_of(name: str) -> Callable[[SampleScore], float | None]:
    """What a sample adds to the metric `name`, a mean; `None` where the sample has no part in it."""
    if name == "gIoU":
        return lambda score: None if score.left_out else score.iou
    if name == "N-acc":
        return lambda score: None if score.target_pixels or score.left_out else float(score.predicted_pixels == 0)
    if name == "T-acc":
        return lambda score: float(score.predicted_pixels > 0) if score.target_pixels else None
    threshold = _precision_threshold(name)
    return lambda score: float(score.iou >= threshold) if score.target_pixels else None


def _precision_threshold(name: str) -> float:
    try:
        threshold = float(name.removeprefix("precision@")) if name.startswith("precision@") else math.nan
    except ValueError:
        threshold = math.nan
    if not 0 < threshold <= 1:
        raise ValueError(
            f"{name!r} is no metric; expected one of {METRIC_NAMES}, or precision@t with an IoU t in (0, 1], for "
            "instance 'precision@0.5'"
        )
    return threshold


def bootstrap_intervals(
    scores: Iterable[SampleScore],
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    names: str | Sequence[str] = METRIC_NAMES,
    images: Sequence[Hashable] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of the metrics, resampling whole samples, or images with all of their samples.

    Args:
        scores (iterable of `SampleScore`): For instance a `SegmentationAccumulator`.
        confidence (`float`, *optional*, defaults to 0.95): Share of resamples inside the interval.
        num_resamples (`int`, *optional*, defaults to 1000): Resamples drawn.
        seed (`int`, *optional*, defaults to 0): The same seed and samples give the same intervals.
        names (`str` or `Sequence[str]`, *optional*): As for `metrics_of_scores`. Every metric sees the same resamples.
        images (`Sequence[Hashable]`, *optional*): Of every sample which image it asks about. Samples of an image are
            drawn together, for they are right and wrong together: without it, intervals are too narrow where images
            have several.

    Returns:
        `dict[str, tuple[float, float]]`: lower and upper bound in [0, 1]; (0, 1) where no sample bears on a metric.

    Raises:
        ValueError: without samples, for a confidence outside (0, 1), for a name that is not known, or where `images`
            are not as many as the samples.
    """
    scores = list(scores)
    images = images_of(len(scores), images)
    judged = [(score, image) for score, image in zip(scores, images, strict=True) if not score.left_out]
    if scores and not judged:
        return dict.fromkeys(metric_names(names), (0.0, 1.0))
    counts = np.array([score for score, _ in judged], dtype=np.int64).reshape(-1, 4)
    found = [_terms(name, counts) for name in metric_names(names)]
    columns = sums_by_image(np.column_stack([*sum(found, ()), counts]), [image for _, image in judged])
    terms = {name: tuple(columns.T[2 * i : 2 * i + 2]) for i, name in enumerate(metric_names(names))}
    intervals = bootstrap_ratios(terms, len(columns), confidence, num_resamples, seed)
    return {name: bounds or (0.0, 1.0) for name, bounds in intervals.items()}


def _terms(name: str, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each sample adds to numerator and denominator of a metric, `(num_samples,)` each."""
    if name == "cIoU":
        return counts[:, 0], counts[:, 1]
    outcomes = [_outcome_of(name)(SampleScore(*row)) for row in counts.tolist()]
    return np.array([value or 0.0 for value in outcomes]), np.array([value is not None for value in outcomes])
