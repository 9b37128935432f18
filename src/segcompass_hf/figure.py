# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One row per answer: the image, its masks, every slot's heatmap with its confidence, the reasoning beside them."""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .files import whole_file

SLOT_COLOURS = ("#E8910C", "#2A9DF4", "#12A572", "#D6559E", "#8B5CF6", "#E0452F", "#B8A800", "#4B5563")
INK, MUTED = "#1F2430", "#7A8190"
PANEL = 3.0  # inches, width of a square panel
TEXT_WIDTH = 3.9  # inches
FONT_SIZE = 9.5  # points


@dataclass
class SegmentationRow:
    """What one row of the figure shows.

    Args:
        image (`PIL.Image.Image`): RGB, (width, height) pixels.
        instruction (`str`): The user's words.
        reasoning (`str`): The model's words.
        masks (`np.ndarray` of shape `(num_kept, height, width)`): bool, the slots kept.
        scores (`np.ndarray` of shape `(num_kept,)`): confidences in [0, 1].
        slots (`np.ndarray` of shape `(num_kept,)`): which slot each mask comes from.
        heatmaps (`np.ndarray` of shape `(num_slots, height, width)`): of every slot, in [0, 1].
        confidences (`np.ndarray` of shape `(num_slots,)`): of every slot, in [0, 1].
        true_masks (`np.ndarray` of shape `(num_objects, height, width)`, *optional*): bool, drawn as dashed outlines.
        caption (`str`, *optional*): A line under the reasoning.
        grid (`int`, *optional*): Cells per side of the grid whose names (`a1`, `b1`, ...) the reasoning uses; their
            letters and numbers are put along the image's edges.
    """

    image: Image.Image
    instruction: str
    reasoning: str
    masks: np.ndarray
    scores: np.ndarray
    slots: np.ndarray
    heatmaps: np.ndarray
    confidences: np.ndarray
    true_masks: np.ndarray | None = None
    caption: str = ""
    grid: int | None = None

    @classmethod
    def from_answer(
        cls, image: Image.Image, instruction: str, answer: dict[str, Any], slots: dict[str, Any], **fields: Any
    ) -> SegmentationRow:
        """A row of what the processor makes of an answer.

        Args:
            image (`PIL.Image.Image`): RGB, what was asked about.
            instruction (`str`): The user's words.
            answer (`dict`): One entry of `processor.post_process_segmentation(...)`: the masks that are the answer.
            slots (`dict`): The same entry of `processor.post_process_slots(...)`: every slot.
            fields: `true_masks`, `caption` and `grid`, as above.
        """
        return cls(
            image=image,
            instruction=instruction,
            reasoning=answer["reasoning"],
            masks=np.asarray(answer["masks"]),
            scores=np.asarray(answer["scores"]),
            slots=np.asarray(answer["slots"]),
            heatmaps=np.asarray(slots["heatmaps"]),
            confidences=np.asarray(slots["scores"]),
            **fields,
        )


def plot_segmentations(rows: list[SegmentationRow]) -> Any:
    """Draw answers under one another.

    Args:
        rows (`list[SegmentationRow]`): At least one.

    Returns:
        `matplotlib.figure.Figure`: Not tied to any window; a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
        ImportError: without matplotlib.
    """
    if not rows:
        raise ValueError("got no rows to draw; pass at least one SegmentationRow.")
    heights = [row_height(row) for row in rows]
    figure, strips = figure_of_rows(heights)
    for strip, row, height in zip(strips, rows, heights, strict=True):
        draw_row(strip, row, height)
    return figure


def new_figure(size: tuple[float, float], dpi: float, **options: Any) -> Any:
    """A `matplotlib.figure.Figure` of (width, height) inches that is tied to no window, with a canvas to measure text.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'segcompass_hf[demo]'.") from error
    figure = _inline(Figure)(figsize=size, dpi=dpi, **options)
    FigureCanvasAgg(figure)
    return figure


@functools.cache
def _inline(base: type) -> type:
    """Figures that a notebook shows; matplotlib's own are shown where `pyplot` was imported, and else not."""

    class InlineFigure(base):
        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            self.savefig(written, format="png")
            return written.getvalue()

    return InlineFigure


def figure_of_rows(heights: list[float]) -> tuple[Any, np.ndarray]:
    """A figure wide enough for three panels and text, and its rows, `SubFigure`s of these heights in inches."""
    figure = new_figure((3 * PANEL + TEXT_WIDTH, sum(heights)), dpi=130, facecolor="white")
    return figure, np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))


def error_sizes(figures: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Values `(n,)` of figures with `value`, `low` and `high`, and their error bars below and above, `(2, n)`.

    The interval of a skewed sample may leave out its own mean: no length is below 0.
    """
    values, low, high = (np.array([figure[name] for figure in figures]) for name in ("value", "low", "high"))
    return values, np.clip([values - low, high - values], 0, None)


def row_height(row: SegmentationRow) -> float:
    """Inches of a row: the image's own shape within limits, and a line for titles."""
    return PANEL * float(np.clip(row.image.height / row.image.width, 0.6, 1.5)) + 0.35


def draw_row(strip: Any, row: SegmentationRow, height: float) -> None:
    """Draw one row into a `SubFigure` that is `height` inches high."""
    grid = strip.add_gridspec(
        1,
        4,
        width_ratios=[PANEL, PANEL, PANEL, TEXT_WIDTH],
        left=0.012,
        right=0.988,
        bottom=0.1 / height,
        top=1 - 0.28 / height,
        wspace=0.04,
    )
    pixels = np.asarray(row.image.convert("RGB"))
    axes = strip.add_subplot(grid[0])
    draw_picture(axes, pixels, "image")
    grid_cells = row.grid or 0
    for cell in range(grid_cells):
        centre = (cell + 0.5) / grid_cells
        style = {"transform": axes.transAxes, "color": "white", "alpha": 0.7, "fontsize": 6.5}
        axes.text(centre, 0.01, chr(ord("a") + cell), ha="center", va="bottom", **style)
        axes.text(0.01, 1 - centre, str(cell + 1), ha="left", va="center", **style)
    _draw_masks(strip.add_subplot(grid[1]), pixels, row)
    _draw_heatmaps(strip, grid[2], pixels, row)
    _draw_text(strip.add_subplot(grid[3]), row, height)


def draw_picture(axes: Any, pixels: np.ndarray, title: str, **title_options: Any) -> None:
    """Draw `(height, width, 3)` pixels without axes."""
    smooth = "lanczos" if max(pixels.shape) < 400 else "antialiased"
    axes.imshow(pixels, interpolation=smooth)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, **{"fontsize": FONT_SIZE, "color": MUTED, "loc": "left", "pad": 4, **title_options})


def _draw_masks(axes: Any, pixels: np.ndarray, row: SegmentationRow) -> None:
    from matplotlib.colors import to_rgb

    shown = pixels.astype(np.float32) / 255
    anywhere = row.masks.any(axis=0) if len(row.masks) else np.zeros(pixels.shape[:2], dtype=bool)
    grey = shown.mean(axis=2, keepdims=True)
    shown[~anywhere] = (0.45 * shown + 0.15 * grey + 0.08)[~anywhere]  # what is not meant steps back
    for mask, slot in zip(row.masks, row.slots, strict=True):
        shown[mask] = 0.55 * shown[mask] + 0.45 * np.asarray(to_rgb(slot_colour(slot)))
    count = len(row.masks)
    title = "no object found" if count == 0 else f"{count} mask{'s' if count > 1 else ''}"
    if row.true_masks is not None:
        title += "  (dashed: truth)" if len(row.true_masks) else "  (truth: none)"
    draw_picture(axes, shown.clip(0, 1), title)
    for mask, slot in zip(row.masks, row.slots, strict=True):
        outline(axes, mask, slot_colour(slot), linewidths=1.8)
    for mask in row.true_masks if row.true_masks is not None else ():
        outline(axes, mask, "white", linewidths=1.2, linestyles="dashed")


def outline(axes: Any, mask: np.ndarray, colour: str, **options: Any) -> None:
    """Draw the edge of a mask `(height, width)`."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(np.float32), 1)  # closes the outline of what touches the border
    columns, rows = np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1
    axes.contour(columns, rows, padded, levels=[0.5], colors=[colour], **options)
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _draw_heatmaps(strip: Any, cell: Any, pixels: np.ndarray, row: SegmentationRow) -> None:
    from matplotlib import colormaps

    num_slots = len(row.heatmaps)
    columns = math.ceil(math.sqrt(num_slots))
    lines = math.ceil(num_slots / columns)
    grid = cell.subgridspec(lines, columns, wspace=0.06, hspace=0.22)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True) / 255, 3, axis=2) * 0.75
    kept = {int(slot) for slot in row.slots}
    for slot, (heatmap, confidence) in enumerate(zip(row.heatmaps, row.confidences, strict=True)):
        axes = strip.add_subplot(grid[slot // columns, slot % columns])
        heat = np.nan_to_num(heatmap).clip(0, 1)
        weight = (0.25 + 0.75 * heat)[..., None]
        shown = (1 - weight) * grey + weight * colormaps["inferno"](heat)[..., :3]
        is_kept = slot in kept
        draw_picture(
            axes,
            shown.clip(0, 1),
            f"slot {slot}   {confidence:.2f}" + ("" if is_kept else "  –"),
            fontsize=FONT_SIZE - 2,
            color=slot_colour(slot) if is_kept else MUTED,
            fontweight="bold" if is_kept else "normal",
            pad=2.5,
        )
        for side in axes.spines.values():
            side.set(visible=is_kept, color=slot_colour(slot), linewidth=1.8)


def _draw_text(axes: Any, row: SegmentationRow, height: float) -> None:
    axes.axis("off")
    found = ",  ".join(f"slot {slot} {score:.2f}" for slot, score in zip(row.slots, row.scores, strict=True))
    footer = [f"kept: {found or 'no slot'}", row.caption]
    for font_size in (FONT_SIZE, FONT_SIZE - 1, FONT_SIZE - 2):  # a long text is set smaller before it is cut
        width = int((TEXT_WIDTH - 0.3) * 72 / (0.53 * font_size))  # characters in a line
        capacity = int((height - 0.38) * 72 / (1.42 * font_size))  # lines in the panel
        heading = textwrap.wrap(tidy(row.instruction), int(0.87 * width))[:3]  # bold runs wider
        reasoning = textwrap.wrap(tidy(row.reasoning), width) or ["(no reasoning)"]
        notes = [line for text in footer for line in textwrap.wrap(text, width)]
        room = max(1, capacity - len(heading) - len(notes) - 1)
        if len(reasoning) <= room:
            break
    if len(reasoning) > room:
        reasoning = [*reasoning[: room - 1], reasoning[room - 1][: width - 2] + " …"]

    line, top = 1 / capacity, 1.0  # axes units
    styles = ({"color": INK, "fontweight": "bold"}, {"color": INK}, {"color": MUTED})
    for lines, style in zip((heading, reasoning, notes), styles, strict=True):
        for words in lines:
            # "$" would start mathematics
            words = words.replace("$", r"\$")
            axes.text(0.045, top, words, transform=axes.transAxes, va="top", fontsize=font_size, **style)
            top -= line
        top -= 0.5 * line


def write_figure(figure: Any, path: Path) -> None:
    """Write a `matplotlib.figure.Figure` whole or not at all, in the form that the suffix of `path` names."""
    with whole_file(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())


def tidy(text: str) -> str:
    """Single spaces, none before punctuation (word-level tokenizers put them there), no control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))


def slot_colour(slot: int) -> str:
    """Colour of a slot, the same in every figure and page."""
    return SLOT_COLOURS[int(slot) % len(SLOT_COLOURS)]
