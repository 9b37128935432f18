# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory that a layer frees stays with the process, so that the next layer need not ask the system for it again."""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h, with the environment's names for them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OF_THE_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
_NEVER, _MOST = -1, 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the whole process, for programs that answer batch after batch on a CPU.

    glibc gives blocks of more than 32 MB, and what is free at the end of its heap, back to the system at once: every
    layer of a model then gets its activations page by page from the kernel. Kept, they are used again. The process
    holds on to as much as it had in use at its peak; blocks of 2 GB and more are still given back.

    It concerns the whole process, so that only programs call it, not the library's functions. Nothing happens where
    the environment sets the allocator's thresholds, and where the C library is not glibc.

    Returns:
        `bool`: whether memory is kept from now on.
    """
    if any(name in os.environ for name in _OF_THE_ENVIRONMENT):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl has a mallopt too, which does nothing
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


__all__ = ["keep_freed_memory"]
