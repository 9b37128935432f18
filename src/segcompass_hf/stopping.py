# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Ctrl-C and SIGTERM: an end in one line, with the exit code that shells know and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Set in the processes of `segcompass train --processes`, to the id of their launcher.
STARTED_BY_US = "SEGCOMPASS_TRAIN_PROCESSES"


class Stopped(SystemExit):
    """Somebody asked the program to end; uncaught it ends without a traceback, with exit code 130 or 143.

    Args:
        number (`int`): Of the signal; the exit code is 128 more, as shells have it.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """A handler of signals: ends the program as an exception does, so that what is unfinished is cleared away."""
    raise Stopped(number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let a handler have Ctrl-C and SIGTERM while the block runs.

    Signals that somebody else handles, or ignores, stay theirs; so do all of them outside of the main thread, where
    Python takes none.
    """
    free = (signal.SIG_DFL, signal.default_int_handler, raise_stopped)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in free}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def is_main_process() -> bool:
    """Whether this is the process that speaks, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def run_script(main: Callable[[], None], flag: str = "") -> None:
    """Run a training script to an end in one line also where it is stopped or a file cannot be read or written.

    Args:
        main (`Callable`): The script.
        flag (`str`, *optional*): What its command line needs to go on from the last checkpoint, such as `"--resume"`.

    Raises:
        SystemExit: With exit code 130 after Ctrl-C, 143 after SIGTERM, 2 after an `OSError`.
    """
    try:
        with handled(raise_stopped):
            main()
    except Stopped as stop:
        if is_main_process():
            launcher = "python" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "accelerate launch"
            command = shlex.join([*launcher.split(), *sys.argv, *([flag] if flag and flag not in sys.argv else [])])
            sys.stderr.write(f"stopped by {stop.signal.name}; this goes on: {command}\n")
        raise
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


__all__ = ["SIGNALS", "STARTED_BY_US", "Stopped", "handled", "is_main_process", "raise_stopped", "run_script"]
