# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A few rows of a data set in one picture: images, outlines of what is meant, instructions."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...figure import INK, MUTED, SLOT_COLOURS
from ...images_segcompass import to_rgb_image
from ..schema import decode_masks

COLUMNS = 4
PANEL = 3.0  # inches, width of a panel
LONGEST_SIDE = 480  # pixels, of an image as drawn
TEXT_LINES = 3


def save_contact_sheet(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw rows, each object meant in a colour of its own; what is to be ignored is hatched in grey.

    Args:
        rows (`list[dict]`): In the row schema.
        path (`Path`): PNG to write.

    Returns:
        `bool`: whether it was drawn; not without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(columns * PANEL, lines * (PANEL + 0.75)), dpi=100, facecolor="white", layout="tight")
    FigureCanvasAgg(figure)
    for index, axes in enumerate(np.ravel(figure.subplots(lines, columns, squeeze=False))):
        axes.set_axis_off()
        if index < len(rows):
            _draw(axes, rows[index])
    figure.savefig(path, metadata={"Software": None})  # without matplotlib's version equal rows give equal files
    return True


def _draw(axes: Any, row: dict[str, Any]) -> None:
    image = to_rgb_image(row["image"])
    size = image.size[::-1]
    scale = min(1.0, LONGEST_SIDE / max(size))
    shape = (max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))  # (width, height)
    axes.imshow(np.asarray(image.resize(shape)))
    for index, mask in enumerate(decode_masks(row["masks"], size)):
        _outline(axes, _resized(mask, shape), SLOT_COLOURS[index % len(SLOT_COLOURS)])
    if row["ignore"] is not None:
        ignored = _resized(decode_masks([row["ignore"]], size)[0], shape)
        if ignored.any():
            axes.contourf(ignored, levels=[0.5, 1.5], colors="none", hatches=["///"])
    text = textwrap.wrap(row["instruction"].replace("$", r"\$"), 34)
    shown = text if len(text) <= TEXT_LINES else [*text[: TEXT_LINES - 1], text[TEXT_LINES - 1] + " …"]
    axes.set_title("\n".join(shown), fontsize=9, color=INK, loc="left")
    number = len(row["masks"])
    caption = f"{'no object' if not number else f'{number} object' + 's' * (number > 1)}"
    caption += f", {row['kind']}" if row["kind"] else ""
    axes.text(0, -0.03, caption, fontsize=8, color=MUTED, transform=axes.transAxes, va="top", parse_math=False)


def _outline(axes: Any, mask: np.ndarray, colour: str) -> None:
    """The border of a mask, also where it touches the border of the image."""
    padded = np.pad(mask, 1)
    x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
    if padded.any():
        axes.contour(x, y, padded, levels=[0.5], colors=["white"], linewidths=3.2)
        axes.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=1.6)


def _resized(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(shape, Image.Resampling.NEAREST)).astype(float)
