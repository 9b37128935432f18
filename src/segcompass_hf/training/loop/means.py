# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Means of what a loss reports beside itself, over all steps and processes since the last log line."""

from __future__ import annotations

import torch


class MetricMeans:
    """Sums and weights by name. `add("giou", total, count)`; a mean is the sum of totals over the sum of counts."""

    def __init__(self):
        self._sums: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {}

    @property
    def sums(self) -> dict[str, list[float]]:
        """Name -> [sum of totals, sum of counts] so far, as plain numbers; may be set (resume)."""
        return {name: [float(total), float(count)] for name, (total, count) in self._sums.items()}

    @sums.setter
    def sums(self, values: dict[str, list[float]]) -> None:
        self._sums = {name: (total, count) for name, (total, count) in values.items()}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1.0) -> None:
        """Add to one mean; tensors stay where they are until the mean is asked for. Non-finite totals are left out:
        the step they belong to is skipped and counted elsewhere."""
        total = torch.as_tensor(total).detach().float()
        finite = total.isfinite()
        total, count = total.where(finite, 0.0), torch.as_tensor(count).detach().to(total) * finite
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = old_total + total, old_count + count

    def pop(self, num_processes: int = 1) -> dict[str, float]:
        """The means, over all processes, and start again. With several, every process must call this."""
        sums, self._sums = self.sums, {}
        if num_processes > 1:
            gathered = [None] * num_processes
            torch.distributed.all_gather_object(gathered, sums)
            names = dict.fromkeys(name for part in gathered for name in part)
            sums = {
                name: tuple(map(sum, zip(*(part.get(name, (0.0, 0.0)) for part in gathered), strict=True)))
                for name in names
            }
        return {name: total / count for name, (total, count) in sums.items() if count}


class MetricMeansMixin:
    """Gives a Trainer `self.means`, adds them to its training log lines and keeps them in its checkpoints.

    It stands left of [`RobustTrainerMixin`], whose checkpoints it extends.
    """

    def __init__(self, *args, **kwargs):
        self.means = MetricMeans()
        super().__init__(*args, **kwargs)

    def extra_logs(self) -> dict[str, float]:
        """Further entries of a training log line, such as counters; the same keys on every process."""
        return {}

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **self.means.pop(self.accelerator.num_processes), **self.extra_logs()}
        super().log(logs, *args, **kwargs)

    def loop_state(self) -> dict:
        return {**super().loop_state(), "means": self.means.sums}

    def load_loop_state(self, state: dict) -> None:
        super().load_loop_state(state)
        self.means.sums = state.get("means", {})
