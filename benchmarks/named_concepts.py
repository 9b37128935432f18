# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How much of what makes masks has a name: contributions of named concepts on held-out scenes.

    python benchmarks/named_concepts.py --num-samples 300 --save checkpoint --output benchmarks/results/explain/named

A dictionary is made of rows of one seed (names are chosen on half of their images and measured on the other half) and
scenes of another seed are explained. Of every kept mask it is measured which share of the positive contribution falls
on concepts with a name that holds (F1 of 0.8 or more, or purity of 0.8 or more of something rare), and whether the
first concept has one; the same for the labels of single words. `firing` counts only the tokens on which such a concept
fires at least as strongly as its name asks for. Intervals: 95 %, bootstrap over scenes.

Records are appended to OUTPUT.jsonl as scenes are done; started again, the benchmark goes on where it stopped. Records
of another model, split or seed are refused. Writes OUTPUT.json and OUTPUT.md. `--save` writes the dictionary into a
folder (`checkpoint`: beside the checkpoint), with what its concepts do (`--effect-rows` scenes of the dictionary's
seed).
"""

import argparse
import json
import logging
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.names import scenes_objects
from segcompass_hf.explain.answer import Answer
from segcompass_hf.explain.attribution import attribute
from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary
from segcompass_hf.explain.dictionary.names import HOLDS
from segcompass_hf.explain.effects import measure_effects
from segcompass_hf.files import weights_digest
from segcompass_hf.metrics.intervals import bootstrap_interval

logger = logging.getLogger("named_concepts")

TARGETS = {"contribution": 0.8, "first": 0.9}
TITLES = {
    "label": "labels: a word",
    "pure label": f"labels of purity {HOLDS} or more",
    "f1": f"names of F1 {HOLDS} or more",
    "name": "names that hold",
    "firing": "names that hold, at tokens on which they fire",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="folder of a checkpoint, or `bundled`")
    parser.add_argument("--split", default="val", choices=list(scenes.SPLITS), help="of the scenes explained")
    parser.add_argument("--num-samples", type=int, default=300, help="scenes to explain")
    parser.add_argument("--seed", type=int, default=1919, help="of the scenes explained")
    parser.add_argument("--dictionary", type=Path, help="folder of a dictionary; made of rows when left out")
    parser.add_argument("--dictionary-rows", type=int, default=600)
    parser.add_argument("--dictionary-seed", type=int, default=1, help="of the rows of `val`")
    parser.add_argument("--effect-rows", type=int, default=100, help="rows on which --save measures what concepts do")
    parser.add_argument("--save", help="write the dictionary into this folder; `checkpoint`: beside the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="path of the results without ending")
    return parser.parse_args(argv)


def make_dictionary(model: Any, processor: Any, arguments: argparse.Namespace) -> ConceptDictionary:
    """Read, or made of rows of `val`."""
    if arguments.dictionary:
        return ConceptDictionary.load(arguments.dictionary, model)
    rows = scenes.iterate("val", arguments.dictionary_rows, seed=arguments.dictionary_seed)
    return ConceptDictionary.build(
        model, processor, rows, batch_size=16, named_objects=scenes_objects, all_objects_named=True
    )


def measure(model: Any, processor: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per kept mask: of every feature its share of the positive contribution, and of that by token."""
    answer = Answer(model, processor, row["image"], row["instruction"])
    if not answer.kept:
        return []
    concepts = answer.captured.concepts
    is_patch = np.array([token.kind == "image" for token in answer.tokens()])[concepts.token_index.numpy()]
    features, index = concepts.features.unique(return_inverse=True)
    records = []
    for attribution in attribute(answer.replay, answer.slots):
        totals = attribution.per_feature(features, index).clamp(min=0).numpy()
        if not totals.sum() > 0:
            continue
        entries = attribution.contributions.numpy()
        found = []
        for place in np.flatnonzero(totals >= 1e-4 * totals.sum()).tolist():
            own = np.flatnonzero((index.numpy() == place) & (entries > 0))
            tokens = [
                [bool(is_patch[entry]), round(float(concepts.values[entry]), 4), float(entries[entry])]
                for entry in own
            ]
            found.append([int(features[place]), float(totals[place] / totals.sum()), tokens])
        records.append({"slot": attribution.slot, "features": found})
    return records


def scores(dictionary: ConceptDictionary, record: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """Of one mask for each way of naming: the named share of the positive contribution, and whether the first is."""
    sums = dict.fromkeys(TITLES, 0.0)
    first = max(record["features"], key=lambda found: found[1])[0]
    first_named = {}
    for feature, share, tokens in record["features"]:
        name, label = dictionary.name(feature), dictionary.label(feature)
        has = {
            "label": label is not None,
            "pure label": label is not None and (dictionary.purity(feature) or 0.0) >= HOLDS,
            "f1": name is not None and (name.f1 or 0.0) >= HOLDS,
            "name": name is not None,
        }
        for way, named in has.items():
            sums[way] += share * named
        if name is not None:
            fires = sum(c for patch, value, c in tokens if value >= _threshold(name, patch))
            sums["firing"] += share * fires / max(sum(c for *_, c in tokens), 1e-12)
        if feature == first:
            first_named = has | {"firing": name is not None}
    return {way: (sums[way], first_named[way]) for way in TITLES}


def _threshold(name: Any, on_patch: bool) -> float:
    return name.threshold_patches if on_patch else name.threshold_words


def summarize(dictionary: ConceptDictionary, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over masks, drawn by scene; and which features lack a name most."""
    masks = [record for record in records if "features" in record]
    found, groups = [scores(dictionary, record) for record in masks], [record["sample"] for record in masks]
    summary = {"scenes": len({record["sample"] for record in records}), "masks": len(masks), "ways": {}}
    for way in TITLES:
        summary["ways"][way] = {
            "contribution": bootstrap_interval([one[way][0] for one in found], groups),
            "first": bootstrap_interval([one[way][1] for one in found], groups),
        }
    unnamed: Counter = Counter()
    for record in masks:
        for feature, share, _ in record["features"]:
            if dictionary.name(feature) is None:
                unnamed[feature] += share / len(masks)
    summary["unnamed"] = [
        {"feature": feature, "share": share, "candidates": [name.text for name in dictionary[feature].names]}
        for feature, share in unnamed.most_common(10)
    ]
    named = [name for feature in range(len(dictionary)) if (name := dictionary.name(feature)) is not None]
    summary["features"] = {"named": len(named), **Counter(name.family for name in named)}
    summary["families"] = [[family.name, len(family.features)] for family in dictionary.families()[:20]]
    return summary


def markdown(result: dict[str, Any]) -> str:
    def cell(interval):
        return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in interval))

    lines = [
        "# What has a name",
        "",
        f"`{result['command']}`",
        "",
        f"{result['masks']} masks of {result['scenes']} scenes of `{result['split']}`, seed {result['seed']}; the "
        f"dictionary is of {result['dictionary']['rows']} rows of another seed, names chosen on "
        f"{result['dictionary']['rows_derive']} and measured on {result['dictionary']['rows_score']}. Mean and 95 % "
        "interval over scenes.",
        "",
        "| concepts with | share of the positive contribution | first concept of a mask |",
        "|---|---|---|",
    ]
    for way, title in TITLES.items():
        found = result["ways"][way]
        lines.append(f"| {title} | {cell(found['contribution'])} | {cell(found['first'])} |")
    reached = {name: result["ways"]["name"][name][0] >= target for name, target in TARGETS.items()}
    lines += [
        "",
        f"Goal: {TARGETS['contribution']:.0%} of the contribution "
        f"({'reached' if reached['contribution'] else 'not reached'}), {TARGETS['first']:.0%} of the first concepts "
        f"({'reached' if reached['first'] else 'not reached'}), on names that hold.",
        "",
        "Features by kind of name: " + ", ".join(f"{n} {kind}" for kind, n in result["features"].items()) + ".",
        "",
        "Largest families: " + ", ".join(f"{name} ({count})" for name, count in result["families"]) + ".",
        "",
        "Most of what has no name: "
        + "; ".join(
            f"{one['feature']} ({one['share']:.1%}, perhaps {', '.join(one['candidates']) or 'nothing'})"
            for one in result["unnamed"]
        )
        + ".",
    ]
    return "\n".join(lines) + "\n"


def read_records(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of an earlier start; refused when they are of something else."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(first)["key"] != key:
        raise SystemExit(f"error: {path} holds records of {json.loads(first)['key']}, not of {key}; remove it.")
    return [json.loads(line) for line in lines]


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = bundled_checkpoint() if arguments.model == "bundled" else arguments.model
    processor = SegCompassProcessor.from_pretrained(path)
    model = SegCompassForReasoningSegmentation.from_pretrained(path).eval()
    dictionary = make_dictionary(model, processor, arguments)
    if arguments.save:
        rows = scenes.iterate("val", arguments.effect_rows, seed=arguments.dictionary_seed)
        dictionary = dictionary.updated("effect", measure_effects(model, processor, rows))
        dictionary.save(path if arguments.save == "checkpoint" else arguments.save)
    key = {"weights": weights_digest(model), "split": arguments.split, "seed": arguments.seed}
    records_path = arguments.output.with_suffix(".jsonl")
    records = read_records(records_path, key)
    done = {record["sample"] for record in records}
    for sample, row in enumerate(scenes.iterate(arguments.split, arguments.num_samples, seed=arguments.seed)):
        if sample in done:
            continue
        new = [{"sample": sample, **record} for record in measure(model, processor, row)] or [{"sample": sample}]
        with records_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)
        records += new
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "split": arguments.split,
        "seed": arguments.seed,
        "dictionary": dictionary.info,
        **summarize(dictionary, [record for record in records if record["sample"] < arguments.num_samples]),
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    logger.info(markdown(result))


if __name__ == "__main__":
    main()
