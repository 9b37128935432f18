"""Bookkeeping of counted runs: settings, commit and CPU time, over all attempts of a run that was stopped."""

import contextlib
import json
import os
import resource
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 10.0


def commit() -> str:
    """The commit of the working tree, with `+` where the package or the study's scripts differ from it."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.call(["git", "diff", "--quiet", "HEAD", "--", "src", "benchmarks/scenes_study"]) != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@contextlib.contextmanager
def counted(folder: str | Path, settings: dict[str, Any]) -> Iterator[None]:
    """Record this attempt of a run in `folder/attempts/`; a killed one is counted up to its last 10 seconds."""
    path = Path(folder) / "attempts" / f"{uuid.uuid4().hex}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = {"settings": settings, "commit": commit(), "started": time.time(), "host_cores": os.cpu_count()}
    began, start, stop = time.time(), _cpu_seconds(), threading.Event()

    def write() -> None:
        seconds = {"cpu_seconds": round(_cpu_seconds() - start, 1), "wall_seconds": round(time.time() - began, 1)}
        path.with_suffix(".part").write_text(json.dumps(attempt | seconds))
        path.with_suffix(".part").replace(path)

    def keep_writing() -> None:
        while not stop.wait(FLUSH_SECONDS):
            write()

    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        write()


def attempts(folder: str | Path) -> list[dict[str, Any]]:
    """All attempts of a run, oldest first."""
    found = [json.loads(path.read_text()) for path in Path(folder).glob("attempts/*.json")]
    return sorted(found, key=lambda attempt: attempt["started"])


def cpu_minutes(folder: str | Path) -> float:
    """CPU time of all attempts of a run, all processes together."""
    return sum(attempt["cpu_seconds"] for attempt in attempts(folder)) / 60


def write_json(path: str | Path, record: Any) -> None:
    """Write whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".part").write_text(json.dumps(record, indent=1))
    path.with_name(path.name + ".part").replace(path)
