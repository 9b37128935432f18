# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Somebody's words for a terminal or a line of text: no control sequence and no line break reaches the reader."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters, lone surrogates, and what turns the direction of writing or breaks a line.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: Any, keep: str = "") -> str:
    r"""A text with everything that a terminal would act on written out.

    Args:
        text: Anything; its `str`.
        keep (`str`, *optional*): Control characters that stay, such as line breaks.

    Example:

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return _UNSEEN.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], str(text))


class PrintableStream:
    """A stream of text that writes control sequences out; whatever else is asked of it is the stream's own.

    Args:
        stream (`TextIO`): Where to write, for instance `sys.stdout`.
        keep (`str`): Control characters that pass.
    """

    def __init__(self, stream: TextIO, keep: str = "\n\t"):
        self.stream, self.keep = stream, keep

    def write(self, text: str) -> int:
        text = printable(text, self.keep)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """What is printed inside, and the warnings of loggers, reach the terminal without control sequences."""
    before = sys.stdout, sys.stderr
    sys.stdout = PrintableStream(sys.stdout)
    sys.stderr = PrintableStream(sys.stderr, "\n\t\r")  # progress bars go back to the start of their line
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


__all__ = ["PrintableStream", "printable", "printable_output"]
