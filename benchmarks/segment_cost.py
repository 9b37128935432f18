"""Throughput and memory of `segment` by batch size: seconds and tokens per picture, and the peak of the process.

    python benchmarks/segment_cost.py --model CHECKPOINT --dataset scenes:val --batch-sizes 1 8 --threads 2 \\
        --output benchmarks/results/segment_cost

Every batch size has a process of its own; the first batch only warms up. A batch is what a user waits for: pictures
prepared by the processor, reasoning written greedily, masks at the pictures' own size. Memory is the GPU's, or
resident, over that before the checkpoint was loaded. Writes OUTPUT.json and OUTPUT.md.

    python benchmarks/segment_cost.py --beside CHECKOUT --batch-sizes 1 8 32 --num-samples 256 --threads 1 --turns 5

compares `segcompass evaluate` of this code with that of another checkout, see `segment_cost_beside.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from segment_cost_beside import SCORE_TOLERANCE, beside, evaluate
from timing import PeakMemory, device_name, synchronize

import segcompass_hf
from segcompass_hf.pages import markdown_table

BITS = {"nf4": 4, "int8": 8}  # through bitsandbytes


def load(given: argparse.Namespace) -> Any:
    """The checkpoint on the device, in the dtype asked for."""
    from transformers import AutoConfig, AutoModel

    from segcompass_hf.training.quantization import quantization_config

    if given.dtype not in BITS:
        return AutoModel.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval().to(given.device)
    quantized = quantization_config(AutoConfig.from_pretrained(given.model), BITS[given.dtype])
    return AutoModel.from_pretrained(given.model, quantization_config=quantized, device_map={"": given.device}).eval()


def measure(given: argparse.Namespace, rows: list[dict[str, Any]] | None = None) -> dict[str, float]:
    """Figures of one batch size, in this process; of `rows` with `image` and `instruction` in place of a data set."""
    from transformers import AutoProcessor

    from segcompass_hf.evaluation import ModelPredictor, load_dataset_of
    from segcompass_hf.evaluation.rows import EvaluationRows

    torch.set_num_threads(given.threads)
    (size,) = given.batch_sizes
    if rows is None:
        wanted = max(size, given.num_samples // size * size) + size
        dataset = EvaluationRows(load_dataset_of(given.dataset, wanted).dataset, wanted)
        rows = [dataset[place].columns for place in range(wanted)]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    with PeakMemory(given.device) as memory:
        begun = time.perf_counter()
        predictor = ModelPredictor(load(given), AutoProcessor.from_pretrained(given.model), reasoning=given.reasoning)
        loading, seconds, tokens = time.perf_counter() - begun, [], 0
        for number, batch in enumerate(batches):
            begun = time.perf_counter()
            output, _, _ = predictor.segment(batch)
            synchronize(given.device)
            if number:
                seconds.append(time.perf_counter() - begun)
                tokens += int(output.completion_mask.sum())
    return {
        "batch_size": size,
        "pictures": size * len(seconds),
        "seconds_loading": round(loading, 2),
        "seconds_per_batch": round(statistics.median(seconds), 3),
        "seconds_per_batch_longest": round(max(seconds), 3),
        "pictures_per_second": round(size * len(seconds) / sum(seconds), 3),
        "tokens_per_picture": round(tokens / (size * len(seconds)), 1),
        "peak_bytes": memory.bytes,
    }


def mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def report(found: list[dict[str, float]], given: argparse.Namespace) -> str:
    rows = [
        [
            *(
                one["batch_size"],
                one["pictures"],
                f"{one['seconds_per_batch']:.2f} ({one['seconds_per_batch_longest']:.2f})",
            ),
            *(f"{one['pictures_per_second']:.2f}", one["tokens_per_picture"], mebibytes(one["peak_bytes"])),
        ]
        for one in found
    ]
    columns = ["batch", "pictures", "seconds per batch (longest)", "pictures per second", "tokens written", "peak MiB"]
    return (
        f"# What `segment` costs\n\n`python {shlex.join(sys.argv)}`\n\n{Path(given.model).name} in {given.dtype} on "
        f"{given.dataset}, reasoning {given.reasoning}; {device_name(given.device)}, {given.threads} threads on "
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, load average at the end {os.getloadavg()[0]:.1f}. "
        "Median of the batches; tokens written: mean per picture, position tokens included; peak: memory over that "
        "before loading, resident or on the GPU.\n\n"
        f"{markdown_table(columns, rows)}\n"
    )


def report_beside(found: list[dict[str, float]], given: argparse.Namespace) -> str:
    rows = [
        [
            *(one["batch_size"], one["pictures"], one["old_cpu_ms"], one["new_cpu_ms"]),
            *(f"{one['ratio']:.2f} ({one['least']:.2f} to {one['most']:.2f})", one["old_wall_ms"], one["new_wall_ms"]),
            *(mebibytes(one["old_peak_bytes"]), mebibytes(one["new_peak_bytes"]), one["unlike"]),
        ]
        for one in found
    ]
    columns = ["batch", "pictures", "CPU ms before", "CPU ms now", "ratio (range)", "wall ms before", "wall ms now"]
    columns += ["peak MiB before", "peak MiB now", "answered unlike"]
    return (
        f"# `segcompass evaluate`, before and now\n\n`python {shlex.join(sys.argv)}`\n\n{Path(given.model).name} on "
        f"{given.dataset}; {device_name('cpu')}, {given.threads} threads on {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__}, load average at the end {os.getloadavg()[0]:.1f}. Milliseconds per picture, without "
        f"loading: medians of {given.turns} turns, in each of which both run; ratio of CPU time: the turns' median. "
        f"Answered unlike: samples with another mask, other words, or a score that differs by more than "
        f"{SCORE_TOLERANCE:g}.\n\n{markdown_table(columns, rows)}\n"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(segcompass_hf.bundled_checkpoint()), help="a checkpoint's folder")
    parser.add_argument("--dataset", default="scenes:val", help="as for `segcompass evaluate`")
    parser.add_argument("--num-samples", type=int, default=32, help="pictures per batch size (%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", *BITS])
    parser.add_argument("--reasoning", default="full", choices=["full", "short", "none"], help="as of `segment`")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="compare with the package in its src")
    parser.add_argument("--turns", type=int, default=5, help="with --beside (%(default)s)")
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="path of the results without ending; printed when left out")
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    given = parse_arguments()
    if given.own_process:
        print(json.dumps(measure(given) if given.records is None else evaluate(given, given.records)))
        return
    found = [] if given.beside is None else beside(given)
    for size in given.batch_sizes if given.beside is None else ():
        own = [sys.executable, __file__, "--own-process", "--model", given.model, "--dataset", given.dataset]
        own += ["--device", given.device, "--dtype", given.dtype, "--reasoning", given.reasoning]
        own += ["--num-samples", str(given.num_samples), "--threads", str(given.threads), "--batch-sizes", str(size)]
        found.append(
            json.loads(subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        )
    text = (report if given.beside is None else report_beside)(found, given)
    print(text)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.with_suffix(".md").write_text(text)
        machine = {"threads": given.threads, "cores": os.cpu_count(), "torch": torch.__version__}
        result = {"command": shlex.join(["python", *sys.argv]), **machine, "model": Path(given.model).name}
        given.output.with_suffix(".json").write_text(json.dumps(result | {"batches": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
