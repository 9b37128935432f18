# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The `segcompass` command. Parsing and printing only; every import that costs time stands inside a command."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from ._lazy import named_extras
from .commands import calibrate, convert, data, demo, drift, evaluate, explain, init, predict, push, serve, train
from .commands.common import UserError, one_line
from .printable import printable_output
from .stopping import Stopped, handled, is_main_process, raise_stopped

# Each in a module of its own.
_COMMANDS = (demo, predict, train, explain, evaluate, calibrate, drift, serve, data, init, convert, push)
_GO_ON = ("train", "evaluate")  # which keep what they have done


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: exit code, 0 on success, 2 on bad input, 130 after Ctrl-C and 143 after SIGTERM.
    """
    with printable_output():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with handled(raise_stopped), named_extras():
            args.run(args)
    except Stopped as stop:
        if is_main_process() and train.STARTED_BY_US not in os.environ:  # else the launcher says it
            command = shlex.join(["segcompass", *args.argv])
            keeps = args.command in _GO_ON or (args.command == "predict" and args.dataset is not None)
            goes_on = f"; this goes on: {command}" if keeps else ""
            print(f"segcompass {args.command}: stopped by {stop.signal.name}{goes_on}", file=sys.stderr)
        return stop.code
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, ImportError) as error:  # OSError: a full disk, a name that is too long
        if isinstance(error, ImportError) and (error.name or "").startswith("segcompass_hf"):
            raise  # a mistake of ours
        print(f"segcompass {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="segcompass", description="Reasoning segmentation: an instruction to reasoning and masks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
