"""Speed against accuracy: gIoU and latency for `reasoning="full" | "short" | "none"`, as a curve.

    python benchmarks/scenes_study/speed.py --model bundled --num-samples 200

One sample at a time, from the picture to masks at its size, on two threads. Every sample is answered with all
settings, in a new order, before the next one comes, so that whatever else the machine does meets all settings alike.
`short` is tried with several caps on the reasoning. Writes speed.json, speed.md and speed.png.
"""

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import commit, counted, write_json
from settings import EVALUATION_SEED, RESULTS, RUNS
from transformers import AutoModel, AutoProcessor

from segcompass_hf import bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.metrics import score_sample
from segcompass_hf.metrics.intervals import bootstrap_statistic

CAPS = (1, 4, 8, 16, 32, 48, 64)  # tokens of reasoning
THREADS = 2
COLOUR, INK = "#2A9DF4", "#1F2430"


def answer(model: Any, processor: Any, row: dict, reasoning: str, cap: int | None) -> tuple[np.ndarray, int, dict]:
    """Masks, tokens written, and seconds of wall and of CPU time."""
    if cap is not None:
        model.config.short_reasoning_tokens = cap
    wall, cpu = time.perf_counter(), time.process_time()
    inputs = processor(images=row["image"], instruction=row["instruction"])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    output = model.segment(**inputs, reasoning=reasoning)
    result = processor.post_process_segmentation(output, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0]
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result["masks"].numpy(), int(output.completion_mask.sum()), seconds


def measure(model: Any, processor: Any, rows: list[dict], settings: dict[str, tuple[str, int | None]]) -> dict:
    """Per setting lists over the samples: `iou`, `wall` and `cpu` seconds, `tokens` written."""
    measured: dict[str, dict[str, list]] = {
        name: {key: [] for key in ("iou", "wall", "cpu", "tokens")} for name in settings
    }
    for setting in settings.values():  # the first calls warm up
        answer(model, processor, rows[0], *setting)
    order = random.Random(0)
    for row in rows:
        targets = decode_masks(row["masks"], row["image"].size[::-1])
        for name in order.sample(list(settings), len(settings)):
            masks, tokens, seconds = answer(model, processor, row, *settings[name])
            values = {"iou": score_sample(masks, targets).iou, "tokens": tokens, **seconds}
            for key, value in values.items():
                measured[name][key].append(value)
    return measured


def figures_of(measured: dict[str, dict[str, list]]) -> dict[str, dict[str, Any]]:
    """Means with 95 % intervals over samples (latency: median), and the paired difference in gIoU to `full`."""
    full = np.array(measured["full"]["iou"])
    figures = {}
    for name, values in measured.items():
        iou, wall, cpu = (np.array(values[key]) for key in ("iou", "wall", "cpu"))
        number, gain = len(iou), iou - full
        figures[name] = {
            "giou": bootstrap_statistic(lambda draw, of=iou: of[draw].mean(), number),
            "less_full": bootstrap_statistic(lambda draw, of=gain: of[draw].mean(), number),
            "latency": bootstrap_statistic(lambda draw, of=wall: np.median(of[draw]), number),
            "cpu_seconds": bootstrap_statistic(lambda draw, of=cpu: of[draw].mean(), number),
            "tokens": float(np.mean(values["tokens"])),
        }
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = ["| reasoning | tokens written | median latency, ms | CPU time, ms | gIoU | less `full` |"]
    lines.append("|---|---|---|---|---|---|")
    for name, figure in figures.items():
        milliseconds = [_shown(figure[key], ".0f", 1000) for key in ("latency", "cpu_seconds")]
        gious = [_shown(figure["giou"], ".3f"), _shown(figure["less_full"], "+.3f")]
        cells = [name, format(figure["tokens"], ".0f"), *milliseconds, *gious]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _shown(figure: dict[str, float], form: str, factor: float = 1.0) -> str:
    value, low, high = (factor * figure[name] for name in ("value", "low", "high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def plot(figures: dict[str, dict[str, Any]]) -> Any:
    """gIoU against latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, of in figures.items():
        x, y = 1000 * of["latency"]["value"], of["giou"]["value"]
        spread = [[max(0, y - of["giou"]["low"])], [max(0, of["giou"]["high"] - y)]]
        axes.errorbar(x, y, spread, fmt="o", color=COLOUR, ecolor=INK, capsize=3)
        axes.annotate(name, (x, y), xytext=(5, 6), textcoords="offset points", fontsize=8)
    points = sorted((1000 * of["latency"]["value"], of["giou"]["value"]) for of in figures.values())
    axes.plot(*np.array(points).T, color=COLOUR, alpha=0.5, zorder=0)
    axes.set(xlabel="median latency of an answer, ms", ylabel="gIoU, 95 % interval", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="folder of a checkpoint, or `bundled` for scenes-tiny")
    parser.add_argument("--split", default="val", choices=list(scenes.SPLITS))
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed", help="path without ending")
    parser.add_argument("--report", action="store_true", help="only the table and the plot, of what is recorded")
    options = parser.parse_args()
    if not options.report:
        with counted(RUNS / "speed", {"model": options.model, "num_samples": options.num_samples}):
            run(options)
    report(options.output)


def run(options: argparse.Namespace) -> None:
    """Measure, and write the samples."""
    torch.set_num_threads(THREADS)
    path = Path(bundled_checkpoint() if options.model == "bundled" else options.model)
    model = AutoModel.from_pretrained(path).to(options.device).eval()
    processor = AutoProcessor.from_pretrained(path)
    rows = list(scenes.iterate(options.split, options.num_samples, seed=EVALUATION_SEED))
    settings: dict[str, tuple[str, int | None]] = {"none": ("none", None)}
    settings |= {f"short ({cap})": ("short", cap) for cap in CAPS} | {"full": ("full", None)}
    load = os.getloadavg()
    measured = measure(model, processor, rows, settings)
    figures = figures_of(measured)
    command = shlex.join(["python", "benchmarks/scenes_study/speed.py", *sys.argv[1:]])
    machine = {
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        "threads": THREADS,
        "host_cores": os.cpu_count(),
        "load_before_and_after": [round(of[0], 1) for of in (load, os.getloadavg())],
    }
    record = {"command": command, "commit": commit(), "machine": machine, "split": options.split}
    write_json(options.output.with_suffix(".json"), record | {"figures": figures, "samples": measured})


def report(output: Path) -> None:
    """Table and plot of the samples."""
    record = json.loads(output.with_suffix(".json").read_text())
    machine, figures = record["machine"], record["figures"]
    scenes_shown = len(next(iter(record["samples"]["full"].values())))
    text = (
        f"# Speed against accuracy\n\n`{record['command']}`, commit {record['commit']}: {scenes_shown} scenes of "
        f"{record.get('split', 'val')}, one at a time, {machine['threads']} threads, settings interleaved sample by "
        f"sample (load of the machine before and after: {machine['load_before_and_after']}). In brackets 95 % "
        f"intervals over scenes.\n\n{table(figures)}"
    )
    output.with_suffix(".md").write_text(text)
    plot(figures).savefig(output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
