# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The allocator keeps what is freed; each case in a process of its own, since the setting is one of the process."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from segcompass_hf import allocator

# Page faults of the tenth block of 64 MiB that is filled and freed: 16,384, of 4 KiB, where it came from the system.
_FAULTS = """
import json, resource, sys
import torch
from segcompass_hf.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"kept": kept, "faults": faults[-1]}))
"""


def faults(what: str, **environment: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if name not in allocator._OF_THE_ENVIRONMENT}
    command = [sys.executable, "-c", _FAULTS, what]
    return json.loads(subprocess.run(command, env=clean | environment, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_freed_blocks_are_used_again_and_the_environment_goes_before():
    assert faults("leave")["faults"] > 1000  # fewer than 16,384 where the kernel gives huge pages
    found = faults("keep")
    assert found["kept"] is True and found["faults"] < 100
    set_by_user = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert set_by_user["kept"] is False and set_by_user["faults"] > 1000


def test_other_c_libraries_are_left_alone(monkeypatch):
    for name in allocator._OF_THE_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)

    class Other:
        """musl: a mallopt, but no version of glibc."""

        def mallopt(self, name, value):
            raise AssertionError("called")

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Other())
    assert allocator.keep_freed_memory() is False

    def refuse(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(allocator.ctypes, "CDLL", refuse)
    assert allocator.keep_freed_memory() is False
