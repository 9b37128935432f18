# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""gIoU, cIoU, N-acc, T-acc and precision at an IoU for `evaluate.load`; needs segcompass_hf, which defines them.

`evaluate` looks for missing packages in the lines that begin with an import: one package per line.
"""

import datasets
import evaluate
import numpy as np

from segcompass_hf.data.schema import check_mask_pixels, decode_mask, rle_runs
from segcompass_hf.metrics import (
    ALL_METRIC_NAMES,
    LeftOutScore,
    SampleScore,
    breakdown,
    metrics_of_scores,
    metrics_with_intervals,
    score_sample,
)

_DESCRIPTION = """
Metrics of (generalised) referring and reasoning segmentation. Per sample, the union of the predicted masks is compared
with the union of the target masks. gIoU: mean of the samples' IoU, where an empty prediction for an empty target
counts 1; cIoU: summed intersection over summed union; N-acc and T-acc: share of samples without and with target
recognised as such; precision@t: share of target samples with an IoU of at least t.
"""

_KWARGS_DESCRIPTION = """
Of each sample only four integers and a flag are kept, so batches may be added of masks of any size and number, and the
figures of several processes (`num_process`, `process_id`) are those of one.

Args:
    predictions: per sample the predicted masks: an array `(height, width)` or `(num_masks, height, width)` of 0 and 1,
        or COCO run-length encodings (a dict with `size` and `counts`, compressed or not, or a list of such); `[]` says
        that there is nothing.
    references: per sample the target masks, in the same forms and size.
    ignore: per sample the pixels left out, in the same forms, or `None` (`compute`, `add_batch`; optional). A sample
        whose target is ignored as a whole has no part in any metric.
    groups: per sample a text such as its kind, by which figures are broken down (`compute`, `add_batch`; optional).
    metrics: names of the metrics, or one name (`compute`; gIoU, cIoU, N-acc, T-acc, precision@0.5, precision@0.7,
        precision@0.9).
    intervals: also give 95 % bootstrap intervals (`compute`; False).

Returns:
    by name the metrics in [0, 1]; with `intervals` also `intervals`: by name `value`, `low`, `high`, `num_samples`;
    with groups also `by_group`: by group what `intervals` holds, samples without group under "".

Examples:
    >>> metric = evaluate.load(path)
    >>> metric.add_batch(predictions=[[[1, 1], [0, 0]]], references=[[[1, 0], [0, 0]]])
    >>> metric.compute(metrics=["gIoU"])
    {'gIoU': 0.5}
"""

_CITATION = """
@inproceedings{liu2023gres,
  title = {{GRES}: Generalized Referring Expression Segmentation},
  author = {Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle = {CVPR},
  year = {2023}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Segmentation(evaluate.Metric):
    def _info(self):
        prediction = {"intersection": datasets.Value("int64"), "pixels": datasets.Value("int64")}
        reference = {
            "union": datasets.Value("int64"),
            "pixels": datasets.Value("int64"),
            "left_out": datasets.Value("bool"),
            "group": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": prediction, "references": reference}),
            reference_urls=["https://arxiv.org/abs/2306.00968"],
        )

    def add(self, *, prediction=None, reference=None, ignore=None, group=None):
        """Add one sample."""
        self.add_batch(predictions=[prediction], references=[reference], ignore=[ignore], groups=[group])

    def add_batch(self, *, predictions=None, references=None, ignore=None, groups=None):
        """Add a batch of samples."""
        columns = {"predictions": predictions, "references": references}
        missing = [name for name, column in columns.items() if column is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} are missing; pass predictions and references.")
        nothing = [None] * len(references)
        columns |= {"ignore": nothing if ignore is None else ignore, "groups": nothing if groups is None else groups}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the batch's columns differ in length: {lengths}; pass one of each per sample.")
        counted = [_score(index, *sample) for index, sample in enumerate(zip(*columns.values(), strict=True))]
        groups = ["" if group is None else str(group) for group in columns["groups"]]  # a column of texts has no None
        super().add_batch(
            predictions=[{"intersection": score.intersection, "pixels": score.predicted_pixels} for score in counted],
            references=[
                {
                    "union": score.union,
                    "pixels": score.target_pixels,
                    "left_out": score.left_out,
                    "group": group,
                }
                for score, group in zip(counted, groups, strict=True)
            ],
        )

    def compute(self, *, predictions=None, references=None, ignore=None, groups=None, **kwargs):
        """Add the samples given, if any, and compute the metrics of all that were added."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, ignore=ignore, groups=groups)
        return super().compute(**kwargs)

    def _compute(self, predictions, references, metrics=ALL_METRIC_NAMES, intervals=False):
        scores = [
            (LeftOutScore if reference["left_out"] else SampleScore)(
                prediction["intersection"], reference["union"], prediction["pixels"], reference["pixels"]
            )
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        groups = [reference["group"] for reference in references]
        result = metrics_of_scores(scores, metrics)
        if intervals:
            result["intervals"] = metrics_with_intervals(scores, metrics)
        if any(groups):
            result["by_group"] = breakdown(scores, groups, names=metrics)
        return result


def _score(index, prediction, reference, ignore, group):
    try:
        return score_sample(_masks(prediction), _masks(reference), None if ignore is None else _masks(ignore))
    except ValueError as error:
        raise ValueError(f"sample {index} of the batch: {error}") from error


def _masks(masks):
    """An array of masks as it is, run-length encodings decoded."""
    if isinstance(masks, dict):
        return decode_mask(masks)
    if isinstance(masks, (list, tuple)) and masks and isinstance(masks[0], dict):
        check_mask_pixels(len(masks), *rle_runs(masks[0])[0])
        return np.stack([decode_mask(mask) for mask in masks])
    return masks
