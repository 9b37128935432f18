# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""An explanation as one figure: the answer above, and under it one row per mask with the concepts behind it."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from ...figure import (
    FONT_SIZE,
    INK,
    MUTED,
    PANEL,
    TEXT_WIDTH,
    SegmentationRow,
    draw_picture,
    draw_row,
    figure_of_rows,
    outline,
    row_height,
    slot_colour,
    tidy,
)
from .payload import spell

MAX_BARS = 10  # concepts of a mask
AGAINST = "#8A8F9C"
LABEL_LENGTH = 26  # characters


def plot(explanation: Any) -> Any:
    """Draw an explanation.

    Above: image, masks, every slot's heatmap, the reasoning. Then for every mask: the patches that its concepts read,
    its first concepts with their signed shares, and the words that they read. A patch or word is the brighter, the
    larger the sum of |contribution| of the listed concepts there.

    Args:
        explanation ([`Explanation`]): From [`explain`].

    Returns:
        `matplotlib.figure.Figure`: Not tied to any window; a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
        ImportError: without matplotlib.
    """
    answer = _answer(explanation)
    heights = [row_height(answer)] * (1 + len(explanation.masks))
    figure, strips = figure_of_rows(heights)
    draw_row(strips[0], answer, heights[0])
    for strip, mask, height in zip(strips[1:], explanation.masks, heights[1:], strict=True):
        grid = strip.add_gridspec(
            1,
            3,
            width_ratios=[PANEL, 2 * PANEL, TEXT_WIDTH],
            left=0.012,
            right=0.988,
            bottom=0.28 / height,
            top=1 - 0.28 / height,
            wspace=0.04,
        )
        weights = token_weights(mask)
        _draw_patches(strip.add_subplot(grid[0]), explanation, mask, weights)
        _draw_shares(strip, grid[1], mask)
        _draw_words(strip.add_subplot(grid[2]), explanation, mask, weights)
    return figure


def token_weights(mask: Any) -> dict[int, float]:
    """How much each token was read for a mask: |contribution| summed over the listed concepts, over the largest."""
    sums: dict[int, float] = {}
    for concept in mask.concepts:
        for token in concept.tokens:
            sums[token.position] = sums.get(token.position, 0.0) + abs(token.contribution)
    top = max(sums.values(), default=0.0)
    return {position: value / top for position, value in sums.items()} if top > 0 else {}


def _answer(explanation: Any) -> SegmentationRow:
    kept = [mask for mask in explanation.masks if mask.kept]
    size = explanation.image.size[::-1]
    return SegmentationRow(
        image=explanation.image,
        instruction=explanation.instruction,
        reasoning=explanation.reasoning,
        masks=np.stack([mask.mask for mask in kept]) if kept else np.zeros((0, *size), dtype=bool),
        scores=np.array([mask.score for mask in kept]),
        slots=np.array([mask.slot for mask in kept], dtype=int),
        heatmaps=np.asarray(explanation.heatmaps),
        confidences=np.asarray(explanation.slot_scores),
    )


def _draw_patches(axes: Any, explanation: Any, mask: Any, weights: dict[int, float]) -> None:
    """The picture in the dark, lit where the mask's concepts were read."""
    pixels = np.asarray(explanation.image.convert("RGB"), dtype=np.float32) / 255
    light = np.full(pixels.shape[:2], 0.25, dtype=np.float32)
    for token in explanation.tokens:
        if token.patch is not None and weights.get(token.position):
            x0, y0, x1, y1 = token.patch
            light[y0:y1, x0:x1] = 0.35 + 0.65 * weights[token.position]
    shown = "patches its concepts read" if explanation.places_known else "places of patches not known"
    draw_picture(axes, pixels * light[..., None], f"slot {mask.slot}: {shown}")
    outline(axes, mask.mask, slot_colour(mask.slot), linewidths=1.6, linestyles="solid" if mask.kept else "dotted")


def _draw_shares(strip: Any, cell: Any, mask: Any) -> None:
    concepts = mask.concepts[:MAX_BARS]
    # Labels stand left of the bars, in a part of the panel of their own; the title needs both parts.
    labels, bars = 0.36, 0.64
    axes = strip.add_subplot(cell.subgridspec(1, 2, width_ratios=[labels, bars], wspace=0)[1])
    what = "slot logit" if mask.target == "slot_logit" else "mask logit"
    of = f"share of the {what}'s change" if mask.in_shares else f"contribution to the {what}"
    title = f"{len(concepts)} of {max(mask.num_concepts, len(mask.concepts))} concepts: {of}"
    some_measured = any(concept.measured for concept in mask.concepts)
    shared = [some_measured and not concept.measured for concept in concepts]
    if any(shared):
        title += "; hatched: shared out by gradients"
    axes.set_title(title, x=-labels / bars, fontsize=FONT_SIZE, color=MUTED, loc="left", pad=4)
    places = np.arange(len(concepts))
    if mask.in_shares:
        sizes = [100 * concept.share for concept in concepts]
        texts = [f"{size:+.1f} %" for size in sizes]
    else:
        sizes = [concept.contribution for concept in concepts]
        texts = [f"{size:+.2f}" for size in sizes]
    colours = [slot_colour(mask.slot) if concept.direction == "for" else AGAINST for concept in concepts]
    drawn = axes.barh(places, sizes, height=0.62, color=colours)
    for bar, is_shared in zip(drawn, shared, strict=True):
        if is_shared:
            bar.set(hatch="////", edgecolor="white", linewidth=0)
    axes.bar_label(drawn, texts, padding=3, fontsize=FONT_SIZE - 2, color=INK)
    axes.set_yticks(places, [_name(concept) for concept in concepts], fontsize=FONT_SIZE - 1, color=INK)
    axes.set_ylim(max(len(concepts), 4) - 0.4, -0.6)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.margins(x=0.2)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _name(concept: Any) -> str:
    text = tidy(concept.label) if concept.label else f"concept {concept.feature}"
    return textwrap.shorten(text, LABEL_LENGTH, placeholder=" …").replace("$", r"\$")


def _draw_words(axes: Any, explanation: Any, mask: Any, weights: dict[int, float]) -> None:
    """Instruction and reasoning, set word by word, each on its tint; what does not fit is cut."""
    from matplotlib.colors import to_rgb

    axes.axis("off")
    axes.set_title("words they read", x=0.045, fontsize=FONT_SIZE, color=MUTED, loc="left", pad=4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    accent = np.asarray(to_rgb(slot_colour(mask.slot)))
    renderer = axes.figure.canvas.get_renderer()
    box = axes.get_window_extent(renderer)
    line = 1.75 * FONT_SIZE * axes.figure.dpi / 72 / box.height  # of axes units
    top = 1.0
    for kind, text in (("question", explanation.instruction), ("reasoning", explanation.reasoning)):
        left = 0.045
        for _, position, word in spell([token for token in explanation.tokens if token.kind == kind], text):
            level = weights.get(position, 0.0)
            style = {"facecolor": tuple(1 - 0.6 * level * (1 - accent)), "edgecolor": "none", "pad": 1.2}
            shown = axes.text(left, top, tidy(word).replace("$", r"\$"), va="top", fontsize=FONT_SIZE, color=INK)
            width = shown.get_window_extent(renderer).width / box.width
            if left + width > 1 and left > 0.045:
                left, top = 0.045, top - line
                shown.set_position((left, top))
            if level > 0.02:
                shown.set_bbox(style)
            if top - line < 0:
                shown.set_text("…")
                return
            left += width + 0.45 * FONT_SIZE * axes.figure.dpi / 72 / box.width
        top -= 1.5 * line
