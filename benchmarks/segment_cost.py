"""Throughput and memory of `segment` by batch size: seconds and tokens per picture, and the peak of the process.

    python benchmarks/segment_cost.py --model CHECKPOINT --dataset scenes:val --batch-sizes 1 8 --threads 2 \\
        --output benchmarks/results/segment_cost

Every batch size has a process of its own; the first batch only warms up. A batch is what a user waits for: pictures
prepared by the processor, reasoning written greedily, masks at the pictures' own size. Memory is resident, over that
of the process before the checkpoint was loaded. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import segcompass_hf
from segcompass_hf.pages import markdown_table


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Figures of one batch size, in this process."""
    from transformers import AutoModel, AutoProcessor

    from segcompass_hf.evaluation import ModelPredictor, load_dataset_of
    from segcompass_hf.evaluation.rows import EvaluationRows

    torch.set_num_threads(given.threads)
    (size,) = given.batch_sizes
    wanted = max(size, given.num_samples // size * size)
    rows = EvaluationRows(load_dataset_of(given.dataset, wanted + size).dataset, wanted + size)
    batches = [[rows[place].columns for place in range(start, start + size)] for start in range(0, len(rows), size)]
    before, begun = resident("VmRSS"), time.perf_counter()
    model, processor = AutoModel.from_pretrained(given.model).eval(), AutoProcessor.from_pretrained(given.model)
    predictor = ModelPredictor(model, processor)
    loading, seconds, tokens = time.perf_counter() - begun, [], 0
    for number, batch in enumerate(batches):
        begun = time.perf_counter()
        output, _, _ = predictor.segment(batch)
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
        "peak_bytes": resident("VmHWM") - before,
    }


def report(found: list[dict[str, float]], given: argparse.Namespace) -> str:
    rows = [
        [
            *(
                one["batch_size"],
                one["pictures"],
                f"{one['seconds_per_batch']:.2f} ({one['seconds_per_batch_longest']:.2f})",
            ),
            *(f"{one['pictures_per_second']:.2f}", one["tokens_per_picture"], f"{one['peak_bytes'] / 2**20:,.0f}"),
        ]
        for one in found
    ]
    columns = ["batch", "pictures", "seconds per batch (longest)", "pictures per second", "tokens written", "peak MiB"]
    return (
        f"# What `segment` costs\n\n`python {shlex.join(sys.argv)}`\n\n{Path(given.model).name} on {given.dataset}, "
        f"{given.threads} threads on {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"load average at the end {os.getloadavg()[0]:.1f}. Median of the batches; tokens written: mean per picture, "
        "position tokens included; peak: resident memory over that before loading.\n\n"
        f"{markdown_table(columns, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(segcompass_hf.bundled_checkpoint()), help="a checkpoint's folder")
    parser.add_argument("--dataset", default="scenes:val", help="as for `segcompass evaluate`")
    parser.add_argument("--num-samples", type=int, default=32, help="pictures per batch size (%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--output", type=Path, help="path of the results without ending; printed when left out")
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.own_process:
        print(json.dumps(measure(given)))
        return
    found = []
    for size in given.batch_sizes:
        own = [sys.executable, __file__, "--own-process", "--model", given.model, "--dataset", given.dataset]
        own += ["--num-samples", str(given.num_samples), "--threads", str(given.threads), "--batch-sizes", str(size)]
        found.append(
            json.loads(subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        )
    text = report(found, given)
    print(text)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.with_suffix(".md").write_text(text)
        machine = {"threads": given.threads, "cores": os.cpu_count(), "torch": torch.__version__}
        result = {"command": shlex.join(["python", *sys.argv]), **machine, "model": Path(given.model).name}
        given.output.with_suffix(".json").write_text(json.dumps(result | {"batches": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
