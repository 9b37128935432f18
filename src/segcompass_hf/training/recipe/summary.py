# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One page about a run of a recipe: curves, settings and times of every stage, versions, commands."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any

from ...evaluation.environment import commit, device, versions
from ...evaluation.plots import INK, TARGET_COLOUR
from ...files import write_whole
from .record import DONE, read_record
from .settings import Recipe

PAGE, FIGURES = "summary.html", "summary.json"  # in the recipe's output_dir
NOT_DRAWN = ("step", "epoch", "total_flos", "grad_norm", "nonfinite_steps")
MAX_CURVES = 12  # of a stage
COLUMNS = 4

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1f2430; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
img {{ width: 100% }} table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ text-align: left; padding: 0 1em 0 0 }}
pre {{ background: #f3f4f7; padding: .6em; overflow-x: auto }} section {{ border-top: 1px solid #d5d9e0 }}
</style></head><body>
<h1>{title}</h1>
<p>Result: <code>{result}</code></p>
<pre>{command}</pre>
{stages}
<section><h2>Made with</h2><table>{versions}</table></section>
</body></html>
"""


def write_summary(recipe: Recipe, result: Path, command: str) -> Path:
    """Write `summary.json` and `summary.html`, which needs no other file, from the records of the stages.

    Args:
        recipe ([`Recipe`]): All of whose stages are done.
        result (`Path`): Folder of what was trained.
        command (`str`): What was typed.
    """
    output = Path(recipe.settings.output_dir)
    stages = [read_record(stage.folder, DONE) for stage in recipe.stages]
    figures = {
        "recipe": str(recipe.path),
        "command": command,
        "result": str(result),
        "stages": [{name: value for name, value in stage.items() if name != "log"} for stage in stages],
        "versions": versions(),
        "commit": commit(),
        "device": device(),
    }
    write_whole(output / FIGURES, json.dumps(figures, indent=1) + "\n")
    made_with = figures["versions"] | {"commit": figures["commit"]} | figures["device"]
    page = _PAGE.format(
        title=escape(f"{recipe.path.name}: {', '.join(stage['stage'] for stage in stages)}"),
        result=escape(str(result)),
        command=escape(command),
        stages="\n".join(map(_section, stages)),
        versions=_table(made_with),
    )
    write_whole(output / PAGE, page)
    return output / PAGE


def curves(log: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> steps and values, of everything that a trainer logged at more than one step.

    Args:
        log (`list[dict]`): `trainer.state.log_history`.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in log:
        for name, value in line.items():
            if name not in NOT_DRAWN and isinstance(value, Real) and not name.endswith(("_runtime", "_per_second")):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(float(value))
    return {name: curve for name, curve in found.items() if len(curve[0]) > 1}


def _section(stage: dict[str, Any]) -> str:
    times = {
        "steps": stage["steps"],
        "processes": stage["processes"],
        "started": ", ".join(stage["starts"]),
        "done": stage["done"],
        "seconds of the last start": stage["seconds"],
    }
    picture = _picture(curves(stage["log"]))
    last = {}
    for line in stage["log"]:
        last |= {name: value for name, value in line.items() if name not in ("step", "epoch")}
    return (
        f"<section><h2>{escape(stage['stage'])}</h2><table>{_table(times)}</table>{picture}"
        f"<details><summary>settings</summary><table>{_table(stage['fingerprint'])}</table></details>"
        f"<details><summary>last figures</summary><table>{_table(last)}</table></details></section>"
    )


def _table(values: dict[str, Any]) -> str:
    rows = (f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in values.items())
    return "".join(rows)


def _picture(drawn: dict[str, tuple[list[int], list[float]]]) -> str:
    """Small plots side by side, as a `data:` address; words where there is nothing to draw or to draw with."""
    names = sorted(drawn, key=lambda name: (name != "loss", name.startswith("eval"), list(drawn).index(name)))
    names = names[:MAX_CURVES]
    if not names:
        return "<p>Too few steps for a curve.</p>"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>Curves need matplotlib: pip install 'segcompass_hf[demo]'.</p>"
    num_rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(11, 2.1 * num_rows), dpi=100, layout="constrained")
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(num_rows, COLUMNS, number)
        axes.plot(*drawn[name], color=TARGET_COLOUR, linewidth=1.2)
        axes.set_title(name, fontsize=8, color=INK)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="curves: {escape(", ".join(names))}" src="data:image/png;base64,{encoded}">'


__all__ = ["FIGURES", "PAGE", "curves", "write_summary"]
