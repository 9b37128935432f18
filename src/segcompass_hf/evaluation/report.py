# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures as files: json, a table, the result block of a model card, plots, and a page of samples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import write_whole
from ..pages import code_block, markdown_table
from ..printable import printable
from .html_page import samples_page
from .plots import draw_plots
from .records import SAMPLES_FILE
from .rows import EvaluationRows
from .tables import figure_cell, selection_markdown

logger = logging.get_logger(__name__)

SUMMARY_FILE, SAMPLES_PAGE = "summary.json", "samples.html"
PROTOCOL = (
    "Masks at the original image size; union of the predicted masks against union of the targets; every sample "
    "counted. Brackets: 95 % bootstrap intervals over images, all samples of an image together."
)
_METRIC_TITLES = {
    "gIoU": "gIoU (mean of IoU per sample)",
    "cIoU": "cIoU (intersections over unions)",
    "N-acc": "N-acc (samples without target)",
    "T-acc": "T-acc (samples with target)",
    **{f"precision@{t}": f"precision at IoU {t} (samples with target)" for t in (0.5, 0.7, 0.9)},
}


def write_reports(
    output_dir: Path,
    figures: dict[str, Any],
    records: Sequence[dict[str, Any]],
    rows: EvaluationRows,
    page_samples: int = 12,
) -> None:
    """Write `summary.json`, `summary.md`, `model_index.yml`, plots and `samples.html`.

    Args:
        output_dir (`Path`): Where to.
        figures (`dict`): See `figures.summarize`; gets `files`, the names of what was written, and `plots_skipped`
            with the reason where matplotlib is missing.
        records (`Sequence[dict]`): Of all samples.
        rows (`EvaluationRows`): Their images.
        page_samples (`int`, *optional*, defaults to 12): Worst and best samples on the page, so many of each; 0 for no
            page.
    """
    files = [SAMPLES_FILE, SUMMARY_FILE, "summary.md", "model_index.yml"]
    try:
        files += draw_plots(output_dir, figures, records)
    except ImportError as error:
        figures["plots_skipped"] = str(error)
        logger.warning(f"no plots: {error}")
    if page_samples:
        write_whole(output_dir / SAMPLES_PAGE, samples_page(figures, records, rows, page_samples))
        files.append(SAMPLES_PAGE)
    figures["files"] = files
    write_whole(output_dir / "model_index.yml", model_index_yaml(figures))
    write_whole(output_dir / "summary.md", markdown(figures))
    write_whole(output_dir / SUMMARY_FILE, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a page with a table, for a card or an issue."""
    groups = {"all": figures["metrics"]}
    for column in ("source", "kind"):
        by = figures[f"by_{column}"]
        if len(by) > 1:
            groups |= {f"{column}: {name}": metrics for name, metrics in by.items()}
    counts, timing, settings = figures["counts"], figures["timing"], figures["settings"]
    parts = [
        f"# {_code(figures['predictor'])} on {printable(figures['dataset'])}",
        PROTOCOL,
        _table(groups),
        f"{counts['samples']} samples, {counts['no_target']} without target, {counts['several_objects']} with several "
        f"objects; {counts['empty_predictions']} empty predictions.",
        *calibration_lines(figures),
        *selection_markdown(figures),
    ]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} samples have no part in the metrics, for all of their target is ignored.")
    if figures["unreadable"]:
        named = ((row, _code(row["sample_id"])) for row in figures["unreadable"])
        lines = [f"- {row['index']} {name}: {printable(row['problem'])}" for row, name in named]
        parts.append(f"{len(lines)} samples are unreadable and count as failures:\n\n" + "\n".join(lines))
    if "plots_skipped" in figures:
        parts.append(f"No plots: {figures['plots_skipped']}")
    pictures = [name for name in figures.get("files", []) if name.endswith(".png")]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
    if "command" in figures:
        parts.append(f"Made by\n\n{code_block(figures['command'])}")
    made_with = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    parts.append(
        f"Batch size {settings['batch_size']}, {timing['processes']} process(es), device {figures['device']['name']}, "
        f"{timing['process_seconds']} s of computing ({timing['process_seconds_per_sample']} s per sample). Commit "
        f"{figures['commit'] or 'unknown'}; {made_with}."
    )
    parts.append("Settings\n\n```json\n" + json.dumps(settings, indent=1) + "\n```")
    return "\n\n".join(parts) + "\n"


def calibration_lines(figures: dict[str, Any]) -> list[str]:
    """What the scores of masks are worth and how many masks are double, in sentences; `[]` where no mask has one."""
    scores, counts = figures.get("calibration"), figures["counts"]
    if scores is None:
        return []
    ranking = "" if scores["ranking"] is None else f", area under the ROC curve {scores['ranking']:.3f}"
    return [
        f"Scores of {scores['num_masks']} masks: mean {scores['mean_score']:.3f}, {scores['right']:.3f} of the masks "
        f"right (IoU of {scores['right_iou']} or more with an object asked for), expected calibration error "
        f"{scores['expected_calibration_error']:.3f} ({scores['num_bins']} bins of equal width){ranking}. "
        f"{counts['duplicates']} masks show an object that another mask of the answer shows; "
        f"{counts['duplicates_dropped']} such masks were left out."
    ]


def _code(text: Any) -> str:
    """Somebody's name for something, as code within a line."""
    return "`" + printable(text).replace("`", "'") + "`"


def _table(groups: dict[str, dict[str, dict[str, float]]]) -> str:
    names = list(next(iter(groups.values())))
    lines = [
        [group, metrics["gIoU"]["num_samples"], *(figure_cell(metrics[name]) for name in names)]
        for group, metrics in groups.items()
    ]
    return markdown_table(["", "samples", *names], lines)


def model_index(*runs: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a predictor on one or more data sets as the `model-index` of a model card.

    Args:
        runs (`dict`): The figures of each; their predictor is that of the first. A metric that no sample bears on is
            left out.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Reasoning segmentation",
            dataset_type=figures.get("dataset_type") or _as_id(figures["dataset"]),
            dataset_name=figures["dataset"],
            dataset_split=figures.get("dataset_split"),
            metric_type=_as_id(name.replace("@", "-at-")),
            metric_name=_METRIC_TITLES.get(name, name),
            metric_value=round(figure["value"], 4),
        )
        for figures in runs
        for name, figure in figures["metrics"].items()
        if figure["num_samples"]
    ]
    return eval_results_to_model_index(runs[0]["predictor"], results)


def model_index_yaml(*runs: dict[str, Any]) -> str:
    """`model_index` as the block that goes into the YAML at the head of a card."""
    from huggingface_hub.utils import yaml_dump

    return yaml_dump({"model-index": model_index(*runs)}, sort_keys=False)


def _as_id(name: str) -> str:
    return re.sub(r"[^\w./-]+", "-", name.lower()).strip("-")
