# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Counts the bytes of tensors that are alive, on any device and without one (fake tensors)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Context that counts what tensors made inside it occupy: `live` now and `peak` at most, in bytes.

    Every operation is seen, in the backward pass too; views share their storage and count once. What a kernel needs
    inside itself and what an allocator wastes goes uncounted.

    Args:
        known (`Iterable[torch.Tensor]`): Tensors whose storages do not count: parameters, gradients, buffers.

    ```python
    >>> weight = torch.ones(1000)
    >>> with MemoryMeter([weight]) as meter:
    ...     double = 2 * weight
    >>> meter.live
    4000
    ```
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no id is used again
        self._known_ids = {id(storage) for storage in self._known}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._count(output.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._known_ids:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        del self._alive[key]
        self.live -= size
