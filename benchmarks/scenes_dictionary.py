# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The concept dictionary of a checkpoint on Scenes: which colours, shapes, sizes and relations have a named concept.

    python benchmarks/scenes_dictionary.py --num-rows 600 --output benchmarks/results/explain/scenes_dictionary.json

For every word the best feature whose derived label is that word, chosen on the half of the images that labels are
derived from, with its F1 on words and on patches of the other half. `--save` writes the dictionary into a folder
(`checkpoint`: beside the checkpoint), `--html` a page to browse it.
"""

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.drawing import COLORS, SHAPES, SIZES
from segcompass_hf.data.scenes.names import scenes_objects
from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary

logger = logging.getLogger("scenes_dictionary")

TARGET_F1, TARGET_SHARE = 0.8, 0.6
GROUPS = {"colour": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES)}
RELATIONS = ("left", "right", "above", "below", "leftmost", "rightmost", "topmost", "bottommost")
SCORES = ("f1_words", "f1_patches", "any_f1_words", "any_f1_patches", "purity")


def best_feature(dictionary: ConceptDictionary, word: str, on_patches: bool) -> dict[str, Any]:
    """The best feature labelled with a word, by F1 on the images that labels were derived from.

    Args:
        dictionary (`ConceptDictionary`): With scores.
        word (`str`): Normalised.
        on_patches (`bool`): The smaller of the F1 on words and on patches decides; otherwise that on words.

    Returns:
        `dict`: `feature` (`None` if no feature has the label), its held-out scores, the threshold of each modality,
        and `features`, how many have the label.
    """
    derived = {name: dictionary.scores[f"derived_f1_{name}"] for name in ("words", "patches")}
    labelled = [entry.feature for entry in dictionary.entries if entry.label == word]
    if not labelled:
        return {"word": word, "feature": None, "features": 0} | dict.fromkeys(SCORES)

    def rank(feature: int) -> tuple[float, float]:
        words, patches = (float(derived[name][feature]) for name in ("words", "patches"))
        return (min(words, patches), words + patches) if on_patches else (words, 0.0)

    entry = dictionary[max(labelled, key=rank)]
    any_f1 = {f"any_f1_{m}": dictionary.scores[f"any_f1_{m}"][entry.feature].item() for m in ("words", "patches")}
    held_out = {name: getattr(entry, name) for name in SCORES if not name.startswith("any")}
    numbers = held_out | {name: None if np.isnan(value) else value for name, value in any_f1.items()}
    thresholds = {name: getattr(entry, name) for name in ("threshold_words", "threshold_patches")}
    return {"word": word, "feature": entry.feature, "features": len(labelled), **numbers, **thresholds}


def measure(dictionary: ConceptDictionary) -> dict[str, Any]:
    """Tables of attributes and relations, and how many reach the target."""
    attributes = [
        {"group": group} | best_feature(dictionary, word, on_patches=True)
        for group, words in GROUPS.items()
        for word in words
    ]
    for row in attributes:
        row["passes"] = row["feature"] is not None and min(row["f1_words"] or 0, row["f1_patches"] or 0) >= TARGET_F1
    relations = [best_feature(dictionary, word, on_patches=False) for word in RELATIONS]
    for row in relations:
        row["passes"] = (row["f1_words"] or 0) >= TARGET_F1
    places = [entry.label_place for entry in dictionary.entries]
    return {
        "attributes": attributes,
        "relations": relations,
        "share_of_attributes": sum(row["passes"] for row in attributes) / len(attributes),
        "share_of_relations": sum(row["passes"] for row in relations) / len(relations),
        "target": {"f1": TARGET_F1, "share": TARGET_SHARE},
        "failures": [row["word"] for row in (*attributes, *relations) if not row["passes"]],
        "features": {
            "all": len(dictionary),
            "firing": sum(entry.density > 0 for entry in dictionary.entries),
            "labelled": sum(entry.label is not None for entry in dictionary.entries),
            **{f"labelled on {place}": places.count(place) for place in ("words and patches", "words", "patches")},
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    made, shares = result["dictionary"], (result["share_of_attributes"], result["share_of_relations"])
    lines = [
        "# Named concepts on Scenes",
        "",
        f"`{result['command']}`",
        "",
        f"{result['model']}; {made['rows']} rows of `{result['split']}`: labels derived from {made['rows_derive']}, "
        f"scored on the {made['rows_score']} others (split by image). Reasoning: {result['reasoning']}.",
        "",
        f"**{shares[0]:.0%} of colours, shapes and sizes** have a feature whose label predicts its firing with F1 of "
        f"{TARGET_F1} or more on words and on patches both (target {TARGET_SHARE:.0%}); {shares[1]:.0%} of relation "
        f"words on words. Failures: {', '.join(result['failures']) or 'none'}.",
        "",
        "A feature fires where its activation reaches a threshold, one for words and one for patches, chosen on the "
        "half that labels are derived from; in brackets F1 with any activation. A patch shows an object if the object "
        "covers it at least half as much as the patch it covers most; no patch is left out.",
        "",
        "| group | word | features | best | F1 words | F1 patches | purity | passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["attributes"] + [{"group": "relation", **row} for row in result["relations"]]:
        f1 = [f"{_shown(row[f'f1_{m}'])} ({_shown(row[f'any_f1_{m}'])})" for m in ("words", "patches")]
        cells = [row["group"], row["word"], row["features"], _shown(row["feature"]), *f1, _shown(row["purity"])]
        lines.append("| " + " | ".join(map(str, [*cells, "yes" if row["passes"] else "no"])) + " |")
    lines += ["", "Features: " + ", ".join(f"{count} {name}" for name, count in result["features"].items()) + "."]
    return "\n".join(lines) + "\n"


def _shown(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build, write what was asked for, and measure."""
    path = segcompass_hf.bundled_checkpoint() if args.model == "bundled" else args.model
    processor, model = AutoProcessor.from_pretrained(path), AutoModel.from_pretrained(path).eval().to(args.device)
    started = time.perf_counter()
    dictionary = ConceptDictionary.build(
        model,
        processor,
        scenes.iterate(args.split, args.num_rows, seed=args.seed),
        batch_size=args.batch_size,
        use_reference_reasoning=args.reasoning == "reference",
        named_objects=scenes_objects,
        all_objects_named=True,
        max_pictures=args.max_pictures,
    )
    seconds = time.perf_counter() - started
    dictionary.info["model"] = "scenes-tiny" if args.model == "bundled" else Path(path).name
    if args.save:
        dictionary.save(path if args.save == "checkpoint" else args.save)
    if args.html:
        dictionary.to_html(args.html)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "model": args.model,
        "split": args.split,
        "reasoning": args.reasoning,
        "dictionary": dictionary.info,
        "seconds": round(seconds, 1),
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(model.device),
            "machine": platform.machine(),
        },
        **measure(dictionary),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="folder of a checkpoint, or `bundled`")
    parser.add_argument("--split", default="val", choices=list(scenes.SPLITS))
    parser.add_argument("--num-rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1, help="of the rows; not that of the recipe's validation rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--reasoning", default="reference", choices=["reference", "own"], help="which one is read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-pictures", type=int, default=300)
    parser.add_argument("--save", help="write the dictionary into this folder; `checkpoint`: beside the checkpoint")
    parser.add_argument("--html", help="write a page to browse")
    parser.add_argument("--output", type=Path, help="JSON file; a table stands beside it, in a .md of the same name")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = run(args)
    logger.info(markdown(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for file, text in (
            (args.output, json.dumps(result, indent=1) + "\n"),
            (args.output.with_suffix(".md"), markdown(result)),
        ):
            unfinished = file.with_name(file.name + ".part")
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, file)


if __name__ == "__main__":
    main()
