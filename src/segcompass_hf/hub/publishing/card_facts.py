# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Facts of a model card that are read from files: parts and sizes of a checkpoint, results of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from ...files import read_json_object
from ...pages import code_block, markdown_table


def architecture_table(folder: Path) -> str:
    """The parts of a checkpoint or adapter with their sizes, as a Markdown table."""
    parameters, size = weight_counts(folder)
    lines = []
    if (folder / "adapter_config.json").is_file():
        config = read_json_object(folder / "adapter_config.json")
        method, rank, alpha = (config.get(name) for name in ("peft_type", "r", "lora_alpha"))
        lines.append(["adapter", f"{method}, rank {rank}, alpha {alpha}"])
        saved = sorted({name.split(".")[0] for name in config.get("modules_to_save") or []})
        lines.append(["trained whole", ", ".join(saved) or "nothing"])
    else:
        try:
            lines += _model_lines(read_json_object(folder / "config.json"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"config.json is not that of a SegCompass ({type(error).__name__}: {error}).") from error
    lines.append(["weights", f"{parameters / 1e6:,.1f} million, {size / 1e6:,.1f} MB"])
    return markdown_table(["part", ""], lines)


def _model_lines(config: dict[str, Any]) -> list[list[str]]:
    vlm, sae, sam = config["vlm_config"], config["sae_config"], config["sam_config"]
    text, vision = vlm.get("text_config") or vlm, sam.get("vision_config") or {}
    layers, width = text.get("num_hidden_layers"), text.get("hidden_size")
    sae_text = f"{sae['d_sae']:,} features ({sae['architecture']}) on `hidden_states[{config['sae_layer']}]`, frozen"
    canvas = (sam.get("prompt_encoder_config") or vision).get("image_size", 1024)
    canvas = canvas if isinstance(canvas, int) else canvas[0]
    kind, depth = sam.get("model_type", "sam"), vision.get("num_hidden_layers")
    facts = [kind] * (kind != "sam") + [f"{depth} layers"] * (depth is not None) + [f"{canvas} x {canvas} pixels"]
    return [
        ["VLM", f"{vlm['model_type']}, {layers} layers of width {width:,}"],
        ["SAE", sae_text],
        ["slots", str(config["num_slots"])],
        ["SAM", ", ".join(facts)],
        ["scores", _scores_text(config.get("score_calibration"))],
    ]


def _scores_text(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "plain confidences, not calibrated"
    fit = calibration.get("fit") or {}
    on = f" on {fit['num_masks']} masks of {fit['dataset']}" if {"num_masks", "dataset"} <= fit.keys() else ""
    return f"calibrated{on}, from {', '.join(calibration['features'])}"


def weight_counts(folder: Path) -> tuple[int, int]:
    """Numbers and bytes of the weight files of a folder, from their headers."""
    from safetensors import safe_open

    parameters = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("concepts"):
            continue
        size += path.stat().st_size
        with safe_open(path, framework="np") as file:
            parameters += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return parameters, size


def base_of_adapter(folder: Path) -> str | None:
    """What an adapter names as its base; `None` for a model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    base = read_json_object(path).get("base_model_name_or_path")
    if not base:
        raise ValueError("the adapter does not say which model it was trained on; pass base_model=.")
    return base


def results_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """One line per data set, metrics with their intervals; empty without evaluations."""
    if not evaluations:
        return ""
    from ...evaluation.tables import figure_cell, selection_markdown

    names = list(evaluations[0]["metrics"])
    lines = [
        [run["dataset"], run["counts"]["samples"], *(figure_cell(run["metrics"].get(name)) for name in names)]
        for run in evaluations
    ]
    table = markdown_table(["data set", "samples", *names], lines)
    parts = [table, scores_table(evaluations), *selection_markdown(*evaluations)]
    return "\n\n".join(part for part in parts if part)


def scores_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """What the scores of masks are worth, one line per data set; empty where no evaluation says so."""
    runs = [run for run in evaluations if run.get("calibration")]
    if not runs:
        return ""
    lines = []
    for run in runs:
        scores = run["calibration"]
        ranking = "–" if scores["ranking"] is None else f"{scores['ranking']:.3f}"
        shares = [f"{scores[name]:.3f}" for name in ("mean_score", "right", "expected_calibration_error")]
        lines.append([run["dataset"], scores["num_masks"], *shares, ranking, run["counts"].get("duplicates", "–")])
    names = ["data set", "masks", "mean score", "right", "calibration error", "ranking", "duplicates"]
    meant = runs[0]["calibration"]
    how = (
        f"Scores of masks. Right: IoU of {meant['right_iou']} or more with an object asked for. Calibration error: "
        f"mean distance of score and share of right masks over {meant['num_bins']} bins of equal width (expected "
        "calibration error, lower is better). Ranking: how often a right mask has a higher score than a wrong one "
        "(area under the ROC curve). Duplicates: masks of an answer that show the object of another."
    )
    return f"{how}\n\n{markdown_table(names, lines)}"


def results_how(evaluations: Sequence[dict[str, Any]]) -> str:
    """Commands, versions, precision and machine of the evaluations."""
    if not evaluations:
        return ""
    parts = []
    commands = list(dict.fromkeys(run["command"] for run in evaluations if run.get("command")))
    if commands:
        parts.append("Made by\n\n" + code_block("\n".join(commands)))
    first = evaluations[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    precision = first["settings"]["predictor"].get("dtype", "unknown precision")
    commits = list(dict.fromkeys((run["commit"] or "unknown")[:8] for run in evaluations))
    parts.append(
        f"In {precision}, batch size {first['settings']['batch_size']}, on {first['device']['name']}; "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}; {versions}."
    )
    unreadable = sum(run["counts"]["unreadable"] for run in evaluations)
    if unreadable:
        parts.append(f"{unreadable} samples could not be read and count as failures.")
    return "\n\n".join(parts)


__all__ = ["architecture_table", "base_of_adapter", "results_how", "results_table", "scores_table", "weight_counts"]
