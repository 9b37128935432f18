# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The claims as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from ...figure import INK, error_sizes, new_figure
from ...pages import markdown_table
from .measure import ClaimRecord

RULES = {
    "activation": "sum of activations",
    "features": "number of active features",
    "others": "other objects, by sum of activations",
}
COLOURS = {"activation": "#2A9DF4", "features": "#7B5CD6", "others": "#E8910C", "random": "#8A8F98"}


def claims_markdown(figures: dict[str, Any]) -> str:
    """Every claim with its figures, 95 % intervals in brackets.

    Args:
        figures (`dict`): From `claims_figures`.
    """
    samples = figures["samples"]
    per_token = [
        [place, _shown(figure, 2), figure["num_tokens"], figure["num_samples"]]
        for place, figure in figures["features_per_token"].items()
    ]
    more = [[pair, _shown(figure, 2)] for pair, figure in figures["more_features"].items()]
    pairs = {f"SAE error ({tokens} tokens), Dice loss": f for tokens, f in figures["error_and_dice"].items()}
    pairs |= {f"heatmap IoU, mask IoU ({name} slots)": f for name, f in figures["heatmap_and_mask"].items()}
    correlations = [
        [name, figure["num_pairs"], _shown(figure["pearson"]), _shown(figure["spearman"])]
        for name, figure in pairs.items()
    ]
    parts = [
        f"{samples['all']} samples, {samples['with_target']} with a target ({samples['objects']} objects), "
        f"{samples['without_kept_slot']} of them without a kept slot; gIoU {_shown(figures['iou'])}.",
        "**(a) Active features per token**",
        markdown_table(["tokens", "features per token", "tokens", "samples"], per_token),
        markdown_table(["difference", "features per token"], more),
        "**(b) Share of the instance's pixels in the top k % of the image tokens**",
        *_coverage_parts(figures["coverage"]),
        "**(c), (d) Correlations**",
        markdown_table(["pair", "n", "Pearson", "Spearman"], correlations),
    ]
    return "\n\n".join(parts) + "\n"


def _coverage_parts(coverage: dict[str, Any] | None) -> list[str]:
    if coverage is None:
        return ["No sample has a target that the model sees."]
    rules = [rule for rule in RULES if rule in coverage]
    curves = [
        [percent, *(_shown(coverage[rule][place]) for rule in rules), f"{coverage['random'][place]:.3f}"]
        for place, percent in enumerate(coverage["percent"])
    ]
    names = {rule: f"{RULES[rule]}, less random" for rule in rules}
    names |= {"activation - others": "the instance less other objects, both by sum of activations"}
    areas = [[names[name], _shown(figure)] for name, figure in coverage["area"].items()]
    return [
        markdown_table(["k %", *(RULES[rule] for rule in rules), "random"], curves),
        markdown_table(["mean over the curve", ""], areas),
    ]


def _shown(figure: dict[str, Any], digits: int = 3) -> str:
    if figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def plot_claims(figures: dict[str, Any], records: Sequence[ClaimRecord]) -> Any:
    """Four panels, one per claim.

    Args:
        figures (`dict`): From `claims_figures`.
        records (`Sequence[ClaimRecord]`): The samples, for the points.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure((10, 7.6), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2)
    _bars(panels[0, 0], figures["features_per_token"])
    _curves(panels[0, 1], figures["coverage"])
    with_target = [record for record in records if record.dice_loss is not None]
    _points(
        panels[1, 0],
        [(record.sae_error["all"], cast(float, record.dice_loss)) for record in with_target],
        figures["error_and_dice"]["all"],
        ("SAE error (share of the squared norm)", "Dice loss of the masks"),
    )
    _points(
        panels[1, 1],
        [(o["heatmap_iou"], o["mask_iou"]) for record in with_target for o in record.objects],
        figures["heatmap_and_mask"]["all"],
        ("heatmap IoU", "mask IoU"),
    )
    for letter, axes in zip("abcd", panels.flat, strict=True):
        axes.set_title(f"({letter})", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bars(axes: Any, places: dict[str, Any]) -> None:
    known = {place: figure for place, figure in places.items() if figure["value"] is not None}
    values, errors = error_sizes(list(known.values()))
    axes.bar(list(known), values, yerr=errors, color=COLOURS["activation"], ecolor=INK, capsize=3)
    axes.set(ylabel="active features per token")


def _curves(axes: Any, coverage: dict[str, Any] | None) -> None:
    axes.set(xlim=(0, 100), ylim=(0, 1), xlabel="top k % of the image tokens", ylabel="share of the pixels covered")
    if coverage is None:
        return
    for rule in (rule for rule in RULES if rule in coverage):
        values, low, high = (
            np.array([point[name] for point in coverage[rule]], dtype=float) for name in ("value", "low", "high")
        )
        axes.plot(coverage["percent"], values, color=COLOURS[rule], label=RULES[rule], marker="o", markersize=3)
        axes.fill_between(coverage["percent"], low, high, color=COLOURS[rule], alpha=0.2, linewidth=0)
    axes.plot(coverage["percent"], coverage["random"], "--", color=COLOURS["random"], label="random")
    axes.legend(frameon=False, fontsize=8)


def _points(axes: Any, points: list[tuple[float, float]], figure: dict[str, Any], labels: tuple[str, str]) -> None:
    axes.set(xlabel=labels[0], ylabel=labels[1])
    if points:
        axes.scatter(*np.array(points).T, s=9, alpha=0.4, color=COLOURS["activation"], linewidths=0)
    axes.text(0.03, 0.97, f"R {_shown(figure['pearson'], 2)}", transform=axes.transAxes, va="top", fontsize=9)


__all__ = ["claims_markdown", "plot_claims"]
