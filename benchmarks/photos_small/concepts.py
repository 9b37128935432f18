"""Which categories and places have a concept of photos-small that fires on the word and in the picture.

    python benchmarks/photos_small/concepts.py CHECKPOINT --rows runs/photos-small/rows --save CHECKPOINT \\
        --output benchmarks/results/photos_small/concepts

Concepts and the activations from which they count as firing are chosen on photographs of the split `train`, as the
ones whose smaller F1 of words and picture is largest; F1 is measured on the split `held_out`. One row of every
photograph is read, with its own reasoning; photographs that are not annotated as a whole (of `people`, or with crowds)
are left out.
`--save` writes the dictionary, labels derived from `train` and scored on `held_out`, without pictures. Writes
OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from listed import questions_of  # the sibling file
from seen import GRID, is_crowded, is_place, named_objects, place_of  # of the example, found by the sibling
from words import CATEGORIES, NUMBERS

from segcompass_hf.evaluation import load_dataset_of
from segcompass_hf.explain.dictionary.counts import DictionaryCounts, Firing, bin_of, threshold_of
from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary
from segcompass_hf.explain.dictionary.entries import ExampleStore
from segcompass_hf.explain.dictionary.labels import FiringRates
from segcompass_hf.explain.dictionary.objects import normalize_word
from segcompass_hf.explain.dictionary.reading import Active, ConceptReader, RowReading
from segcompass_hf.files import write_whole
from segcompass_hf.metrics.intervals import bootstrap_ratios
from segcompass_hf.pages import markdown_table
from segcompass_hf.patch_coverage_segcompass import PatchCoverage

TARGET_F1, TARGET_CATEGORIES = 0.6, 20
HALF = 0.5  # of a patch: covered by at least so much, it shows the category
MAX_ENTRIES = 20_000_000  # of a table of (name, feature, activation)
SIDES = {"left": (0.0, 1 / 3), "right": (2 / 3, 1.0), "leftmost": (0.0, 1 / 3), "rightmost": (2 / 3, 1.0)}
SPOKEN = ("many", "largest", "biggest", "smallest", "nearest", "second", "exactly", "except", "not", "none", *NUMBERS)
CELLS = [place_of((x + 0.5) / GRID, (y + 0.5) / GRID) for x in range(GRID) for y in range(GRID)]
NAMES = {name: number for number, name in enumerate(dict.fromkeys((*CATEGORIES, *CELLS, *SIDES, *SPOKEN)))}
GROUPS = {"category": CATEGORIES, "place": CELLS, "side": SIDES, "spoken": SPOKEN}
LONGEST = 2  # words of a name; each of them may be where its concept fires
# What a concept fires on in the picture, by name: how it reads.
PICTURES = {
    "half": f"patches of which the category covers at least {HALF:.0%} (of a place or side: whose middle lies in it)",
    "best": "patches that an object covers at least half as much as the one it covers most, as in dictionaries",
    "photograph": "photographs with the category, a concept firing on any of their patches",
}


Shows = list[tuple[int, np.ndarray]]  # numbers of names, and bool arrays of the units that show each


class Units(NamedTuple):
    """Words or patches of a photograph, or the photograph itself, and which of them have which name."""

    active: Active
    count: int
    names: np.ndarray  # (n,), of which `units` has one each
    units: np.ndarray


def said(words: list[str]) -> Iterator[tuple[int, int]]:
    """(name of a word, word) of every word of a name: of the n-th of the name `LONGEST * number + n`."""
    words = [normalize_word(word) for word in words]
    unit = 0
    while unit < len(words):
        for length in range(LONGEST, 0, -1):  # a hot dog is no dog
            number = NAMES.get(" ".join(words[unit : unit + length]))
            if number is not None and unit + length <= len(words):
                yield from ((LONGEST * number + place, unit + place) for place in range(length))
                break
        unit += length


def shown(reading: RowReading, row: dict[str, Any], coverage: PatchCoverage) -> dict[str, Shows]:
    """By the kind of picture of `PICTURES` what shows what."""
    size, count = (reading.image.height, reading.image.width), len(reading.patches)
    masks, shares = {}, {}
    for words, mask, _ in named_objects(row):
        category = " ".join(word for word in words if not is_place(word))
        if category:
            share = coverage(mask[None], count)[0].numpy()
            shares.setdefault(NAMES[category], []).append(share >= HALF * share.max() if share.max() else share > 0)
            masks[NAMES[category]] = masks.get(NAMES[category], False) | mask
    half = [(name, coverage(mask[None], count)[0].numpy() >= HALF) for name, mask in masks.items()]
    y, x = coverage.places(*size, count).numpy().T
    cells = np.array([place_of(*middle) for middle in zip(x, y, strict=True)])
    places = [(NAMES[cell], cells == cell) for cell in CELLS]
    places += [(NAMES[side], (x >= low) & (x <= high)) for side, (low, high) in SIDES.items()]
    best = [(name, np.any(each, axis=0)) for name, each in shares.items()]
    return {"half": half + places, "best": best, "photograph": [(name, np.ones(1, bool)) for name in masks]}


def units_of(reading: RowReading, row: dict[str, Any], coverage: PatchCoverage) -> dict[str, Units]:
    """The words of a row, and the units of its photograph of every kind."""
    names = list(said(reading.words))
    columns = np.array(names, dtype=np.int64).reshape(-1, 2).T
    found = {"words": Units(reading.on_words, len(reading.words), *columns)}
    order = np.lexsort((-reading.on_patches.values, reading.on_patches.features))
    features, first = np.unique(reading.on_patches.features[order], return_index=True)
    whole = Active(np.zeros(len(features), np.int64), features, reading.on_patches.values[order][first])
    for kind, shows in shown(reading, row, coverage).items():
        places = [(np.full(np.count_nonzero(units), name), np.flatnonzero(units)) for name, units in shows]
        pairs = [np.concatenate(part) for part in zip(*places, strict=True)] if places else [np.zeros(0, np.int64)] * 2
        is_whole = kind == "photograph"
        active, count = (whole, 1) if is_whole else (reading.on_patches, len(reading.patches))
        found[kind] = Units(active, count, *pairs)
    return found


class Chosen(NamedTuple):
    """The concept of a name, with what was found on the photographs that it was chosen on."""

    feature: int
    word: int  # which word of the name
    bins: tuple[int, int]  # the activation on words and on the picture, as in `bin_of`
    derived_f1: tuple[float, float]


class Choice:
    """Chooses concepts on photographs.

    Args:
        d_sae (`int`): Features.
    """

    def __init__(self, d_sae: int):
        self.d_sae = d_sae
        self.firing = {kind: Firing(d_sae, MAX_ENTRIES) for kind in ("words", *PICTURES)}

    def add(self, units: dict[str, Units]) -> None:
        for kind, found in units.items():
            self.firing[kind].add_units(found.active, found.count)
            self.firing[kind].add_hits(found.names, found.units, found.active)

    def tables(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """The best F1 of every name (of a word) and feature, and its bin, both `(num_names, d_sae)`."""
        pairs, f1, bins = FiringRates(self.firing[kind]).best()
        shape = (len(NAMES) * (LONGEST if kind == "words" else 1), self.d_sae)
        tables = np.zeros(shape), np.zeros(shape, np.int64)
        for table, values in zip(tables, (f1, bins), strict=True):
            table.ravel()[pairs] = values
        return tables

    def concepts(self, kind: str | None) -> dict[str, Chosen]:
        """By name the concept whose smaller F1 is largest; of a kind of picture, or of words alone."""
        f1_words, bins_words = self.tables("words")
        f1, bins = self.tables(kind) if kind else (np.ones((len(NAMES), self.d_sae)), bins_words)
        found = {}
        for name, number in NAMES.items():
            own = slice(LONGEST * number, LONGEST * number + len(name.split()))
            smaller = np.minimum(f1_words[own], f1[number])
            word, feature = np.unravel_index(smaller.argmax(), smaller.shape)
            if smaller[word, feature] > 0:
                place = (LONGEST * number + word, feature)
                thresholds = int(bins_words[place]), int(bins[number, feature])
                derived = float(f1_words[place]), float(f1[number, feature])
                found[name] = Chosen(int(feature), int(word), thresholds, derived)
        return found


def counts_of(units: Units, name: int, feature: int, lowest: int) -> tuple[int, int]:
    """Twice the hits, and firings and units of the name together: the terms of F1."""
    fires = units.active.units[(units.active.features == feature) & (bin_of(units.active.values) >= lowest)]
    has = units.units[units.names == name]
    return 2 * len(np.intersect1d(fires, has)), len(fires) + len(has)


def measure(chosen: dict[str, Chosen], held_out: list[dict[str, Units]], kind: str | None) -> list[dict[str, Any]]:
    """A line per name: its concept, and F1 with intervals over the photographs held out."""
    lines = []
    for group, names in GROUPS.items():
        for name in names:
            number, concept = NAMES[name], chosen.get(name)
            line: dict[str, Any] = {"group": group, "name": name, "feature": concept and concept.feature}
            targets = [("words", LONGEST * number + (concept.word if concept else 0))]
            targets += [(kind, number)] if kind else []
            what, target = targets[-1]
            line["photographs"] = sum(bool((units[what].names == target).any()) for units in held_out)
            for place, (what, target) in enumerate(targets if concept else []):
                each = [counts_of(units[what], target, concept.feature, concept.bins[place]) for units in held_out]
                parts, wholes = np.array(each, dtype=float).T
                side = "words" if what == "words" else "picture"
                low, high = bootstrap_ratios({"f1": (parts, wholes)}, len(each))["f1"] or (None, None)
                value = parts.sum() / wholes.sum() if wholes.sum() else None
                line[f"f1_{side}"] = {"value": value, "low": low, "high": high}
                line[f"derived_f1_{side}"] = concept.derived_f1[place]
                line[f"threshold_{side}"] = float(threshold_of(np.array([concept.bins[place]]))[0])
            values = [line.get(f"f1_{side}", {}).get("value") for side in ("words", "picture")[: len(targets)]]
            line["passes"] = all(value is not None and value >= TARGET_F1 for value in values)
            lines.append(line)
    return lines


def whole_photographs(dataset: Any) -> tuple[Any, int]:
    """A row of every photograph of `things` that has no crowds, and how many photographs have."""
    rows = questions_of(dataset.select([i for i, name in enumerate(dataset["source"]) if name == "photos-things"]))
    kept = [place for place, reasoning in enumerate(rows["reasoning"]) if not is_crowded({"reasoning": reasoning})]
    return rows.select(kept), len(rows) - len(kept)


def figures_of(tables: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By kind how many names of every group pass, of those that photographs held out have."""
    found: dict[str, Any] = {}
    for kind, lines in tables.items():
        groups = ("category", "place", "side") if kind == "half" else ("spoken",) if kind == "words" else ("category",)
        for group in groups:
            own = [line for line in lines if line["group"] == group]
            known = [line for line in own if line["photographs"]]
            passing = [line["name"] for line in known if line["passes"]]
            entry = {"passing": len(passing), "held out": len(known), "all": len(own), "names": passing}
            found.setdefault(kind, {})[group] = entry
    return found


def markdown(result: dict[str, Any]) -> str:
    figures, read = result["figures"], result["read"]
    reached = "reached" if figures["half"]["category"]["passing"] >= TARGET_CATEGORIES else "not reached"
    lines = [
        "# Concepts of categories and places",
        "",
        f"`{result['command']}`",
        "",
        f"{result['model']}. Concepts and activations chosen on {read['train']} photographs and parts of them, F1 "
        f"measured on {read['held_out']} held out ({read['held_out left out']} more have crowds). A name has a "
        f"concept if F1 is {TARGET_F1} or more on words and in the picture both. Goal: {TARGET_CATEGORIES} categories "
        f"({reached}). Brackets: 95 % intervals over photographs.",
        "",
        markdown_table(
            ["in the picture", "group", "have a concept", "of those in photographs held out"],
            [
                [PICTURES.get(kind, "words alone"), group, entry["passing"], entry["held out"]]
                for kind, groups in figures.items()
                for group, entry in groups.items()
            ],
        ),
        "",
        f"In the picture: {PICTURES['half']}.",
        "",
        markdown_table(
            ["group", "name", "photographs", "concept", "F1 words", "F1 picture", "has a concept"],
            [
                [
                    *(line["group"], line["name"], line["photographs"], _shown(line["feature"])),
                    *(_shown(line.get(f"f1_{side}")) for side in ("words", "picture")),
                    "yes" if line["passes"] else "no",
                ]
                for line in [*result["half"], *result["words"]]
                if line["photographs"] and (line["group"] == "spoken") == ("f1_picture" not in line)
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "–" if value["value"] is None else "{value:.2f} [{low:.2f}, {high:.2f}]".format(**value)
    return "–" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("--rows", default="runs/photos-small/rows", help="folder with the splits")
    parser.add_argument("--num-photographs", type=int, help="of each split, all when left out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save", help="write the dictionary into this folder")
    parser.add_argument("--output", type=Path, required=True, help="path of the results without ending")
    given = parser.parse_args()
    from transformers import AutoModel

    from segcompass_hf import SegCompassProcessor

    begun = time.perf_counter()
    model, processor = AutoModel.from_pretrained(given.model).eval(), SegCompassProcessor.from_pretrained(given.model)
    d_sae, coverage, read = model.config.sae_config.d_sae, PatchCoverage(processor), {}
    choice, held_out, counts = Choice(d_sae), [], DictionaryCounts(d_sae, all_objects_named=True)
    examples = ExampleStore(counts.top_words, counts.top_patches, with_pictures=False)
    reader = ConceptReader(model, processor, named_objects)
    for half, split in enumerate(("train", "held_out")):
        rows, left_out = whole_photographs(load_dataset_of(f"{given.rows}:{split}").dataset)
        rows = rows.select(range(min(len(rows), given.num_photographs or len(rows))))
        read |= {split: len(rows), f"{split} left out": left_out}
        for start in range(0, len(rows), given.batch_size):
            places = range(start, min(start + given.batch_size, len(rows)))
            batch = [(half * read["train"] + place, rows[place]) for place in places]
            for (_, row), reading in zip(batch, reader.read(batch), strict=True):
                if given.save:
                    counts.add(reading, half)
                    examples.add(reading)
                units = units_of(reading, row, coverage)
                choice.add(units) if half == 0 else held_out.append(units)
            print(f"{split}: {start + len(batch)} of {len(rows)}", file=sys.stderr, flush=True)
    tables = {kind: measure(choice.concepts(kind), held_out, kind) for kind in PICTURES}
    tables["words"] = measure(choice.concepts(None), held_out, None)
    if given.save:
        settings = {"use_reference_reasoning": True, "top_k": counts.top_words.values.shape[1]}
        ConceptDictionary.from_counts(counts, examples, model.sae, 0, settings).save(given.save)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "model": Path(given.model).name,
        "read": read,
        "seconds": round(time.perf_counter() - begun, 1),
        "target": {"f1": TARGET_F1, "categories": TARGET_CATEGORIES},
        "figures": figures_of(tables),
        **tables,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(given.output.with_suffix(".md"), markdown(result))
    print(json.dumps(result["figures"], indent=1))


if __name__ == "__main__":
    main()
