# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The processes of a run, as accelerate or torchrun started them."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

_PATIENCE = timedelta(hours=24)  # the last batch of another process may take long


@dataclass
class Processes:
    """Which of how many processes this is.

    Args:
        index, count (`int`): This process, and how many there are.
        device (`torch.device`, *optional*): Of this process; `None` without accelerate.
    """

    index: int = 0
    count: int = 1
    device: Any = None

    @classmethod
    def current(cls) -> Processes:
        """Those of the launcher; one where there is none.

        Raises:
            RuntimeError: the launcher started several, but they do not know of each other.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            from accelerate import PartialState
        except ImportError:
            found = cls()
        else:
            # Without being told, accelerate sees one process where there are only CPUs.
            state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
            found = cls(state.process_index, state.num_processes, state.device)
        if found.count < launched:
            raise RuntimeError(
                f"{launched} processes were started, but accelerate sees {found.count}: each would evaluate "
                "everything. Start them with torchrun or accelerate launch, with accelerate installed."
            )
        return found

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def from_main(self, value: Any = None) -> Any:
        """The main process's `value`, in every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box)
        return box[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in the main process before all others, which then find what it has cached."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def finish(self) -> None:
        """End a program that several processes run, in all of them together; it does not return there.

        A process that exits earlier may pull the others down. Python's own shutdown is left out after what `atexit`
        holds: threads of gloo or of autograd that are still there while Python shuts down abort the process (pytorch
        issue 190489), with or without a process group.
        """
        if self.count > 1:
            from accelerate import PartialState

            self.wait()
            PartialState().destroy_process_group()
            atexit._run_exitfuncs()  # such as a logger's last upload
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
