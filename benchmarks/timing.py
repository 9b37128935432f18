# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How benchmarks take seconds and bytes on a device: the one place that waits for CUDA.

Seconds are wall time on CUDA and, elsewhere, CPU time of the process, which other load hardly distorts. Peak memory is
torch's own count on CUDA and the resident set's high-water mark on Linux.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device | str) -> None:
    """Wait until everything asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device | str) -> float:
    """Seconds, once the device is done: wall time on CUDA, else CPU time of the process."""
    synchronize(device)
    return time.perf_counter() if torch.device(device).type == "cuda" else time.process_time()


def clock_name(device: torch.device | str) -> str:
    return "wall time" if torch.device(device).type == "cuda" else "CPU time"


def median_seconds(function: Callable[[], Any], device: torch.device | str, repeats: int, warmup: int = 1) -> float:
    """Median of `repeats` calls after `warmup` ones that do not count."""
    seconds = []
    for _ in range(warmup + repeats):
        started = clock(device)
        function()
        seconds.append(clock(device) - started)
    return statistics.median(seconds[warmup:])


def resident(field: str = "VmRSS") -> int:
    """`VmRSS` (now) or `VmHWM` (at most so far) of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class PeakMemory:
    """Bytes in use at the peak of a `with` block beyond those in use when it began; `None` where unknown."""

    def __init__(self, device: torch.device | str):
        self.device, self.bytes = torch.device(device), None

    def __enter__(self) -> PeakMemory:
        self.before = self._reset()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.before is not None:
            self.bytes = self._peak() - self.before

    def _reset(self) -> int | None:
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return self._peak()
        except OSError:
            return None  # not Linux

    def _peak(self) -> int:
        if self.device.type == "cuda":
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        return resident("VmHWM")


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()
