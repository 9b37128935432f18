# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Predictions of a data set in five ways that must give the same rows, with images per second of each.

    python benchmarks/predict_many.py --images 10000 --output benchmarks/results/predict_many.md

One process; one process killed with signal 9 in the middle and started again; two jobs of a share each, one after the
other; two processes by torchrun; and, where Ray is installed, two Ray workers, one of which is killed with signal 9
in the middle. The images are scenes, in Parquet files of 500, one question each; every process computes with one
thread, so that sums have one order. What is there already of an earlier start of the benchmark is kept.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from segcompass_hf.data import scenes
from segcompass_hf.data.hosting.write import write_dataset

IMAGES_PER_FILE_BYTES = "8MB"  # about 500 scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="%(default)s")
    parser.add_argument("--rows-per-shard", type=int, default=100, help="%(default)s")
    parser.add_argument("--reasoning", default="none", choices=("full", "short", "none"), help="%(default)s")
    parser.add_argument("--work", type=Path, default=Path("out/predict_many"), help="folder for data and results")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="all by default")
    parser.add_argument("--output", type=Path, help="Markdown file for the figures, with a .json beside it")
    args = parser.parse_args()
    data = args.work / f"scenes-{args.images}"
    if not data.exists():
        write_dataset({"train": scenes.iterate("train", args.images, seed=21)}, data, shard_size=IMAGES_PER_FILE_BYTES)
    figures = {}
    for way in args.ways:
        figures[way] = WAYS[way](args, data / "data", args.work / f"{way}-{args.images}-{args.reasoning}")
        print(json.dumps({way: figures[way]}), flush=True)
    digests = {way: found["digest"] for way, found in figures.items() if "digest" in found}
    assert len(set(digests.values())) == 1, digests
    if args.output is not None:
        args.output.write_text(report(args, figures, next(iter(digests.values()))), "utf-8")
        args.output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def command_of(args: argparse.Namespace, data: Path, output: Path, *more: str) -> list[str]:
    job = ["--dataset", str(data), "--output", str(output), "--rows-per-shard", str(args.rows_per_shard)]
    return ["-m", "segcompass_hf.cli", "predict", *job, "--reasoning", args.reasoning, "--json", *more]


def start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen) -> dict:
    """The summary that a command prints."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{shlex.join(process.args)} ended with code {process.returncode}")
    return json.loads(out[out.index("{") :])


def one_process(args: argparse.Namespace, data: Path, output: Path) -> dict:
    return ended(start(command_of(args, data, output)))


def killed(args: argparse.Namespace, data: Path, output: Path) -> dict:
    process = start(command_of(args, data, output))
    wait_for_shards(output, args.images // args.rows_per_shard // 2, process)
    process.kill()
    process.communicate()
    return ended(start(command_of(args, data, output)))


def two_shares(args: argparse.Namespace, data: Path, output: Path) -> dict:
    first, second = (ended(start(command_of(args, data, output, "--shard", f"{share}/2"))) for share in range(2))
    whole = json.loads((output / "summary.json").read_text())  # of both
    seconds, predicted = first["seconds"] + second["seconds"], first["predicted"] + second["predicted"]
    return (
        second | whole | {"predicted": predicted, "seconds": seconds, "rows_per_second": round(predicted / seconds, 2)}
    )


def torchrun(args: argparse.Namespace, data: Path, output: Path) -> dict:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return ended(start([*launcher, *command_of(args, data, output)]))


def ray_with_a_kill(args: argparse.Namespace, data: Path, output: Path) -> dict:
    """Skipped where Ray is missing."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return {"skipped": "Ray is not installed"}
    process = start(command_of(args, data, output, "--engine", "ray", "--workers", "2"))
    wait_for_shards(output, args.images // args.rows_per_shard // 2, process)
    workers = [pid for pid, name in descendants(process.pid) if "MapWorker" in name]
    if process.poll() is None and not workers:
        raise SystemExit("no worker of Ray was found to kill")
    for worker in workers[:1]:
        os.kill(worker, signal.SIGKILL)
    return ended(process) | {"killed": workers[:1]}


def wait_for_shards(output: Path, number: int, process: subprocess.Popen) -> None:
    while process.poll() is None and len(list((output / "data").glob("part-*.parquet"))) < max(number, 1):
        time.sleep(0.2)


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes that a process has started, and those that they have, with their titles."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found, left = [], [pid]
    while left:
        for child in children.get(left.pop(), []):
            left.append(child)
            try:
                title = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append((child, title))
    return found


WAYS: dict[str, Callable[[argparse.Namespace, Path, Path], dict]] = {
    "one_process": one_process,
    "killed_and_resumed": killed,
    "two_shares": two_shares,
    "torchrun_2": torchrun,
    "ray_2_one_killed": ray_with_a_kill,
}


def report(args: argparse.Namespace, figures: dict[str, dict], digest: str) -> str:
    lines = [
        "# Predictions of a data set",
        "",
        f"    python {shlex.join(sys.argv)}",
        "",
        f"{args.images:,} scenes, one question each, reasoning {args.reasoning!r}, the bundled checkpoint on a CPU of "
        f"{os.cpu_count()} cores, one thread per process. Every way gave the same rows: digest `{digest}`.",
        "",
        "| way | rows | errors | rows made in the last start | seconds of it | images per second |",
        "|---|---|---|---|---|---|",
    ]
    for way, found in figures.items():
        if "skipped" in found:
            lines.append(f"| {way} | {found['skipped']} | | | | |")
            continue
        cells = [way, found["rows"], found["errors"], found["predicted"], found["seconds"], found["rows_per_second"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", "Seconds are without loading the model.", ""])


if __name__ == "__main__":
    main()
