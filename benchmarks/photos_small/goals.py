"""The figures of photos-small beside its goals, from an evaluation of `examples/evaluate.py`:

    python examples/evaluate.py --model CHECKPOINT --datasets runs/photos-small/rows:held_out \\
        --baselines everything largest-object all-objects sam-box ideal-masks --output out/evaluation
    python benchmarks/photos_small/goals.py out/evaluation/rows-held_out --output benchmarks/results/photos_small/goals

Goals and floors are those of PROTOCOL.md. Baselines that answer without understanding, and two that are told where the
right objects are, stand beside the model. Intervals are over photographs. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from segcompass_hf.evaluation import read_samples
from segcompass_hf.evaluation.tables import figure_cell, selection_markdown
from segcompass_hf.files import write_whole
from segcompass_hf.pages import markdown_table

# Figure -> kind (`None` for all), metric, goal, floor.
GOALS = {
    "all of a category but person": ("all", "gIoU", 0.45, 0.37),
    "people": ("people", "gIoU", 0.65, 0.60),
    "one person among several": ("one person", "gIoU", 0.50, 0.37),
    "use": ("use", "gIoU", 0.40, None),
    "no-target accuracy": (None, "N-acc", 0.80, None),
    "target accuracy": (None, "T-acc", 0.80, None),  # at the same threshold
}


def evaluations(folder: Path) -> dict[str, Path]:
    """Name -> folder of everything that was evaluated on a data set, the model first."""
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/summary.json"))}
    models = [name for name, path in found.items() if "configuration" in summary(path)["settings"]["predictor"]]
    if len(models) != 1:
        raise SystemExit(f"{folder} holds evaluations of {len(models)} models ({', '.join(found)}); one is needed.")
    return {models[0]: found[models[0]], **found}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def figure_of(figures: dict[str, Any], kind: str | None, metric: str) -> dict[str, float] | None:
    """A figure with its interval; `None` where no sample bears on it."""
    metrics = figures["metrics"] if kind is None else figures["by_kind"].get(kind, {})
    found = metrics.get(metric)
    return found if found and found["num_samples"] else None


def held_against(runs: dict[str, dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per goal; the first of the runs is the model's."""
    model, lines = next(iter(runs)), []
    for title, (kind, metric, goal, floor) in GOALS.items():
        figure = figure_of(runs[model], kind, metric)
        images = {record["image_id"] for record in records if kind in (None, record["kind"])}
        line = {"figure": title, "metric": metric, "kind": kind, "goal": goal, "floor": floor, "measured": figure}
        line |= {"photographs": len(images), "met": figure is not None and figure["value"] >= goal}
        line["above_floor"] = None if floor is None or figure is None else figure["value"] >= floor
        line["baselines"] = {name: figure_of(run, kind, metric) for name, run in runs.items() if name != model}
        lines.append(line)
    return lines


def markdown(result: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    model, rows = next(iter(runs)), []
    for line in result["goals"]:
        values = [figure["value"] if figure else None for figure in line["baselines"].values()]
        reached = "met" if line["met"] else "not met" if line["measured"] else "not measured"
        reached += "" if line["above_floor"] in (None, True) else ", below the floor"
        rows.append(
            [
                *(line["figure"], line["metric"], figure_cell(line["measured"]), line["goal"], line["floor"] or "–"),
                *(reached, (line["measured"] or {"num_samples": 0})["num_samples"], line["photographs"]),
                *("–" if value is None else f"{value:.3f}" for value in values),
            ]
        )
    baselines = [name for name in runs if name != model]
    kinds = [[kind, *(figure_cell(figure_of(run, kind, "gIoU")) for run in runs.values())] for kind in result["kinds"]]
    parts = [
        f"# {model} on {runs[model]['dataset']}",
        f"`{result['command']}`",
        f"{runs[model]['counts']['samples']} questions to {result['photographs']} photographs, the model's own "
        "reasoning, greedy. Brackets: 95 % intervals, photographs drawn with all of their questions.",
        markdown_table(
            ["figure", "", "measured", "goal", "floor", "", "questions", "photographs", *baselines],
            rows,
        ),
        "gIoU by kind of question:",
        markdown_table(["kind", *runs], kinds),
        *selection_markdown(runs[model]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="the data set's folder below the output of examples/evaluate.py")
    parser.add_argument("--output", type=Path, required=True, help="path of the results without ending")
    given = parser.parse_args()
    folders = evaluations(given.evaluation)
    runs = {name: summary(folder) for name, folder in folders.items()}
    model = next(iter(runs))
    records = read_samples(folders[model])
    for name, run in runs.items():
        if run["settings"]["dataset"] != runs[model]["settings"]["dataset"]:
            raise SystemExit(f"{name} was evaluated on other rows than {model}; evaluate all in one command.")
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "model": model,
        "dataset": runs[model]["dataset"],
        "photographs": len({record["image_id"] for record in records}),
        "goals": held_against(runs, records),
        "kinds": list(runs[model]["by_kind"]),
        "all_met": False,
        "runs": {
            name: {
                entry: run[entry] for entry in ("settings", "counts", "metrics", "by_kind", "selection", "calibration")
            }
            for name, run in runs.items()
        },
        **{name: runs[model][name] for name in ("date", "versions", "commit", "device")},
    }
    result["all_met"] = all(line["met"] for line in result["goals"])
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(given.output.with_suffix(".md"), markdown(result, runs))
    print(markdown(result, runs))


if __name__ == "__main__":
    main()
