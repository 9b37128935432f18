# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Plots of one evaluation: how IoU is spread, and gIoU by kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figure import INK, error_sizes, new_figure, write_figure
from ..printable import printable
from .records import score_of

TARGET_COLOUR, NO_TARGET_COLOUR = "#2A9DF4", "#E8910C"


def draw_plots(output_dir: Path, figures: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """Write `iou_histogram.png`, and `giou_by_kind.png` where there is more than one kind.

    Returns:
        `list[str]`: the names of the files.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure((6.4, 3.6), dpi=120, layout="constrained")
    _histogram(figure.subplots(), figures, records)
    write_figure(figure, output_dir / "iou_histogram.png")
    names = ["iou_histogram.png"]
    if len(figures["by_kind"]) > 1:
        figure = new_figure((6.4, 1.2 + 0.36 * len(figures["by_kind"])), dpi=120, layout="constrained")
        _bars(figure.subplots(), figures)
        write_figure(figure, output_dir / "giou_by_kind.png")
        names.append("giou_by_kind.png")
    return names


def iou_histogram(records: Sequence[dict[str, Any]], num_bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Samples per bin of IoU, bins of equal width over [0, 1], the last one with its upper end; none that is left out.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: of samples with and without target, `(num_bins,)` each.
    """
    counts = np.zeros((2, num_bins), dtype=int)
    for record in records:
        score = score_of(record)
        if score.left_out:
            continue
        # Integers, for 3 / 5 * 20 is a little less than 12.
        place = score.intersection * num_bins // score.union if score.union else num_bins
        counts[int(score.target_pixels == 0), min(place, num_bins - 1)] += 1
    return counts[0], counts[1]


def _histogram(axes: Any, figures: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    target, no_target = iou_histogram(records)
    left, width = np.arange(len(target)) / len(target), 1 / len(target)
    axes.bar(left, target, width, align="edge", color=TARGET_COLOUR, edgecolor="white", label="with target")
    if no_target.any():
        axes.bar(left, no_target, width, target, align="edge", color=NO_TARGET_COLOUR, edgecolor="white", label="none")
        axes.legend(frameon=False)
    giou = figures["metrics"]["gIoU"]["value"]
    axes.axvline(giou, color=INK, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), xlabel=f"IoU of a sample (gIoU {giou:.3f})", ylabel="samples")
    axes.set_title(f"{figures['predictor']} on {figures['dataset']}", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, figures: dict[str, Any]) -> None:
    kinds = list(figures["by_kind"])[::-1]  # bars are drawn upwards
    giou = [figures["by_kind"][kind]["gIoU"] for kind in kinds]
    values, errors = error_sizes(giou)
    names = [printable(kind).replace("$", r"\$") for kind in kinds]  # two of them would make a formula
    labels = [f"{name} ({figure['num_samples']})" for name, figure in zip(names, giou, strict=True)]
    axes.barh(labels, values, xerr=errors, color=TARGET_COLOUR, ecolor=INK, capsize=3)
    axes.set(xlim=(0, 1), xlabel="gIoU, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
