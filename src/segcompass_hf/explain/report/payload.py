# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the page of an explanation shows, as JSON of bounded size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...figure import slot_colour
from ...pages import picture_address

MAX_IMAGE_SIDE = 1024  # pixels
MAX_MASK_SIDE = 512  # pixels
MAX_HEATMAP_SIDE = 256  # pixels; heatmaps are computed on four times SAM's grid, which is 64 x 64
MAX_TOKENS_PER_CONCEPT = 300  # of the largest contribution
UNKNOWN_PLACES = "place in the picture not known for this family's tiles"
_MAX_GAP = 40  # characters of a text between two tokens that are found in it
_HEAT = ("#000004", "#420A68", "#932667", "#DD513A", "#FCA50A", "#FCFFA4")  # dark to bright, even in lightness


class MaskPool:
    """Masks by number, each distinct one once: taking a concept away leaves most masks as they were."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Any]] = []
        self._numbers: dict[bytes, int] = {}

    def add(self, mask: np.ndarray) -> int:
        """Number of a mask `(H, W)`, bool, kept at most `MAX_MASK_SIDE` pixels wide and high."""
        mask = _shrink_mask(np.asarray(mask, dtype=bool))
        key = np.packbits(mask).tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.masks)
            self.masks.append(mask_to_rle(mask))
        return self._numbers[key]


def payload(explanation: Any) -> dict[str, Any]:
    """Everything the page shows.

    Sizes are bounded whatever the image: the picture by `MAX_IMAGE_SIDE`, masks by `MAX_MASK_SIDE`, heatmaps by
    `MAX_HEATMAP_SIDE`, and of every concept the `MAX_TOKENS_PER_CONCEPT` tokens of largest contribution are shown.

    Args:
        explanation ([`Explanation`]): What to show.

    Returns:
        `dict`: JSON-ready; numbers that are not finite are null.
    """
    pool = MaskPool()
    masks = [_mask(mask, pool) for mask in explanation.masks]
    kept = {mask.slot for mask in explanation.masks if mask.kept}
    by_kind = {kind: [token for token in explanation.tokens if token.kind == kind] for kind in _SHOWN_KINDS}
    return {
        "image": {
            "src": _picture(explanation.image),
            "width": explanation.image.width,
            "height": explanation.image.height,
        },
        "words": {
            "question": spell(by_kind["question"], explanation.instruction),
            "reasoning": spell(by_kind["reasoning"], explanation.reasoning),
            "reference": [token.position for token in by_kind["reference"]],
        },
        "patches": {token.position: list(token.patch) for token in by_kind["image"] if token.patch is not None},
        "placesNote": None if explanation.places_known else UNKNOWN_PLACES,
        "kinds": {kind: sum(token.kind == kind for token in explanation.tokens) for kind in (*by_kind, "special")},
        "imageTokens": [token.position for token in by_kind["image"]],
        "masks": masks,
        "pool": pool.masks,
        "slots": [
            {"score": _number(score), "kept": slot in kept, "heat": _heatmap(heatmap), "colour": slot_colour(slot)}
            for slot, (score, heatmap) in enumerate(zip(explanation.slot_scores, explanation.heatmaps, strict=True))
        ],
    }


_SHOWN_KINDS = ("question", "image", "reasoning", "reference")


def _mask(mask: Any, pool: MaskPool) -> dict[str, Any]:
    return {
        "slot": int(mask.slot),
        "score": _number(mask.score),
        "kept": bool(mask.kept),
        "mask": pool.add(mask.mask),
        "area": int(np.count_nonzero(mask.mask)),  # pixels of the original image
        "target": mask.target,
        "value": _number(mask.value),
        "baseline": _number(mask.baseline_value),
        "error": _number(mask.completeness_error),
        "sharedOut": _number(mask.quadrature_error),
        "inShares": bool(mask.in_shares),
        "numConcepts": max(int(mask.num_concepts), len(mask.concepts)),
        "truth": _number(mask.iou_to_truth),
        "colour": slot_colour(mask.slot),
        "concepts": [_concept(concept, pool) for concept in mask.concepts],
    }


def _concept(concept: Any, pool: MaskPool) -> dict[str, Any]:
    ordered = sorted(concept.tokens, key=lambda token: -abs(token.contribution))
    return {
        "id": int(concept.feature),
        "share": _number(concept.share),
        "contribution": _number(concept.contribution),
        "direction": concept.direction,
        "measured": bool(concept.measured),
        "label": concept.label,
        "purity": _number(concept.purity),
        "numTokens": len(ordered),
        "tokens": [
            [token.position, _number(token.activation), _number(token.contribution)]
            for token in ordered[:MAX_TOKENS_PER_CONCEPT]
        ],
        "without": None if concept.ablation is None else _ablation(concept.ablation, pool),
    }


def _ablation(ablation: Any, pool: MaskPool) -> dict[str, Any]:
    return {
        "masks": [pool.add(mask) for mask in ablation.masks],
        "areas": [int(np.count_nonzero(mask)) for mask in ablation.masks],
        "iou": [_number(value) for value in ablation.iou],
        "scoreChange": [_number(value) for value in ablation.score_change],
        "truth": None if ablation.iou_to_truth is None else [_number(value) for value in ablation.iou_to_truth],
        "reasoning": ablation.reasoning,
    }


def spell(tokens: Sequence[Any], text: str) -> list[list[Any]]:
    """Lay tokens over the text they came from, so that its spaces and line breaks stay.

    Tokenizers differ in where a space belongs and how letters are normalised. A token that is not found, such as an
    unknown word's, stands for what the text has in its place, else it is written as it is.

    Args:
        tokens (list of [`Token`]): In order.
        text (`str`): What they were made from.

    Returns:
        `list` of `[gap, position, word]`: what stands between this token and the one before, and the token.
    """
    spelled: list[list[Any]] = []
    missed: list[list[Any]] = []
    cursor, folded = 0, text.lower()
    if len(folded) != len(text):  # a letter whose small form is longer
        folded = text
    for token in tokens:
        word = token.text.strip()
        start = folded.find(word.lower(), cursor) if word else -1
        if not 0 <= start <= cursor + _MAX_GAP:
            missed.append([" " if spelled else "", token.position, word])
            spelled.append(missed[-1])
            continue
        gap = text[cursor:start]
        if missed and gap.strip():  # what stands here is what the tokens before it were made of
            missed[0][0], missed[0][2] = gap[: len(gap) - len(gap.lstrip())], gap.strip()
            for entry in missed[1:]:
                entry[0] = entry[2] = ""
            gap = gap[len(gap.rstrip()) :]
        missed = []
        spelled.append([gap, token.position, text[start : start + len(word)]])
        cursor = start + len(word)
    return spelled


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Uncompressed COCO RLE of a mask: lengths of the runs of 0 and 1 by turns, down the columns, 0 first.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool.

    ```python
    >>> mask_to_rle(np.array([[0, 1], [0, 1]], dtype=bool))
    {'size': [2, 2], 'counts': [2, 2]}
    ```
    """
    flat = np.concatenate([[False], np.asarray(mask, dtype=bool).flatten(order="F")])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], starts, [flat.size - 1]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def _number(value: Any) -> float | None:
    """Six digits are enough to show; JSON knows no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


def _picture(image: Image.Image) -> str:
    """The image as a `data:` address; small ones without loss."""
    shown = image.convert("RGB")
    if max(shown.size) <= 256:
        return picture_address(shown, "PNG", optimize=True)
    shown = shown.resize(_fit(shown.size, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    return picture_address(shown, "JPEG", quality=86, optimize=True)


def _heatmap(heatmap: np.ndarray) -> str:
    """A heatmap `(H, W)` in [0, 1] as a `data:` address: clear where cold, bright where hot."""
    heat = Image.fromarray(np.nan_to_num(np.asarray(heatmap, dtype=np.float32)).clip(0, 1))
    heat = heat.resize(_fit(heat.size, MAX_HEATMAP_SIDE), Image.Resampling.BILINEAR)
    levels = 64
    index = np.rint(np.asarray(heat).clip(0, 1) * (levels - 1)).astype(np.uint8)
    anchors = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in _HEAT], dtype=float)
    place = np.linspace(0, len(_HEAT) - 1, levels)
    palette = np.stack([np.interp(place, range(len(_HEAT)), anchors[:, channel]) for channel in range(3)], axis=1)
    picture = Image.fromarray(index).convert("L")
    picture.putpalette(np.rint(palette).astype(np.uint8).flatten().tolist())
    alpha = np.rint(np.interp(np.arange(levels), [0, levels - 1], [0.45, 0.92]) * 255).astype(np.uint8)
    return picture_address(picture, "PNG", optimize=True, transparency=alpha.tobytes())


def _shrink_mask(mask: np.ndarray) -> np.ndarray:
    """At most `MAX_MASK_SIDE` pixels wide and high; a mask that is not empty stays so."""
    size = _fit(mask.shape[::-1], MAX_MASK_SIDE)
    if size == mask.shape[::-1]:
        return mask
    covered = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX))
    return covered >= min(0.5, float(covered.max()) or 0.5)


def _fit(size: tuple[int, int], limit: int) -> tuple[int, int]:
    """(width, height) scaled down so that neither exceeds `limit` pixels."""
    scale = min(1.0, limit / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
