# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What reinforcement could reach: how often one of several samples of a prompt is right, written down as a prediction.

An answer is right where it chose the objects asked for and no others ([`chosen_objects`]), however well it drew them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json_object, write_whole
from ..metrics.answers import chosen_objects, is_right_choice, mixed_at_k, pass_at_k
from ..metrics.intervals import bootstrap_ratios, sums_by_image
from ..metrics.segmentation import score_sample
from ..pages import code_block, markdown_table
from .environment import commit, device, versions
from .figures import UNNAMED
from .prediction import Prediction
from .processes import Processes
from .rows import EvaluationRow, EvaluationRows
from .runner import alone_in_results, check_settings, finished_records, run_batches
from .tables import figure_cell

KS = (1, 4, 16, 64)
PROMPTS_FILE, PREDICTION_FILE = "prompts.jsonl", "prediction.json"
WELL_DRAWN_IOU = 0.5  # of an answer's masks with the targets, unions compared
_HOW = (
    "Written before training. Every prompt is answered {samples} times at temperature {temperature:g}. Right: the "
    "answer chose the objects asked for and no others. pass@k: chance that one of k samples is right. mixed@k: chance "
    "that k samples hold right and wrong ones, where rewards of a group of k have something to compare. Both without "
    "bias from all samples; brackets: 95 % bootstrap intervals over images."
)
_MEANING = (
    "Reinforcement makes likelier what is sampled already: pass@1 after training can be expected between pass@1 and "
    "pass@k (k: completions of a group) of today, and little more. Kinds with a mixed@k near 0 teach nothing: where "
    "pass@k is low too, they need reference reasoning first; where pass@1 is near 1, they are known."
)
FIGURES = ("pass", "mixed", "well_drawn")


def measure_pass_at_k(
    predictor: Any,
    dataset: Any,
    output_dir: str | os.PathLike,
    ks: Sequence[int] = KS,
    batch_size: int = 8,
    num_samples: int | None = None,
    dataset_name: str = "dataset",
    unreadable: str = "error",
    resume: bool = True,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Sample answers of every row, and write what share of k of them is right.

    Resumable and for several processes, as [`evaluate_dataset`].

    Args:
        predictor ([`SamplingPredictor`]): Or what has its `num_samples`, `max(ks)` or more, and gives so many
            predictions of every row.
        dataset, output_dir, batch_size, num_samples, dataset_name, unreadable, resume, notes: As of
            [`evaluate_dataset`]; `num_samples` counts rows.
        ks (`Sequence[int]`, *optional*): Numbers of samples.

    Returns:
        `dict`: what `prediction.json` holds: `all` and `by_kind`, each with `num_prompts`, `num_images`, shares of the
        prompts of which no, some or every sample was right (`never`, `sometimes`, `always`), and by k `pass`, `mixed`
        and `well_drawn` (as `pass`, of answers with an IoU of 0.5 or more), each with its interval.

    Raises:
        ValueError: Fewer samples than the largest k, or as of [`evaluate_dataset`].
    """
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1 or ks[-1] > predictor.num_samples:
        raise ValueError(
            f"k is {list(ks)} and {predictor.num_samples} samples are drawn; expected 1 or more, up to the samples."
        )
    check_settings(batch_size, unreadable)
    processes, output_dir = Processes.current(), Path(output_dir)
    rows = EvaluationRows(dataset, num_samples)
    with alone_in_results(output_dir) if processes.is_main else nullcontext():
        settings, _ = run_batches(
            predictor, rows, output_dir, batch_size, dataset_name, unreadable, resume, processes, record_of, _failed
        )
        figures = None
        if processes.is_main:
            records = finished_records(output_dir, rows, unreadable)
            run = {"predictor": predictor.name, "dataset": dataset_name, "settings": settings, **(notes or {})}
            figures = _figures(records, ks, run)
            kept = ({name: value for name, value in record.items() if name != "seconds"} for record in records)
            write_whole(output_dir / PROMPTS_FILE, "".join(json.dumps(record) + "\n" for record in kept))
            write_whole(output_dir / PREDICTION_FILE, json.dumps(figures, indent=1) + "\n")
            write_whole(output_dir / "prediction.md", prediction_markdown(figures))
    return processes.from_main(figures)


def record_of(row: EvaluationRow, answers: Sequence[Prediction]) -> dict[str, Any]:
    """What is kept of a prompt: `index`, `sample_id`, `image_id`, `source`, `kind`, `right` (of each sample, 0 or 1),
    `iou` (of each, in [0, 1]), `right_reasoning` (of right samples, each wording once), `problem`."""
    chosen = [chosen_objects(answer.masks, row.read_targets, row.others, row.ignore) for answer in answers]
    scores = [score_sample(answer.masks, row.targets, row.ignore) for answer in answers]
    right = [is_right_choice(objects, len(row.read_targets)) for objects in chosen]
    reasonings = [answer.reasoning for answer, is_right in zip(answers, right, strict=True) if is_right]
    return {
        **_described(row),
        "right": [int(is_right) for is_right in right],
        "iou": [round(float(score.iou), 6) for score in scores],
        "right_reasoning": list(dict.fromkeys(filter(None, reasonings))),
        "problem": None,
    }


def _failed(row: EvaluationRow) -> dict[str, Any]:
    return {**_described(row), "right": [], "iou": [], "right_reasoning": [], "problem": row.problem}


def _described(row: EvaluationRow) -> dict[str, Any]:
    names = ("sample_id", "image_id", "source", "kind")
    return {"index": row.index, **{name: row.columns.get(name) for name in names}}


def _figures(records: Sequence[dict[str, Any]], ks: Sequence[int], run: dict[str, Any]) -> dict[str, Any]:
    read = [record for record in records if record["problem"] is None]
    kinds = sorted({record["kind"] or UNNAMED for record in read})
    return {
        **run,
        "k": list(ks),
        "all": _group(read, ks),
        "by_kind": {kind: _group([one for one in read if (one["kind"] or UNNAMED) == kind], ks) for kind in kinds},
        "unreadable": [record["sample_id"] for record in records if record["problem"] is not None],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "device": device(),
    }


def _group(records: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """Figures of some prompts."""
    images = [record["image_id"] or f"row {record['index']}" for record in records]
    counts = [(sum(record["right"]), len(record["right"])) for record in records]
    drawn = [sum(iou >= WELL_DRAWN_IOU for iou in record["iou"]) for record in records]
    values = {}  # by k and figure, of every prompt
    for k in ks:
        values[k, "pass"] = [pass_at_k(right, number, k) for right, number in counts]
        values[k, "mixed"] = [mixed_at_k(right, number, k) for right, number in counts]
        values[k, "well_drawn"] = [pass_at_k(well, number, k) for well, (_, number) in zip(drawn, counts, strict=True)]
    its = _with_intervals(values, images)
    by_k = {str(k): {name: its[k, name] for name in FIGURES} for k in ks}
    total = max(len(records), 1)
    return {
        "num_prompts": len(records),
        "num_images": len(set(images)),
        "never": sum(right == 0 for right, _ in counts) / total,
        "sometimes": sum(0 < right < number for right, number in counts) / total,
        "always": sum(right == number for right, number in counts) / total,
        "by_k": by_k,
    }


def _with_intervals(values: dict[Any, list[float]], images: Sequence[Hashable]) -> dict[Any, dict[str, Any]]:
    """Means over the prompts, whose images are drawn again for the intervals: the same ones for every figure."""
    if not images:
        return dict.fromkeys(values, {"value": None, "low": None, "high": None, "num_samples": 0})
    columns = np.column_stack([*values.values(), np.ones(len(images))])
    *sums, counts = sums_by_image(columns, images).T  # (num_images,) each
    terms = {name: (part, counts) for name, part in zip(values, sums, strict=True)}
    bounds = bootstrap_ratios(terms, len(counts))
    found = {}
    for name, its in values.items():
        low, high = bounds[name] or (None, None)
        found[name] = {"value": float(np.mean(its)), "low": low, "high": high, "num_samples": len(its)}
    return found


def prediction_markdown(figures: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""
    settings = figures["settings"]["predictor"]
    groups = {"all": figures["all"]} | figures["by_kind"]
    how = _HOW.format(samples=settings["num_samples"], temperature=settings["temperature"])
    lines = [f"# Prediction: {figures['predictor']} on {figures['dataset']}", how, _MEANING]
    titles = {"pass": "pass@{}", "mixed": "mixed@{}", "well_drawn": f"IoU of {WELL_DRAWN_IOU} or more, pass@{{}}"}
    for name, title in titles.items():
        ks = [k for k in figures["k"] if name != "mixed" or k > 1]
        head = ["kind", "prompts", *(title.format(k) for k in ks)]
        cells = [
            [group, its["num_prompts"], *(figure_cell(its["by_k"][str(k)][name]) for k in ks)]
            for group, its in groups.items()
        ]
        lines.append(markdown_table(head, cells))
    shares = [
        [group, *(f"{its[name]:.3f}" for name in ("never", "sometimes", "always"))] for group, its in groups.items()
    ]
    lines.append(markdown_table(["share of prompts", "never right", "sometimes", "always"], shares))
    if "command" in figures:
        lines.append(code_block(figures["command"]))
    lines.append(f"{figures['date']}, commit {figures['commit']}.")
    return "\n\n".join(lines) + "\n"


def read_pass_rates(folder: str | os.PathLike) -> dict[str, float]:
    """Share of right samples by `sample_id`, of the prompts that [`measure_pass_at_k`] measured.

    Raises:
        ValueError: The folder holds no finished measurement.
    """
    records = read_prompts(folder)
    return {one["sample_id"]: sum(one["right"]) / len(one["right"]) for one in records if one["right"]}


def read_prompts(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of [`measure_pass_at_k`], see [`record_of`].

    Raises:
        ValueError: The folder holds no finished measurement.
    """
    try:
        read_json_object(Path(folder) / PREDICTION_FILE)  # written last
        records = [json.loads(line) for line in (Path(folder) / PROMPTS_FILE).read_text("utf-8").splitlines()]
        lacking = [
            name for record in records for name in ("sample_id", "right", "right_reasoning") if name not in record
        ]
        if lacking or not records:
            raise ValueError(f"{PROMPTS_FILE} lacks {lacking[0] if lacking else 'prompts'}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(folder)!r} holds no measured pass rates ({error}); write them with `segcompass evaluate "
            "--pass-at-k --dataset ... --output FOLDER`."
        ) from error
    return records


__all__ = ["KS", "measure_pass_at_k", "prediction_markdown", "read_pass_rates", "read_prompts"]
