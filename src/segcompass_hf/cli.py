# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The `segcompass` command. Parsing and printing only; imports that cost time stand where Ctrl-C is handled."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from .printable import printable_output
from .stopping import STARTED_BY_US, Stopped, handled, is_main_process, raise_stopped

_GO_ON = ("train", "evaluate")  # which keep what they have done


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        from .commands.common import one_line

        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: exit code, 0 on success, 2 on bad input, 130 after Ctrl-C and 143 after SIGTERM.
    """
    args = argparse.Namespace(argv=sys.argv[1:] if argv is None else list(argv))
    with printable_output():
        try:
            with handled(raise_stopped):
                return _run(args)
        except Stopped as stop:
            _print_stopped(args, stop)
            return stop.code


def _run(args: argparse.Namespace) -> int:
    from ._lazy import named_extras
    from .commands.common import UserError, one_line

    _parser().parse_args(args.argv, args)
    try:
        with named_extras():
            args.run(args)
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, ImportError) as error:  # OSError: a full disk, a name that is too long
        if isinstance(error, ImportError) and (error.name or "").startswith("segcompass_hf"):
            raise  # a mistake of ours
        print(f"segcompass {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _print_stopped(args: argparse.Namespace, stop: Stopped) -> None:
    if is_main_process() and STARTED_BY_US not in os.environ:  # else the launcher says it
        command = args.argv[0] if args.argv else ""  # `args` holds it only where the signal came late enough
        keeps = command in _GO_ON or (command == "predict" and getattr(args, "dataset", None) is not None)
        goes_on = f"; this goes on: {shlex.join(['segcompass', *args.argv])}" if keeps else ""
        print(f"segcompass {command}: stopped by {stop.signal.name}{goes_on}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from .commands import calibrate, convert, data, demo, drift, evaluate, explain, init, predict, push, serve, train

    parser = _Parser(prog="segcompass", description="Reasoning segmentation: an instruction to reasoning and masks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, predict, train, explain, evaluate, calibrate, drift, serve, data, init, convert, push):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
