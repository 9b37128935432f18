# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Drift: whether the concepts in use are still those of a reference set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..concept_names_segcompass import is_same_sketch, sae_sketch
from ..files import write_whole
from ..modeling_concepts import SparseConcepts

FORMAT = "segcompass-drift-1"
MIN_SAMPLES = 8  # of a reference or a window, below which histograms are mostly chance
ROWS_AT_ONCE = 2**22  # numbers of resampled histograms held at a time, 32 MB


@dataclass
class ConceptChange:
    """A feature whose share of the concepts in use has changed.

    Args:
        feature (`int`): Its id.
        before, now (`float`): Its share in the reference and in the window, in [0, 1].
        part (`float`): Its part of the divergence, in [0, 1]; those of all features add up to 1.
        label (`str`, *optional*): Its name.
    """

    feature: int
    before: float
    now: float
    part: float
    label: str | None = None


@dataclass
class DriftReport:
    """How far a window of samples is from the reference.

    Args:
        distance (`float`): Jensen-Shannon distance of the two histograms, in [0, 1] (logarithms to base 2).
        threshold (`float`): What the share `confidence` of resamples of the reference stays below.
        p_value (`float`): Share of resamples at this distance or above; the smallest that can be had is
            `1 / (num_resamples + 1)`.
        drifted (`bool`): Whether the distance is above the threshold.
        num_samples, num_reference (`int`): Samples of the window, and of the reference.
        changes (`list[ConceptChange]`): Features with the largest part, first.
    """

    distance: float
    threshold: float
    p_value: float
    drifted: bool
    num_samples: int
    num_reference: int
    changes: list[ConceptChange]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def concept_histograms(concepts: SparseConcepts, d_sae: int) -> np.ndarray:
    """Which concepts every sample of a batch uses: float32 `(batch_size, d_sae)`.

    A feature counts once per token on which it is active; a sample's counts are divided by their sum, so that long
    answers weigh no more than short ones. A sample without an active concept is all 0.
    """
    rows = concepts.token_index // concepts.sequence_length
    counts = torch.bincount(rows * d_sae + concepts.features, minlength=concepts.batch_size * d_sae)
    counts = counts.view(concepts.batch_size, d_sae).float()
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()


def js_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance of histograms `(..., n)`, each of which sums to 1: `sqrt(JSD)` to base 2, in [0, 1].

    ```python
    >>> js_distance(np.array([1.0, 0.0]), np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.0, 1.0]
    ```
    """
    return np.sqrt(_divergence(first, second).sum(-1).clip(0, 1))


def _divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What each bin adds to the Jensen-Shannon divergence, in bits."""
    middle = (first + second) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(side > 0, side * np.log2(side / middle), 0.0) for side in (first, second)]
    return (parts[0] + parts[1]) / 2


class DriftMonitor:
    """Compares the concepts that a model uses with those it used on a reference set.

    The histogram of a set is the mean of those of its samples. How far apart two sets of the same kind may be is
    learnt from the reference: it is drawn anew, whole samples with replacement, once in its own size and once in that
    of the window, and the distance of the two is taken, many times.

    ```python
    >>> monitor = DriftMonitor(model)  # doctest: +SKIP
    >>> monitor.add_reference(model.segment(**inputs, output_concepts=True).concepts)  # doctest: +SKIP
    >>> monitor.save("reference.safetensors")  # doctest: +SKIP
    >>> monitor.check(new_histograms).drifted  # doctest: +SKIP
    ```

    Args:
        model (`SegCompassForReasoningSegmentation`): Whose concepts are meant.
        reference (`np.ndarray` of shape `(num_samples, d_sae)`, *optional*): Histograms of a reference set.
    """

    def __init__(self, model: Any, reference: np.ndarray | None = None):
        self.d_sae, self.sketch = model.config.sae_config.d_sae, sae_sketch(model.sae)
        empty = np.zeros((0, self.d_sae), np.float32)
        self.reference = self._checked(empty if reference is None else reference, "the reference")

    def _checked(self, histograms: np.ndarray, what: str) -> np.ndarray:
        histograms = np.asarray(histograms, dtype=np.float32)
        if histograms.ndim != 2 or histograms.shape[1] != self.d_sae:
            raise ValueError(
                f"{what} has histograms of shape {histograms.shape}; expected (num_samples, {self.d_sae}), from "
                "concept_histograms."
            )
        return histograms

    def histograms(self, concepts: SparseConcepts) -> np.ndarray:
        """[`concept_histograms`] of a batch, from `segment(..., output_concepts=True).concepts`."""
        return concept_histograms(concepts, self.d_sae)

    def add_reference(self, concepts: SparseConcepts) -> None:
        """Add the samples of a batch to the reference."""
        self.reference = np.concatenate([self.reference, self.histograms(concepts)])

    def check(
        self,
        window: np.ndarray,
        confidence: float = 0.99,
        num_resamples: int = 500,
        seed: int = 0,
        dictionary: Any = None,
        num_changes: int = 10,
    ) -> DriftReport:
        """Compare a window of samples with the reference.

        Args:
            window (`np.ndarray` of shape `(num_samples, d_sae)`): From [`~DriftMonitor.histograms`].
            confidence (`float`, defaults to 0.99): Share of windows of the reference's own kind that pass.
            num_resamples (`int`, defaults to 500): Resamples that the threshold is derived from.
            seed (`int`, defaults to 0): Of the resamples.
            dictionary ([`ConceptDictionary`], *optional*): Names the features.
            num_changes (`int`, defaults to 10): Features listed.

        Raises:
            ValueError: Too few samples in the reference or the window, another number of features, or a confidence
                that the number of resamples cannot show.
        """
        window = self._checked(window, "the window")
        for what, samples in (("the reference", self.reference), ("the window", window)):
            if len(samples) < MIN_SAMPLES:
                raise ValueError(f"{what} has {len(samples)} samples; at least {MIN_SAMPLES} are needed.")
        if not 0 < confidence < 1 or (1 - confidence) * (num_resamples + 1) < 1:
            raise ValueError(
                f"confidence={confidence} cannot be told from {num_resamples} resamples; expected a share below 1, "
                "and at least 1 / (1 - confidence) resamples."
            )
        before, now = _normalized(self.reference.mean(0)), _normalized(window.mean(0))
        distance = float(js_distance(before, now))
        resampled = self._resampled(len(window), num_resamples, seed)
        threshold = float(np.quantile(resampled, confidence, method="higher"))
        p_value = (1 + int((resampled >= distance).sum())) / (num_resamples + 1)
        parts = _divergence(before, now)
        parts = parts / max(parts.sum(), 1e-12)
        largest = np.argsort(-parts, kind="stable")[:num_changes]
        changes = [
            ConceptChange(
                feature,
                float(before[feature]),
                float(now[feature]),
                float(parts[feature]),
                None if dictionary is None else dictionary.said(feature)[0],
            )
            for feature in largest[parts[largest] > 0].tolist()
        ]
        sizes = len(window), len(self.reference)
        return DriftReport(distance, threshold, p_value, distance > threshold, *sizes, changes)

    def _resampled(self, window_size: int, num_resamples: int, seed: int) -> np.ndarray:
        """Distances of windows of the reference's own kind, `(num_resamples,)`."""
        used = self.reference[:, self.reference.any(0)].astype(np.float64)  # features that never fire add nothing
        generator, size = np.random.default_rng(seed), len(used)
        chances, distances, left = np.full(size, 1 / size), [], num_resamples
        while left > 0:
            count = min(left, max(1, ROWS_AT_ONCE // max(used.shape)))
            sides = [generator.multinomial(n, chances, count) @ used for n in (size, window_size)]
            distances.append(js_distance(*map(_normalized, sides)))
            left -= count
        return np.concatenate(distances)

    def save(self, path: str | os.PathLike) -> None:
        """Write the reference into one file."""
        samples, features = np.nonzero(self.reference)
        arrays = {
            "samples": samples.astype(np.int32),
            "features": features.astype(np.int32),
            "values": self.reference[samples, features],
            "sae_sketch": self.sketch,
        }
        header = {"format": FORMAT, "num_samples": str(len(self.reference))}
        write_whole(path, save(arrays, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any) -> DriftMonitor:
        """Read a reference.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or of another SAE than the model's.
        """
        try:
            with safe_open(path, "np") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in ("samples", "features", "values", "sae_sketch")}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
            monitor = cls(model)
            if is_same_sketch(monitor.sketch, arrays["sae_sketch"]):
                reference = np.zeros((int(header["num_samples"]), monitor.d_sae), np.float32)
                reference[arrays["samples"], arrays["features"]] = arrays["values"]
                monitor.reference = reference
                return monitor
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no reference of a drift monitor, or damaged ({error})."
            ) from error
        raise ValueError(
            f"{os.fspath(path)!r} is a reference of another SAE, whose features mean other things; make one with this "
            "model."
        )


def _normalized(sums: np.ndarray) -> np.ndarray:
    """Histograms `(..., n)` that sum to 1."""
    return sums / sums.sum(-1, keepdims=True).clip(1e-12)


def histograms_of_rows(predictor: Any, rows: Iterable[dict[str, Any]], batch_size: int = 8) -> np.ndarray:
    """Which concepts a model uses while it answers rows: `(num_rows, d_sae)`.

    Args:
        predictor (`ModelPredictor`): The model with its processor, made with `output_concepts=True`.
        rows (`Iterable[dict]`): In the row schema.
        batch_size (`int`, defaults to 8): Rows at a time.
    """
    d_sae, rows = predictor.model.config.sae_config.d_sae, iter(rows)
    parts = [np.zeros((0, d_sae), np.float32)]
    while batch := list(islice(rows, batch_size)):
        output, _, _ = predictor.segment(batch)
        parts.append(concept_histograms(output.concepts, d_sae))
    return np.concatenate(parts)


__all__ = ["ConceptChange", "DriftMonitor", "DriftReport", "concept_histograms", "histograms_of_rows", "js_distance"]
