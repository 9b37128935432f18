# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The first rows of a data set, shared among processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any


class FirstRows(Sequence):
    """This process's share of the first rows of a data set: every `num_processes`-th.

    Args:
        dataset: A data set with indices, or a stream, whose first rows are kept in memory.
        num_rows (`int`): -1 takes all.
        process_index, num_processes (`int`): Who of how many asks.
    """

    def __init__(self, dataset: Any, num_rows: int = -1, process_index: int = 0, num_processes: int = 1):
        if not hasattr(dataset, "__len__"):  # `datasets.IterableDataset` has a `__getitem__` that always raises
            dataset = list(islice(dataset, num_rows if num_rows >= 0 else None))
        total = len(dataset) if num_rows < 0 else min(num_rows, len(dataset))
        self.dataset, self.indices = dataset, range(process_index, total, num_processes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice) -> Any:
        chosen = self.indices[index]
        return [self.dataset[i] for i in chosen] if isinstance(index, slice) else self.dataset[chosen]
