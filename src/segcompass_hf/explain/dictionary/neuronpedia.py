# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A concept dictionary as Neuronpedia's JSON of features, explanations and activations, which other tools read.

`save_sae_lens` writes the SAE itself. The words of an example are its tokens; where a feature fired, on the others
around the example nothing is known, so that their values are 0. Patches have no place in that format: an example on a
patch has one token, `<image x0,y0,x1,y1>`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...files import whole_file
from .dictionary import ConceptDictionary
from .entries import ConceptEntry, PatchExample, WordExample


def save_neuronpedia(dictionary: ConceptDictionary, path: str | os.PathLike, model_id: str, source_id: str) -> Path:
    """Write one JSON object per feature that fired and per line, with the keys that Neuronpedia gives its features.

    Args:
        dictionary ([`ConceptDictionary`]): Whose features.
        path (`str` or `os.PathLike`): A `.jsonl` file; its folder is made when missing.
        model_id (`str`): `modelId` of all, such as `scenes-tiny`.
        source_id (`str`): `layer` of all: layer and name of the SAE, such as `2-segcompass`.

    Returns:
        `Path`: the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for entry in dictionary.entries:
            if entry.density > 0:
                line = feature_json(dictionary, entry, model_id, source_id)
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def feature_json(dictionary: ConceptDictionary, entry: ConceptEntry, model_id: str, source_id: str) -> dict[str, Any]:
    """One feature, as [`save_neuronpedia`] writes it."""
    place = {"modelId": model_id, "layer": source_id, "index": str(entry.feature)}
    examples = [_word(example) for example in entry.top_words] + [_patch(example) for example in entry.top_patches]
    return {
        **place,
        "frac_nonzero": entry.density,
        "maxActApprox": entry.max_activation,
        "explanations": [{**place, **explanation} for explanation in _explanations(dictionary, entry)],
        "activations": [{**place, **example} for example in examples],
    }


def _explanations(dictionary: ConceptDictionary, entry: ConceptEntry) -> list[dict[str, Any]]:
    """What is said of a feature, each with how well it is known: its name, what it does, a VLM's interpretation."""
    found = []
    name = dictionary.name(entry.feature)
    if name is not None:
        scores = [{"value": value, "typeName": kind} for kind, value in (("f1", name.f1), ("purity", name.purity))]
        scores = [score for score in scores if score["value"] is not None]
        found.append(
            {"description": f"{name.text} (on {name.scope})", "typeName": "segcompass_name", "scores": scores}
        )
    if entry.effect is not None:
        found.append({"description": str(entry.effect), "typeName": "segcompass_effect", "scores": []})
    if entry.interpretation is not None:
        found.append({"description": entry.interpretation, "typeName": "vlm_interpretation", "scores": []})
    return found


def _word(example: WordExample) -> dict[str, Any]:
    before, after = example.before.split(" "), example.after.split(" ")
    before, after = ([word for word in words if word] for words in (before, after))
    return _activation([*before, example.word, *after], len(before), example.activation, example.sample_id)


def _patch(example: PatchExample) -> dict[str, Any]:
    place = "" if example.box is None else " " + ",".join(map(str, example.box))
    return _activation([f"<image{place}>"], 0, example.activation, example.sample_id)


def _activation(tokens: list[str], place: int, value: float, sample_id: str) -> dict[str, Any]:
    values = [value if index == place else 0.0 for index in range(len(tokens))]
    return {
        "tokens": tokens,
        "values": values,
        "maxValue": value,
        "minValue": min(values),
        "maxValueTokenIndex": place,
        "dataSource": sample_id,
    }


__all__ = ["feature_json", "save_neuronpedia"]
