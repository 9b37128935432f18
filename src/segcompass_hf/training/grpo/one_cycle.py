# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The paper's learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch


class OneCycle(torch.optim.lr_scheduler.LRScheduler):
    """Each group's learning rate falls along a cosine to a `final_factor`-th of it, without warm-up.

    At step s of n it is that of `torch`'s `OneCycleLR(total_steps=n, pct_start=0)`: `(s + 1) / n` of the way down.
    Loaded from a checkpoint it still ends where this run does, which may be longer.

    Args:
        optimizer (`torch.optim.Optimizer`): Its learning rates are the highest.
        total_steps (`int`): Optimizer steps of the run.
        final_factor (`float`): First learning rate over last, 1 or more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int, final_factor: float):
        self.total_steps, self.final_factor = total_steps, final_factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        left = (1 + math.cos(math.pi * min((self.last_epoch + 1) / self.total_steps, 1))) / 2
        factor = 1 / self.final_factor + (1 - 1 / self.final_factor) * left
        return [rate * factor for rate in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of a checkpoint (`OneCycleLR`'s too); length and final factor stay this run's."""
        own = {"total_steps": self.total_steps, "final_factor": self.final_factor}
        names = ("base_lrs", "last_epoch", "_step_count")
        super().load_state_dict({name: state_dict[name] for name in names} | own)
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
