# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Controls of a model on a data set: records, figures and table into one folder; started again, it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoint import load_checkpoint
from ...files import weights_digest, write_whole
from ..journal import measured_records
from .figures import compared_figures, controls_figures, seed_figures
from .measure import measure_controls
from .reasoning import Objects
from .report import controls_markdown
from .seeds import match_features

OTHERS = ("random_sae", "reseeded_sae")


def run_controls(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    output: Path,
    objects: Callable[[dict[str, Any]], Objects],
    *,
    title: str,
    command: str,
    others: Mapping[str, str] | None = None,
    seed: int = 0,
    report: Callable[[str, int], None] = lambda name, number: None,
) -> dict[str, Any]:
    """Measure every control and write `controls.json`, `controls.md` and the records, JSON lines by model.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model whose explanations are held against the controls.
        processor ([`SegCompassProcessor`]): Its processor.
        rows (`Sequence[dict]`): In the row schema.
        output (`Path`): Folder, which is there.
        objects (`Callable`): See [`measure_controls`].
        title, command (`str`): Of the table: model and data set; what was typed.
        others (`Mapping[str, str]`, *optional*): `random_sae`, `reseeded_sae` -> folder or Hub id of a checkpoint, its
            slots trained in the same way with such an SAE, of the same VLM.
        seed (`int`, defaults to 0): Of everything that is drawn.
        report (`Callable`): Told model (`this` or one of `others`) and rows done, after each row.

    Returns:
        `dict`: the figures, as in `controls.json`.

    Raises:
        ValueError: The folder holds records of other weights or data, or there are no rows.
    """
    if not len(rows):
        raise ValueError("there are no rows to measure controls on.")

    def records_of(name: str, one: Any, its_processor: Any) -> list[dict[str, Any]]:
        settings = {"weights": weights_digest(one), "title": title, "seed": seed, "objects": objects.__name__}
        return measured_records(
            output / f"{name}.jsonl",
            settings,
            rows,
            lambda number, row: asdict(measure_controls(one, its_processor, row, objects, seed + number)),
            lambda number: report(name, number),
        )

    records = records_of("this", model, processor)
    figures = controls_figures(records)
    others = others or {}
    for name in (name for name in OTHERS if name in others):
        other, its_processor, _ = load_checkpoint(others[name], model.device)
        figures[name] = compared_figures(records, records_of(name, other, its_processor))
        features = name.replace("_sae", "_features")
        figures[features] = seed_figures(match_features(model, other.eval(), processor, rows))
    figures = {"title": title, "command": command, "seed": seed} | figures
    plain = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # JSON knows no NaN
    write_whole(output / "controls.json", json.dumps(plain, indent=1) + "\n")
    write_whole(output / "controls.md", controls_markdown(figures, title, command))
    return figures


__all__ = ["OTHERS", "run_controls"]
