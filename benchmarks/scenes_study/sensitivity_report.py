"""Table and plot of `sensitivity.py` from its records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from runs import write_json
from settings import RESULTS

from segcompass_hf.metrics.intervals import bootstrap_statistic

COLOUR, INK, GREY = "#2A9DF4", "#1F2430", "#8A8F98"


def report(runs: Path, names: list[str], defaults: dict[str, Any], output: Path | None = None) -> None:
    """Write json, md and png of the records there are, in `runs` or in the json written before; say which are missing.

    Args:
        runs (`Path`): one folder per setting, with `record.json`.
        names (`list[str]`): folders of all settings, the default first.
        defaults (`dict`): factor -> the default's value.
        output (`Path`, *optional*): path without ending.
    """
    output = output or RESULTS / "sensitivity"
    records = _earlier(output.with_suffix(".json"), names)
    paths = {name: runs / name / "record.json" for name in names}
    records |= {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    missing = [name for name in names if name not in records]
    if missing:
        print(f"not done: {', '.join(missing)}")
    if names[0] in missing:
        return
    records = {name: records[name] for name in names if name in records}
    default = records.pop(names[0])
    for record in records.values():
        record["difference"] = _difference(record["ious"], default["ious"])
    table = _table(default, records, defaults, missing)
    write_json(output.with_suffix(".json"), {"default": default, "settings": records, "missing": missing})
    output.with_suffix(".md").write_text(table)
    _plot(default, records, defaults).savefig(output.with_suffix(".png"))
    print(table)


def _earlier(path: Path, names: list[str]) -> dict[str, dict]:
    """Records in a report that was written before, by other machines perhaps."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    records = {names[0]: report["default"], **report["settings"]}
    return {name: record for name, record in records.items() if name in names}


def _difference(ious: list[float], of_default: list[float]) -> dict[str, float]:
    """gIoU less the default's, the same scenes drawn for both."""
    gains = np.array(ious) - np.array(of_default)
    return bootstrap_statistic(lambda draw: gains[draw].mean(), len(gains))


def _table(default: dict, records: dict[str, dict], defaults: dict[str, Any], missing: list[str]) -> str:
    stages = ", ".join(f"{name} {stage['steps']}" for name, stage in default["stages"].items())
    minutes = default["cpu_minutes"] + sum(record["cpu_minutes"] for record in records.values())
    commits = sorted({record["commit"] for record in (default, *records.values())})
    lines = [
        "# Sensitivity",
        "",
        f"`python benchmarks/scenes_study/sensitivity.py --model runs/previous`; steps: {stages}; gIoU on "
        f"{len(default['ious'])} scenes of `val`, greedy, own reasoning, 95 % intervals over scenes, differences "
        f"paired; one seed. {minutes:.0f} CPU minutes, commits {', '.join(commits)}.",
        "",
        "Explained variance, L0 and dead features are the SAE's on states it was trained on; features per token are "
        "those that pass the threshold, on held-out scenes.",
        "",
        "| factor | value | explained variance | L0 | dead | features per token | gIoU | less default |",
        "|---|---|---|---|---|---|---|---|",
        _line("default", "", default, ""),
    ]
    for factor in defaults:
        of_factor = [record for record in records.values() if record["factor"] == factor]
        for record in of_factor:
            lines.append(_line(factor, record["value"], record, _shown(record["difference"], "+.3f")))
    lines += ["", "Default: " + ", ".join(f"{factor} {value}" for factor, value in defaults.items()) + "."]
    if missing:
        lines += ["", f"Not done: {', '.join(missing)}."]
    return "\n".join([*lines, ""])


def _line(factor: str, value: Any, record: dict, difference: str) -> str:
    sae = record["sae"]
    figures = f"{sae['explained_variance']:.3f} | {sae['l0']:.1f} | {sae['dead_features']:.1%}"
    cells = (factor, str(value), figures, f"{record['features_per_token']:.1f}", _shown(record["giou"]), difference)
    return f"| {' | '.join(cells)} |"


def _shown(figure: dict[str, float], form: str = ".3f") -> str:
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def _plot(default: dict, records: dict[str, dict], defaults: dict[str, Any]) -> Any:
    """One panel per factor: gIoU with its interval, the default in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=120, layout="constrained")
    panels = figure.subplots(2, -(-len(defaults) // 2), sharey=True).flat
    for (factor, value), axes in zip(defaults.items(), panels, strict=False):
        points = [(record["value"], record["giou"]) for record in records.values() if record["factor"] == factor]
        points.append((value, default["giou"]))
        if not isinstance(value, str):
            points.sort(key=lambda point: point[0])
        for place, (name, giou) in enumerate(points):
            spread = [[max(0, giou["value"] - giou["low"])], [max(0, giou["high"] - giou["value"])]]
            colour = GREY if name == value else COLOUR
            axes.errorbar(place, giou["value"], spread, fmt="o", color=colour, ecolor=INK, capsize=3)
        names = [str(name) for name, _ in points]
        axes.set_xticks(range(len(names)), names, rotation=30 if isinstance(value, str) else 0, fontsize=8)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(factor, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:  # what is left has no factor
        axes.set_visible(False)
    figure.supylabel("gIoU, 95 % interval", fontsize=10)
    return figure
