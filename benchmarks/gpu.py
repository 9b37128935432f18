# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One command that uses some minutes of a GPU: what it can do with this package, in order of worth.

    python benchmarks/gpu.py --minutes 10 --wheels .whl
    python benchmarks/gpu.py --minutes 3 --device cpu --output runs/gpu_on_cpu

Every part is a process of its own with a time limit of its own (`gpu_parts.py` measures): what hangs, fails or does
not fit costs itself alone, and what it had measured until then stays. A limit is the part's share of the time left, so
that what one part does not use goes to those behind it. The results are written after every part. A part that needs a
package which is not there is skipped, and the results say so. Needs torch and transformers; `--wheels` names a folder
of further packages, as wheels (installed into a temporary folder, from there alone) or unpacked.

Writes OUTPUT.json and OUTPUT.md. The exit code is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
OUT_OF_MEMORY = 77  # exit code of a part that did not fit
LEAST_SECONDS = 3.0  # a part is not started for less
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "datasets", "pycocotools", "triton")

Measure = Callable[[str, str, Path], int]  # name of a part, device, file for its rows -> exit code


@dataclass(frozen=True)
class Part:
    """One part: `share` is its weight beside the parts that are still to come, `needs` what has to be importable."""

    name: str
    title: str
    share: float
    needs: tuple[str, ...] = ()


PARTS = (
    Part("machine", "Matrix products and copies", 1),
    Part("tests", "The core in every precision (`tests/test_devices.py`)", 8, ("pytest",)),
    Part("concept_path", "Concept path, sparse against dense, at real layer shapes", 2),
    Part("supervised_step", "Supervised step at real layer shapes (forward, backward, AdamW)", 4),
    Part("joint_step", "Joint step with KL, ours against the original's formulation", 5, ("trl", "datasets")),
    Part("segment", "`segment`: the bundled checkpoint on Scenes, and real layer shapes", 7),
    Part("grpo", "Joint training on Scenes, whole steps", 4, ("trl", "datasets", "pycocotools")),
    Part("torch_compile", "`torch.compile` against eager", 4),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with small sizes (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="these alone")
    parser.add_argument("--wheels", type=Path, help="folder of packages that are not installed")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="path of the results without ending")
    return parser.parse_args(arguments)


def carried_packages(wheels: Path | None, folder: Path) -> tuple[list[str], str | None]:
    """Folders for the path, and what is wrong with the carried packages (`None`: nothing)."""
    if wheels is None:
        return [], None
    if not wheels.is_dir():
        return [], f"--wheels {wheels} is no folder"
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        return [str(wheels.resolve())], None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(folder)]
    together = subprocess.run([*command, *found], capture_output=True, text=True)
    failures = []
    for wheel in found if together.returncode else ():  # one that is not for this Python stops all
        alone = subprocess.run([*command, wheel], capture_output=True, text=True)
        if alone.returncode:
            failures.append(f"{Path(wheel).name} could not be installed: {last_line(alone.stderr)}")
    return [str(folder)], "; ".join(failures) or None


def load_measures() -> Measure:
    """What measures a part, with everything imported that parts share, once for all: they are forked.

    Nothing here may start CUDA, which does not survive a fork.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for processes that parts start
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking for a GPU would start CUDA
    import gpu_parts
    import torch
    from transformers import (  # noqa: F401
        CLIPVisionModel,
        LlamaModel,
        LlavaForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        SamModel,
    )

    def measure(name: str, device: str, lines: Path) -> int:
        if torch.cuda._is_in_bad_fork():  # an import did start CUDA: begin anew
            os.execv(sys.executable, [sys.executable, gpu_parts.__file__, name, device, str(lines)])
        return gpu_parts.measure_part(name, device, lines)

    return measure


def run_part(measure: Callable[[], int], limit: float, lines: Path) -> dict[str, Any]:
    """Run one part for at most `limit` seconds; how it ended, and the rows it wrote to `lines` until then."""
    log, started = lines.with_suffix(".log"), time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=in_a_session, args=(measure, log))
    process.start()
    try:
        process.join(limit)
        code = process.exitcode
    finally:
        end(process)
    said = last_line(log.read_text(errors="replace") if log.exists() else "")
    if code is None:
        outcome, reason = "cut", f"its {limit:.0f} s were over"
    elif code == OUT_OF_MEMORY:
        outcome, reason = "out of memory", said
    elif code < 0:
        outcome, reason = "failed", f"ended by {signal.Signals(-code).name}; memory of the machine may have run out"
    else:
        outcome, reason = ("failed", said) if code else ("done", None)
    rows = read_rows(lines)
    return {"outcome": outcome, "reason": reason, "seconds": round(time.monotonic() - started, 1), "rows": rows}


def in_a_session(measure: Callable[[], int], log: Path) -> None:
    """A part's process: what it starts can be ended with it, and what it says goes to `log`."""
    os.setsid()
    output = log.open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.stdout = sys.stderr = output  # where they were bound to something else
    sys.exit(measure())


def end(process: multiprocessing.process.BaseProcess) -> None:
    """End a part with everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended, or its session has not begun
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def read_rows(lines: Path) -> list[dict[str, Any]]:
    """What a part wrote; the last line may have been cut in the middle."""
    rows = []
    for line in lines.read_text().splitlines() if lines.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def last_line(text: str) -> str:
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return found[-1][:300] if found else "it said nothing"


def missing(part: Part) -> str | None:
    """Why a part cannot run here."""
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(absent)}, not installed here" if absent else None


def versions() -> dict[str, str | None]:
    """Of Python and of every package that matters; `None` where it is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def run_parts(
    parts: list[Part], record: dict[str, Any], until: float, measure: Measure, folder: Path, output: Path
) -> None:
    """Run the parts in turn until `until` (`time.monotonic()`), and write the record after every one."""
    for number, part in enumerate(parts):
        reason = missing(part)
        shares = sum(other.share for other in parts[number:] if missing(other) is None)
        limit = 0.0 if reason else (until - time.monotonic()) * part.share / shares
        entry: dict[str, Any] = {"name": part.name, "title": part.title, "limit": round(limit, 1)}
        if reason:
            entry |= {"outcome": "skipped", "reason": reason, "seconds": 0.0, "rows": []}
        elif limit < LEAST_SECONDS:
            entry |= {"outcome": "not started", "reason": "no time was left", "seconds": 0.0, "rows": []}
        else:
            lines = folder / f"{part.name}.jsonl"
            entry |= run_part(partial(measure, part.name, record["device_kind"], lines), limit, lines)
        record["parts"].append(entry)
        write(record, output)
        print(f"{part.name}: {entry['outcome']} in {entry['seconds']:.0f} s, {len(entry['rows'])} rows"
              f"{'' if entry['reason'] is None else ': ' + entry['reason']}", flush=True)  # fmt: skip


def write(record: dict[str, Any], output: Path) -> None:
    from gpu_report import to_markdown

    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text(to_markdown(record))


def main(arguments: list[str] | None = None, parts: tuple[Part, ...] = PARTS, measure: Measure | None = None) -> int:
    given = parse_arguments(arguments)
    started, words = time.monotonic(), sys.argv[1:] if arguments is None else arguments
    chosen = [part for part in parts if not given.parts or part.name in given.parts]
    with tempfile.TemporaryDirectory() as folder:
        places, problem = carried_packages(given.wheels, Path(folder, "site"))
        places = [*places, str(HERE), str(HERE.parent / "src")]
        sys.path[:0] = places
        importlib.invalidate_caches()
        record: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/gpu.py", *words]),
            "device_kind": given.device,
            "minutes": given.minutes,
            "versions": versions(),
            "wheels": problem,
            "parts": [],
        }
        until = started + 60 * given.minutes
        run_parts(chosen, record, until, measure or load_measures(), Path(folder), given.output)
    record["seconds"] = round(time.monotonic() - started, 1)
    write(record, given.output)
    return int(any(entry["outcome"] == "failed" for entry in record["parts"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part in progress is ended too
    sys.exit(main())
