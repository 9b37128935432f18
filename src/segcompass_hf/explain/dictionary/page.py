# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A concept dictionary as one HTML page to browse, without network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .dictionary import ConceptDictionary


def write_page(dictionary: ConceptDictionary, path: str | os.PathLike, max_features: int = 2000) -> None:
    """Write the page in one step; see `ConceptDictionary.to_html`."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(page(dictionary, max_features), encoding="utf-8", errors="replace")
    os.replace(unfinished, path)


def page(dictionary: ConceptDictionary, max_features: int = 2000) -> str:
    """The page itself.

    All words of the data set stand in a JSON element in which `<` is escaped, and the script shows them as text; the
    page's content policy allows its own style, its own script and pictures within it, nothing else.
    """
    fired = [entry for entry in dictionary.entries if entry.density > 0]
    fired.sort(key=lambda entry: (entry.label is None, -_quality(dictionary, entry), -entry.density, entry.feature))
    chosen = fired[:max_features]
    used = sorted({patch.picture for entry in chosen for patch in entry.top_patches if patch.picture >= 0})
    place = {picture: index for index, picture in enumerate(used)}
    features = [asdict(entry) for entry in chosen]
    for feature in features:
        for patch in feature["top_patches"]:
            patch["picture"] = place.get(patch["picture"], -1)
    encoded = (base64.b64encode(dictionary.pictures[picture]).decode("ascii") for picture in used)
    data = {"features": features, "pictures": [f"data:image/jpeg;base64,{picture}" for picture in encoded]}
    info = dictionary.info
    left_out = f", {len(fired) - len(chosen)} of them not shown here" if len(chosen) < len(fired) else ""
    labelled = sum(entry.label is not None for entry in dictionary.entries)
    style, script = _template("dictionary.css"), _template("dictionary.js")
    values = {
        "TITLE": escape(str(info.get("model") or f"the SAE {info['sae_sha256'][:12]}")),
        "SUMMARY": escape(
            f"{len(dictionary)} features, {len(fired)} of them fire{left_out}, {labelled} have a label. Read from "
            f"{info['rows']} rows: labels are derived from {info['rows_derive']} and scored on the "
            f"{info['rows_score']} others, split by image."
        ),
        "POLICY": escape(
            f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _template("dictionary.html"))


def _quality(dictionary: ConceptDictionary, entry) -> float:
    f1 = [dictionary.scores[f"derived_f1_{modality}"][entry.feature] for modality in ("words", "patches")]
    return float(np.nansum(f1))


def _template(name: str) -> str:
    return (resources.files("segcompass_hf.explain") / "templates" / name).read_text("utf-8").strip()


def _hash(text: str) -> str:
    """The source of an inline element, as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


__all__ = ["page", "write_page"]
