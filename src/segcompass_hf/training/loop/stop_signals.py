"""Ctrl-C and SIGTERM while training: the step is finished, a checkpoint saved, and the program ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ...stopping import Stopped, handled

logger = logging.get_logger(__name__)

_ONE_PRESS = 1.0  # seconds within which a signal is the same one again: a terminal and a launcher both send it


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    """Give a forked worker back the trainer's handler: torch's ends it, and torchrun signals the whole group."""
    if begin is not None:
        begin(worker)
    if callable(handler := signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, handler)


class StopCallback(TrainerCallback):
    """Ends the training of a trainer with whole checkpoints behind the checkpoint of the step in which a signal came.

    All processes stop behind the same step, whichever of them got it. A second signal ends the program at once, as
    does one before the first step.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._asked: int | None = None  # the signal's number
        self._asked_at = 0.0
        self._leaving = False  # all processes have agreed on the step
        self._process = os.getpid()
        self._stack = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._process = os.getpid()
        self._stack.enter_context(handled(self._ask))
        if isinstance(train_dataloader, DataLoader) and signal.getsignal(signal.SIGTERM) == self._ask:
            begin = partial(_begin_worker, train_dataloader.worker_init_fn)
            train_dataloader.worker_init_fn = begin  # a resumed run makes another loader of this one
            getattr(train_dataloader, "base_dataloader", train_dataloader).worker_init_fn = begin

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process and number == signal.SIGINT:
            return  # a worker that loads rows: the trainer needs it to the end of the step, and ends it then
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > _ONE_PRESS:
            raise Stopped(number)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor([int(self._asked is not None)], device=args.device)
        if self.trainer.accelerator.reduce(asked, reduction="sum").item():
            self._asked = self._asked or int(signal.SIGTERM)
            self._leaving = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._leaving:
            self.leave(f"behind step {state.global_step}, of which a checkpoint is saved in {args.output_dir}")

    def leave(self, where: str) -> None:
        """Raise [`~stopping.Stopped`] if a signal came, and say where training stops."""
        if self._asked is not None:
            if self.trainer.accelerator.is_main_process:
                logger.warning(f"{signal.Signals(self._asked).name}: training stops {where}.")
            raise Stopped(self._asked)

    def restore(self) -> None:
        """Give the signals back to whoever had them before the first step."""
        self._stack.close()


__all__ = ["StopCallback"]
