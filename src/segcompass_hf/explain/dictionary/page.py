# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A concept dictionary as one HTML page to browse, without network."""

from __future__ import annotations

import os
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np

from ...files import write_whole
from ...pages import data_address, fill_page


def write_page(dictionary: Any, path: str | os.PathLike, max_features: int = 2000) -> None:
    """Write the page in one step; see `ConceptDictionary.to_html`."""
    write_whole(path, page(dictionary, max_features).encode(errors="replace"))


def page(dictionary: Any, max_features: int = 2000) -> str:
    """The page itself.

    All words of the data set stand in a JSON element in which `<` is escaped, and the script shows them as text; the
    page's content policy allows its own style, its own script and pictures within it, nothing else.
    """
    fired = [entry for entry in dictionary.entries if entry.density > 0]
    fired.sort(
        key=lambda entry: (_untold(dictionary, entry), -_quality(dictionary, entry), -entry.density, entry.feature)
    )
    chosen = fired[:max_features]
    used = sorted({patch.picture for entry in chosen for patch in entry.top_patches if patch.picture >= 0})
    place = {picture: index for index, picture in enumerate(used)}
    features = [asdict(entry) for entry in chosen]
    for entry, feature in zip(chosen, features, strict=True):
        feature["title"] = dictionary.said(entry.feature)[0] or entry.label
        feature["holds"] = dictionary.name(entry.feature) is not None
        feature["effect"] = None if entry.effect is None else str(entry.effect)
        for patch in feature["top_patches"]:
            patch["picture"] = place.get(patch["picture"], -1)
    pictures = [data_address(dictionary.pictures[picture], "JPEG") for picture in used]
    info = dictionary.info
    left_out = f", {len(fired) - len(chosen)} of them not shown here" if len(chosen) < len(fired) else ""
    labelled = sum(entry.label is not None for entry in dictionary.entries)
    named = sum(dictionary.name(feature) is not None for feature in range(len(dictionary)))
    values = {
        "TITLE": escape(str(info.get("model") or f"the SAE {info['sae_sha256'][:12]}")),
        "SUMMARY": escape(
            f"{len(dictionary)} features, {len(fired)} of them fire{left_out}, {labelled} have a label, "
            f"{named} a name that holds. Read from "
            f"{info['rows']} rows: labels are derived from {info['rows_derive']} and scored on the "
            f"{info['rows_score']} others, split by image."
        ),
    }
    data = {"features": features, "pictures": pictures}
    return fill_page("segcompass_hf.explain", "dictionary.html", "dictionary.css", ["dictionary.js"], data, values)


def _untold(dictionary: Any, entry: Any) -> bool:
    return entry.label is None and dictionary.name(entry.feature) is None


def _quality(dictionary: Any, entry: Any) -> float:
    f1 = [dictionary.scores[f"derived_f1_{modality}"][entry.feature] for modality in ("words", "patches")]
    return float(np.nansum(f1))


__all__ = ["page", "write_page"]
