# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One self-contained page of the worst and the best samples: targets, masks, and what the model thought."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ..data.schema import decode_masks
from ..pages import picture_address
from .records import choice_score_of, score_of
from .rows import EvaluationRows
from .tables import selection_html

MAX_SIDE = 420  # pixels of a picture on the page
TARGET_COLOUR, PREDICTION_COLOUR, IGNORE_COLOUR = (18, 165, 114), (232, 145, 12), (122, 129, 144)

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1f2430; max-width: 1000px; margin: 2em auto; padding: 0 1em }}
.sample {{ display: flex; flex-wrap: wrap; gap: 1em; border-top: 1px solid #d5d9e0; padding: 1em 0 }}
.sample figure {{ margin: 0 }} .sample img {{ width: 280px; display: block }}
.sample > div {{ flex: 1 1 280px; min-width: 0; overflow-wrap: anywhere }}
figcaption, .small {{ font-size: 12px; color: #5b6270 }} .reasoning {{ white-space: pre-wrap }}
table {{ display: block; overflow-x: auto }}
td, th {{ text-align: left; padding: 0 1em .2em 0; font-size: 13px }}
.target {{ color: rgb{target} }} .prediction {{ color: rgb{prediction} }}
</style></head><body>
<h1>{title}</h1>
<p>gIoU {giou:.3f}, cIoU {ciou:.3f} over {samples} samples. In each row the
<b class="target">target</b> and the <b class="prediction">prediction</b>; grey pixels do not count.</p>
{selection}{sections}
</body></html>
"""


def samples_page(
    figures: dict[str, Any], records: Sequence[dict[str, Any]], rows: EvaluationRows, num_samples: int = 12
) -> str:
    """Make the page.

    Args:
        figures (`dict`): See `figures.summarize`.
        records (`Sequence[dict]`): Of all samples.
        rows (`EvaluationRows`): Their images and targets.
        num_samples (`int`, *optional*, defaults to 12): So many of the worst and of the best.

    Returns:
        `str`: HTML that needs no other file.
    """
    worst, best = worst_and_best(records, num_samples)
    sections = "\n".join(
        f"<h2>{title}</h2>\n" + "\n".join(_sample(record, rows[record["index"]]) for record in chosen)
        for title, chosen in ((f"{len(worst)} worst", worst), (f"{len(best)} best", best))
        if chosen
    )
    return _PAGE.format(
        title=escape(f"{figures['predictor']} on {figures['dataset']}"),
        giou=figures["metrics"]["gIoU"]["value"],
        ciou=figures["metrics"]["cIoU"]["value"],
        samples=figures["counts"]["samples"],
        selection=selection_html(figures),
        sections=sections,
        target=TARGET_COLOUR,
        prediction=PREDICTION_COLOUR,
    )


def worst_and_best(
    records: Sequence[dict[str, Any]], num_samples: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples of lowest and of highest IoU, no sample in both; ties in the order of the data set. None is left out
    of the metrics.

    Among the best, samples with a target come first: a right "nothing there" shows little.
    """
    judged = [record for record in records if not score_of(record).left_out]
    ordered = sorted(judged, key=lambda record: (score_of(record).iou, record["index"]))
    worst = ordered[: min(num_samples, (len(ordered) + 1) // 2)]
    others = ordered[len(worst) :]
    others.sort(key=lambda record: (record["target_pixels"] == 0, -score_of(record).iou, record["index"]))
    return worst, others[:num_samples]


def _sample(record: dict[str, Any], row: Any) -> str:
    score = score_of(record)
    pictures = ""
    if row.problem is None:
        predicted = decode_masks(record["masks"], row.targets.shape[1:])
        pictures = "".join(
            f'<figure><img alt="{name}" src="{_picture(row, masks, colour)}">'
            f"<figcaption>{caption}</figcaption></figure>"
            for name, masks, colour, caption in (
                ("target", row.targets, TARGET_COLOUR, f"target, {len(row.targets)} object(s)"),
                ("prediction", predicted, PREDICTION_COLOUR, _scores(record)),
            )
        )
    words = [f"<b>IoU {score.iou:.3f}</b>", f"“{escape(record['instruction'] or '')}”"]
    if record["problem"] is not None:
        words.append(f"unreadable: {escape(record['problem'])}")
    if record["reasoning"]:
        words.append(f'<span class="reasoning">{escape(record["reasoning"])}</span>')
    if (oracle := choice_score_of(record)) is not None:
        words.append(f"lost to selection {1 - oracle.iou:.3f}, to masks {oracle.iou - score.iou:.3f}")
    described = (str(record[name]) for name in ("sample_id", "source", "split", "kind") if record[name])
    pixels = f"{score.intersection} pixels of {score.union} in both"
    words.append(f'<span class="small">{escape(", ".join(described))}; {pixels}</span>')
    return f'<div class="sample">{pictures}<div>' + "".join(f"<p>{word}</p>" for word in words) + "</div></div>"


def _scores(record: dict[str, Any]) -> str:
    if not record["masks"]:
        return "prediction: nothing"
    scores = ", ".join(f"{score:.2f}" for score in record["scores"])
    return f"prediction, {len(record['masks'])} mask(s)" + (f", scores {scores}" if scores else "")


def _picture(row: Any, masks: np.ndarray, colour: tuple[int, int, int]) -> str:
    """The image with masks over it, as a `data:` address."""
    pixels = np.asarray(row.columns["image"], dtype=np.float32).copy()  # (height, width, 3)
    layers = [] if row.ignore is None else [(row.ignore, IGNORE_COLOUR)]
    for mask, tint in [*layers, *((mask, colour) for mask in masks)]:
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.float32(tint)
        pixels[_edge(mask)] = tint
    picture = Image.fromarray(pixels.astype(np.uint8))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture_address(picture, "JPEG", quality=88)


def _edge(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask `(height, width)` with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
