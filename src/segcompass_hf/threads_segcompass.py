# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Threads: what they share of model and processor is used by one call at a time; work that may not end is stopped."""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import wraps
from typing import TypeVar

Result = TypeVar("Result")


class CallLock:
    """A re-entrant lock of one model; a pickled or copied model gets its own."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return type(self), ()


def one_call_at_a_time(method: Callable) -> Callable:
    """Let the other threads wait while a method of a model runs that passes through the VLM.

    Its states are collected by hooks, and some families (Qwen's) keep the positions of the newest prompt on the
    module. The model holds a [`CallLock`] as `call_lock`.
    """

    @wraps(method)
    def locked(self, *args, **kwargs):
        with self.call_lock:
            return method(self, *args, **kwargs)

    return locked


# How a fast tokenizer pads and truncates is its state, set anew by every call: two calls at once would give one the
# other's padding. Held while a process forks, so that no child is born with a lock that nobody will release.
tokenizer_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=tokenizer_lock.acquire,
        after_in_parent=tokenizer_lock.release,
        after_in_child=tokenizer_lock.release,
    )


def within_seconds(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, or an error where it takes longer; it is then stopped.

    Only Python code can be stopped, between two of its steps.

    Raises:
        TimeoutError: `work` did not end in time.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return future.result(seconds)
    except FutureTimeoutError:
        if future.done():  # the error is that of `work`
            raise
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        raise TimeoutError(f"not done after {seconds:g} seconds") from None
