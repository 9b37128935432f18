# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures and markdown tables from the per-sample records of `scenes_evaluation.py`."""

from typing import Any

import numpy as np

from segcompass_hf.metrics import SegmentationAccumulator, bootstrap_intervals

VARIANTS = [
    "own reasoning",
    "reference reasoning",
    "slots shuffled",
    "slots zeroed",
    "reference states zeroed",
    "everything",
    "all objects",
    "one random object",
]


PROTOCOL = """\
Greedy decoding; slots chosen by confidence only; masks at the original image size; union of the predicted masks
against union of the targets. Brackets: 95 % intervals (bootstrap over samples; Wilson for shares). `well-formed`:
share of free generations (no constraint on the format) that are well-formed."""

ABLATIONS = """\
The first two rows are the checkpoint as it is, and with the reference reasoning in place of its own (upper bound).
Then the same checkpoint with the slots of another sample, with its slots set to zero, with its `<REF_POS>` states
set to zero. The last three need no model."""

KINDS = "Own reasoning / reference reasoning (share of right answers; samples)."

LOSSES = """\
`objects read right`: all objects in the first step of the reasoning are those of the reference, with place, size,
colour and shape. `answer right`: the answer's text is the reference's. The losses add up: with the gIoU of the own
reasoning they make 1. `ideal masks` are the targets themselves at the resolution of the model's masks: the ceiling of
any mask decoder."""


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures with intervals from the records of a split."""
    by_variant: dict[str, SegmentationAccumulator] = {}
    for record in records:
        for name, score in record["scores"].items():
            by_variant.setdefault(name, SegmentationAccumulator()).add(score, group=record["kind"])
    metrics = {}
    for name, accumulator in by_variant.items():
        intervals = bootstrap_intervals(accumulator)
        metrics[name] = {
            key: {"value": value, "low": intervals[key][0], "high": intervals[key][1]}
            for key, value in accumulator.compute().items()
        }
    own, reference = by_variant["own reasoning"], by_variant["reference reasoning"]
    return {
        "num_samples": len(records),
        "num_no_target": sum(score.target_pixels == 0 for score in own),
        "metrics": metrics,
        "well_formed": share_interval([record["well_formed"] for record in records]),
        "by_kind": {
            kind: {
                "num_samples": len(own.scores(kind)),
                "own reasoning": own.compute(kind)["gIoU"],
                "reference reasoning": reference.compute(kind)["gIoU"],
                "answer_right": float(np.mean([r["answer_right"] for r in records if r["kind"] == kind])),
            }
            for kind in sorted(own.groups)
        },
        "sources_of_loss": sources_of_loss(records),
    }


def sources_of_loss(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Where gIoU is lost: perception, reasoning, masks, resolution.

    `lost` adds up: 1 = gIoU with own reasoning + all entries. Text errors (own against reference reasoning) are put
    down to perception where the objects listed first differ from the reference's, else to reasoning where only the
    answer differs.
    """
    iou = {name: np.array([r["scores"][name].iou for r in records]) for name in records[0]["scores"]}
    seen, right = (np.array([r[key] for r in records]) for key in ("objects_right", "answer_right"))
    text = iou["reference reasoning"] - iou["own reasoning"]

    def mean_where(values: np.ndarray, where: np.ndarray) -> float | None:
        return float(values[where].mean()) if where.any() else None

    return {
        "objects_right": share_interval(seen.tolist()),
        "answer_right": share_interval(right.tolist()),
        "answer_right_where_objects_right": share_interval(right[seen].tolist()),
        "gIoU_where_answer_right": mean_where(iou["own reasoning"], right),
        "gIoU_where_answer_wrong": mean_where(iou["own reasoning"], ~right),
        "lost": {
            "perception: objects misread, answer wrong": float((text * (~right & ~seen)).mean()),
            "reasoning: objects right, answer wrong": float((text * (~right & seen)).mean()),
            "other text differences, answer right": float((text * right).mean()),
            "slots, heatmaps and mask decoder: reference reasoning against ideal masks": float(
                (iou["ideal masks"] - iou["reference reasoning"]).mean()
            ),
            "resolution: ideal masks against 1": float((1 - iou["ideal masks"]).mean()),
        },
    }


def share_interval(hits: list[bool]) -> dict[str, float | int]:
    """A share with its 95 % Wilson interval (a bootstrap of a share of 0 or 1 would have no width)."""
    n, z = len(hits), 1.96
    if n == 0:
        return {"value": None, "low": 0.0, "high": 1.0, "num_samples": 0}
    share = sum(hits) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return {"value": share, "low": low, "high": high, "num_samples": n}


def markdown_report(report: dict[str, Any]) -> str:
    """The tables of a report as `scenes_evaluation.main` returns it."""
    splits = report["splits"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    seconds = ", ".join(f"{name} {figures['seconds']:.0f} s" for name, figures in splits.items())
    ablations = [
        [name, *(_interval(figures["metrics"][name]["gIoU"]) for figures in splits.values())] for name in VARIANTS
    ]
    parts = [
        f"# Scenes, held out: `{report['model']}`",
        f"Made by\n\n```\n{report['command']}\n```\n\non {report['device']} ({versions}; {seconds}).",
        PROTOCOL,
        "## Own reasoning",
        _own_reasoning(splits),
        "## gIoU of baselines, ablations and the reference reasoning",
        ABLATIONS,
        _table(["gIoU", *splits], ablations),
        "## gIoU by kind of instruction",
        KINDS,
        _by_kind(splits),
        "## Where it is lost",
        LOSSES,
        _losses(splits),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _interval(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _own_reasoning(splits: dict[str, Any]) -> str:
    rows = []
    for name, figures in splits.items():
        own = dict(figures["metrics"]["own reasoning"])
        missing = {"value": None}  # a share of no samples says nothing
        if not figures["num_no_target"]:
            own["N-acc"] = missing
        if figures["num_no_target"] == figures["num_samples"]:
            own["T-acc"] = missing
        cells = [_interval(own[key]) for key in ("gIoU", "cIoU", "N-acc", "T-acc")]
        counts = f"{figures['num_samples']} ({figures['num_no_target']})"
        rows.append([name, counts, *cells, _interval(figures["well_formed"])])
    return _table(["split", "samples (no target)", "gIoU", "cIoU", "N-acc", "T-acc", "well-formed"], rows)


def _by_kind(splits: dict[str, Any]) -> str:
    kinds = sorted({kind for figures in splits.values() for kind in figures["by_kind"]})
    rows = []
    for kind in kinds:
        cells = []
        for figures in splits.values():
            entry = figures["by_kind"].get(kind)
            cells.append(
                f"{entry['own reasoning']:.2f} / {entry['reference reasoning']:.2f} "
                f"({entry['answer_right']:.2f}; {entry['num_samples']})"
                if entry
                else "–"
            )
        rows.append([kind, *cells])
    return _table(["kind", *splits], rows)


def _losses(splits: dict[str, Any]) -> str:
    sources = [figures["sources_of_loss"] for figures in splits.values()]
    rows = [
        ["objects read right", *(_interval(s["objects_right"]) for s in sources)],
        ["answer right", *(_interval(s["answer_right"]) for s in sources)],
        ["answer right, where objects are", *(_interval(s["answer_right_where_objects_right"]) for s in sources)],
        ["gIoU where the answer is right", *(_number(s["gIoU_where_answer_right"]) for s in sources)],
        ["gIoU where the answer is wrong", *(_number(s["gIoU_where_answer_wrong"]) for s in sources)],
        ["gIoU with ideal masks", *(_interval(f["metrics"]["ideal masks"]["gIoU"]) for f in splits.values())],
    ]
    for name in sources[0]["lost"] if sources else []:
        rows.append([f"lost to {name}", *(_number(s["lost"][name]) for s in sources)])
    return _table(["", *splits], rows)
