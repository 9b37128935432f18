# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segment_cost.py --beside CHECKOUT`: `segcompass evaluate` of this code and of another checkout's, in turns.

Every turn is a process: it evaluates twice one batch, which warms up and shows what loading costs, and then
`--num-samples`. Seconds are CPU time of the process, without that cost; answers are compared sample by sample.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Of a record; scores may differ by rounding, see SCORE_TOLERANCE.
ANSWER = ("sample_id", "masks", "reasoning", "text", "problem")
SCORE_TOLERANCE = 1e-4


def evaluate(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds and bytes of one turn, in this process; its records are left in `folder`."""
    import torch
    from timing import PeakMemory

    from segcompass_hf import cli

    torch.set_num_threads(given.threads)
    (size,) = given.batch_sizes

    def seconds(name: str, samples: int) -> tuple[float, float]:
        command = ["evaluate", "--model", given.model, "--dataset", given.dataset, "--output", str(folder / name)]
        command += ["--batch-size", str(size), "--num-samples", str(samples)]
        cpu, wall = time.process_time(), time.perf_counter()
        if cli.main(command):
            raise SystemExit("the evaluation failed")
        return time.process_time() - cpu, time.perf_counter() - wall

    seconds("warm", size)
    loading = seconds("loading", size)
    with PeakMemory("cpu") as memory:
        whole = seconds("answers", size + given.num_samples)
    cpu, wall = (all_ - once for all_, once in zip(whole, loading, strict=True))
    return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": memory.bytes}


def turn(checkout: Path, given: argparse.Namespace, size: int, folder: Path) -> dict[str, float]:
    """[`evaluate`] in a process of its own, with the package of a checkout."""
    own = [sys.executable, str(Path(__file__).with_name("segment_cost.py")), "--own-process", "--records", str(folder)]
    own += ["--model", given.model, "--dataset", given.dataset, "--num-samples", str(given.num_samples)]
    own += ["--threads", str(given.threads), "--batch-sizes", str(size)]
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(given.threads)}
    found = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(found.splitlines()[-1])


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers" / "samples.jsonl").read_text().splitlines()]


def differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int:
    """Samples that are not answered alike: other masks, other words, or scores that differ by more than rounding."""
    number = abs(len(one) - len(other))
    for mine, its in zip(one, other, strict=False):
        scores = [*zip(mine["scores"], its["scores"], strict=False)]
        alike = all(mine[name] == its[name] for name in ANSWER) and len(mine["scores"]) == len(its["scores"])
        number += not (alike and all(abs(a - b) <= SCORE_TOLERANCE for a, b in scores))
    return number


def beside(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Per batch size: medians of both, the median of the turns' ratios and its range, and samples answered unlike."""
    here, found = Path(__file__).parents[1], []
    for size in given.batch_sizes:
        ratios, new, old, unlike = [], [], [], 0
        for _ in range(given.turns):
            with tempfile.TemporaryDirectory() as path:
                old.append(turn(given.beside, given, size, Path(path) / "old"))
                new.append(turn(here, given, size, Path(path) / "new"))
                unlike = max(unlike, differences(*(answers(Path(path) / name) for name in ("old", "new"))))
            ratios.append(old[-1]["cpu_seconds"] / new[-1]["cpu_seconds"])
        per_picture = {
            f"{name}_{clock}_ms": round(
                1000 * statistics.median(each[f"{clock}_seconds"] for each in all_) / pictures, 2
            )
            for name, all_ in (("old", old), ("new", new))
            for clock in ("cpu", "wall")
            for pictures in (given.num_samples,)
        }
        peaks = {
            f"{name}_peak_bytes": max(each["peak_bytes"] or 0 for each in all_)
            for name, all_ in (("old", old), ("new", new))
        }
        ratio = {
            "ratio": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
        found.append(
            {"batch_size": size, "pictures": given.num_samples, "unlike": unlike, **ratio, **per_picture, **peaks}
        )
    return found
