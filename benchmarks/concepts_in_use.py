# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What named concepts are good for, on Scenes: guardrails, the drift monitor, and answers that vote.

    python benchmarks/concepts_in_use.py --num-samples 400 --output benchmarks/results/explain/concepts_in_use.json

Each is measured for what it should do and for what it does to gIoU, with 95 % intervals (bootstrap over samples;
Wilson for shares). `--parts` picks some; parts that are there already stay in the file. A table stands beside it.
"""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageEnhance, ImageOps
from scenes_evaluation_report import share_interval  # the sibling file
from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.names import scenes_objects
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.evaluation import ModelPredictor
from segcompass_hf.explain.drift import DriftMonitor, concept_histograms
from segcompass_hf.files import write_whole
from segcompass_hf.metrics import best_ious, calibration_figures, score_sample
from segcompass_hf.metrics.intervals import bootstrap_interval, bootstrap_statistic
from segcompass_hf.metrics.selection import shown_objects
from segcompass_hf.pages import markdown_table

logger = logging.getLogger("concepts_in_use")

PARTS = ("guardrails", "drift", "voting")
CONCEPTS = ("red", "blue", "circle", "square", "large")  # held to `forbid` and `require`, one at a time
WINDOW, DRAWS = 32, 200  # samples of a window, and windows drawn of each kind of data


def batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        logger.info("rows %d of %d", start, len(rows))
        yield rows[start : start + size]


def targets_of(row: dict[str, Any]) -> np.ndarray:
    """`(num_targets, height, width)`, bool."""
    return decode_masks(row["masks"], row["image"].size[::-1])


def iou_of(row: dict[str, Any], masks: torch.Tensor) -> float:
    return score_sample(np.asarray(masks), targets_of(row)).iou


def mean_interval(values: list[float]) -> dict[str, Any]:
    """A mean with its interval; `None` for what no sample decides."""
    if not values:
        return {"value": None, "low": None, "high": None, "num_samples": 0}
    value, low, high = bootstrap_interval(values)
    return {"value": value, "low": low, "high": high, "num_samples": len(values)}


# Guardrails


class Held:
    """Counts for one concept under one rule."""

    def __init__(self, concept: str, rule: str):
        self.concept, self.rule = concept, rule
        self.stopped: list[bool] = []  # masks that the rule is against, and whether they are gone
        self.spared: list[bool] = []  # masks that it is not against, and whether they stay
        self.before: list[float] = []  # IoU of samples whose targets the rule is not against
        self.after: list[float] = []

    def add(self, row: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
        """A sample: its post-processed answer without and with the rule."""
        named = [(self.concept in words, mask) for words, mask in scenes_objects(row)]
        objects = np.stack([mask for _, mask in named])
        for slot, mask in zip(before["slots"].tolist(), before["masks"].numpy(), strict=True):
            shown = [named[index][0] for index in shown_objects(mask, objects)]
            is_against = any(shown) if self.rule == "forbid" else not all(shown)
            stays = slot in after["slots"].tolist()
            (self.stopped if is_against else self.spared).append(stays != is_against)
        asked = [has for has, _ in named[: len(row["masks"])]]  # targets come first
        if not any(asked) if self.rule == "forbid" else asked and all(asked):
            self.before.append(iou_of(row, before["masks"]))
            self.after.append(iou_of(row, after["masks"]))

    def join(self, other: "Held") -> "Held":
        """Add what was counted for another concept under the same rule."""
        for name in ("stopped", "spared", "before", "after"):
            getattr(self, name).extend(getattr(other, name))
        return self

    def figures(self) -> dict[str, Any]:
        change = [after - before for before, after in zip(self.before, self.after, strict=True)]
        return {
            "concept": self.concept,
            "rule": self.rule,
            "still_masked": share_interval([not gone for gone in self.stopped]),
            "wrongly_left_out": share_interval([not stays for stays in self.spared]),
            "gIoU_before": mean_interval(self.before),
            "gIoU_after": mean_interval(self.after),
            "gIoU_change": mean_interval(change),
        }


def measure_guardrails(model: Any, processor: Any, rows: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Every concept under both rules, from one answer per sample; and what taking its features away does instead."""
    held = [Held(concept, rule) for rule in ("forbid", "require") for concept in CONCEPTS]
    features = model.guardrails(forbid=CONCEPTS[0])[0].concept.features
    ablations = {
        "taken away from the concepts": dict.fromkeys(features, 0.0),
        "taken away from the states while writing": [{"feature": f, "where": "residual"} for f in features],
    }
    ablated = {name: Held(CONCEPTS[0], "forbid") for name in ablations}
    for batch in batches(rows, batch_size):
        inputs, output = answer(model, processor, batch, forbid=CONCEPTS)
        before = post_process(processor, with_rule(output, None), inputs)
        for item in held:
            after = post_process(processor, with_rule(output, item), inputs)
            for row, *answers in zip(batch, before, after, strict=True):
                item.add(row, *answers)
        for name, interventions in ablations.items():
            inputs, output = answer(model, processor, batch, interventions=interventions)
            for row, *answers in zip(batch, before, post_process(processor, output, inputs), strict=True):
                ablated[name].add(row, *answers)
    pooled = [Held("each of these", rule) for rule in ("forbid", "require")]
    for total in pooled:
        for item in held:
            if item.rule == total.rule:
                total.join(item)
    return {
        "rules": [item.figures() for item in [*held, *pooled]],
        "ablations": [{"name": name, **item.figures()} for name, item in ablated.items()],
        "num_samples": len(rows),
    }


def with_rule(output: Any, held: Held | None) -> Any:
    """An answer made with all of `CONCEPTS` forbidden, with one rule in force instead, or none."""
    fields = dict(output) | {"guardrails": None}
    if held is not None:
        place = CONCEPTS.index(held.concept)
        fields["guardrails"] = (replace(output.guardrails[place], rule=held.rule),)
        fields["guardrail_firing"] = output.guardrail_firing[:, place : place + 1]
    return type(output)(**fields)


def answer(model: Any, processor: Any, batch: list[dict[str, Any]], **kwargs: Any) -> tuple[Any, Any]:
    """Inputs and output of a batch."""
    images, instructions = ([row[name] for row in batch] for name in ("image", "instruction"))
    inputs = processor(images=images, instruction=instructions, return_tensors="pt").to(model.device)
    return inputs, model.segment(**inputs, **kwargs)


def post_process(processor: Any, output: Any, inputs: Any) -> list[dict[str, Any]]:
    sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
    return processor.post_process_segmentation(output, **sizes, output_heatmaps=False)


# Drift


def changed_rows(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same scenes, seen by a camera that has gone wrong."""
    return {
        "val, colours turned over": [row | {"image": ImageOps.invert(row["image"])} for row in rows],
        "val, half as bright": [row | {"image": ImageEnhance.Brightness(row["image"]).enhance(0.5)} for row in rows],
        "val, without colour": [row | {"image": ImageOps.grayscale(row["image"]).convert("RGB")} for row in rows],
    }


def measure_drift(model: Any, processor: Any, rows: list[dict[str, Any]], batch_size: int, seed: int) -> dict:
    """Share of windows that the monitor calls drifted, beside the gIoU of the data that they are drawn from."""
    predictor = ModelPredictor(model, processor, output_concepts=True)

    def read(some: list[dict[str, Any]]) -> tuple[np.ndarray, list[float]]:
        histograms, ious = [], []
        for batch in batches(some, batch_size):
            output, _, results = predictor.segment(batch)
            histograms.append(concept_histograms(output.concepts, model.config.sae_config.d_sae))
            ious += [iou_of(row, result["masks"]) for row, result in zip(batch, results, strict=True)]
        return np.concatenate(histograms), ious

    monitor = DriftMonitor(model, read(rows)[0])
    others = {"val, another seed": list(scenes.iterate("val", len(rows), seed=seed + 1))}
    others |= {f"{split}": list(scenes.iterate(split, len(rows), seed=seed)) for split in list(scenes.SPLITS)[2:]}
    others |= changed_rows(others["val, another seed"])
    generator, kinds = np.random.default_rng(seed), []
    for name, some in others.items():
        histograms, ious = read(some)
        size = min(WINDOW, len(some))
        draws = [generator.choice(len(some), size, replace=False) for _ in range(DRAWS)]
        reports = [monitor.check(histograms[draw], seed=place) for place, draw in enumerate(draws)]
        kinds.append(
            {
                "data": name,
                "called_drifted": share_interval([report.drifted for report in reports]),
                "distance": float(np.mean([report.distance for report in reports])),
                "threshold": float(np.mean([report.threshold for report in reports])),
                "gIoU": mean_interval(ious),
            }
        )
        logger.info("%s: %s", name, kinds[-1]["called_drifted"])
    return {"kinds": kinds, "window": WINDOW, "draws": DRAWS, "num_samples": len(rows)}


# Voting


def measure_voting(model: Any, processor: Any, rows: list[dict[str, Any]], batch_size: int, seed: int) -> dict:
    """One greedy answer, one sampled answer, and votes, on the same samples: gIoU, and what the scores are worth."""
    variants = {"greedy": {}, "one sampled": {"do_sample": True}}
    variants |= {f"{number} votes": {"votes": number} for number in (3, 5, 9)}
    ious: dict[str, list[float]] = {name: [] for name in variants}
    scores: dict[str, list[float]] = {name: [] for name in variants}
    right: dict[str, list[float]] = {name: [] for name in variants}
    torch.manual_seed(seed)
    for batch in batches(rows, batch_size):
        for name, kwargs in variants.items():
            inputs, output = answer(model, processor, batch, **kwargs)
            for row, result in zip(batch, post_process(processor, output, inputs), strict=True):
                ious[name].append(iou_of(row, result["masks"]))
                scores[name] += result["scores"].tolist()
                right[name] += best_ious(result["masks"].numpy(), targets_of(row))
    entries = []
    for name in variants:
        change = np.array(ious[name]) - np.array(ious["greedy"])
        entry = {"name": name, "gIoU": mean_interval(ious[name]), "gIoU_change": mean_interval(change.tolist())}
        figures = calibration_figures(scores[name], right[name]) | _intervals(scores[name], right[name])
        entries.append(entry | {"scores": figures})
    return {"variants": entries, "num_samples": len(rows)}


def _intervals(scores: list[float], ious: list[float]) -> dict[str, Any]:
    """Calibration error and ranking with intervals, over masks."""
    scores, ious = np.array(scores), np.array(ious)

    def statistic(name: str) -> dict[str, Any]:
        def of(draw: np.ndarray) -> float:
            value = calibration_figures(scores[draw].tolist(), ious[draw].tolist())[name]
            return float("nan") if value is None else value

        return bootstrap_statistic(of, len(scores), num_resamples=300)

    return {f"{name}_interval": statistic(name) for name in ("expected_calibration_error", "ranking")}


# Report


def markdown(report: dict[str, Any]) -> str:
    """Tables of the parts that are there."""
    sections = [f"# Concepts in use, on Scenes\n\n`{report['command']}`\n\n{__doc__.split(chr(10) * 2)[-1].strip()}"]
    sections += [_SECTIONS[name](report[name]) for name in PARTS if name in report]
    return "\n\n".join(sections) + "\n"


def cell(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


_HELD = ("still_masked", "wrongly_left_out", "gIoU_before", "gIoU_after", "gIoU_change")


def _guardrails(part: dict[str, Any]) -> str:
    names = ["rule", "concept", "still masked", "wrongly left out", "gIoU of the others", "with the rule", "change"]
    rows = [[item["rule"], item["concept"], *(cell(item[name]) for name in _HELD)] for item in part["rules"]]
    rows += [[item["name"], item["concept"], *(cell(item[name]) for name in _HELD)] for item in part["ablations"]]
    return (
        f"## Guardrails ({part['num_samples']} scenes of `val`)\n\nStill masked: share of masks of objects that the "
        "rule is against which are shown all the same. Wrongly left out: share of the other masks. Others: samples "
        "whose targets the rule is not against. The last rows: no rule, but the concept's features set to 0.\n\n"
        + markdown_table(names, rows)
    )


def _drift(part: dict[str, Any]) -> str:
    distances = ("distance", "threshold")
    rows = [
        [item["data"], cell(item["called_drifted"]), *(f"{item[name]:.3f}" for name in distances), cell(item["gIoU"])]
        for item in part["kinds"]
    ]
    return (
        f"## Drift monitor ({part['num_samples']} scenes of each kind)\n\nReference: `val`. {part['draws']} windows "
        f"of {part['window']} samples of each kind; threshold: 99 % of the reference's own windows.\n\n"
        + markdown_table(["data", "called drifted", "distance", "threshold", "gIoU"], rows)
    )


def _voting(part: dict[str, Any]) -> str:
    rows = []
    for item in part["variants"]:
        scores = item["scores"]
        kinds = (scores[f"{name}_interval"] for name in ("expected_calibration_error", "ranking"))
        ious = (cell(item[name]) for name in ("gIoU", "gIoU_change"))
        rows.append([item["name"], *ious, scores["num_masks"], *map(cell, kinds)])
    return (
        f"## Votes ({part['num_samples']} scenes of `val`)\n\nScores of the greedy and the one sampled answer are the "
        "checkpoint's own, those of votes their means over all samplings, 0 for one that lacks the mask.\n\n"
        + markdown_table(["answer", "gIoU", "against greedy", "masks", "calibration error", "ranking"], rows)
    )


_SECTIONS = {"guardrails": _guardrails, "drift": _drift, "voting": _voting}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure what the command line asks for; returns the report that was written."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="folder of a checkpoint with a dictionary, or `bundled`")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--num-samples", type=int, default=400, help="scenes of each part")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=61, help="of the scenes, which nothing was fitted on")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/explain/concepts_in_use.json"))
    options = parser.parse_args(arguments)
    path = segcompass_hf.bundled_checkpoint() if options.model == "bundled" else options.model
    model, processor = AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    rows = list(scenes.iterate("val", options.num_samples, seed=options.seed))
    report = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    report["command"] = shlex.join(["python", "benchmarks/concepts_in_use.py", *(arguments or sys.argv[1:])])
    for name in options.parts:
        seeds = () if name == "guardrails" else (options.seed,)
        with torch.no_grad():
            report[name] = globals()[f"measure_{name}"](model, processor, rows, options.batch_size, *seeds)
        write_whole(options.output, json.dumps(report, indent=1) + "\n")
        write_whole(options.output.with_suffix(".md"), markdown(report))
    return report


if __name__ == "__main__":
    main()
