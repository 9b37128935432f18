# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass serve`: the live page, here or as the files of a Hugging Face Space, or the server of an API."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import BUNDLED, SCENES
from .common import UserError, add_model, load_checkpoint, positive, user_errors


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "serve",
        help="a live page: draw or upload a picture, ask, watch it think, turn concepts up and down; with --api a "
        "server for programs",
    )
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (%(default)s)"
    )
    parser.add_argument(
        "--port", type=_port, help="port to listen on (the first free one from 7860; with --api, 8080)"
    )
    parser.add_argument(
        "--share", action="store_true", help="a public address for three days, through gradio's servers"
    )
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write the files of a Hugging Face Space instead, and stop"
    )
    parser.add_argument(
        "--package", help="with --space: what the Space installs this package from (segcompass_hf from PyPI)"
    )
    api = parser.add_argument_group("the server for programs")
    api.add_argument(
        "--api", action="store_true", help="serve JSON over HTTP instead of the page; see docs/how-to/endpoint.md"
    )
    api.add_argument("--batch-size", type=positive, metavar="N", help="questions answered together (8)")
    api.add_argument(
        "--batch-wait", type=_milliseconds, metavar="MS", help="how long a question waits for others, in ms (10)"
    )
    for name, what in (("forbid", "no mask of any answer may show"), ("require", "every mask has to show")):
        api.add_argument(f"--{name}", nargs="+", metavar="CONCEPT", help=f"concepts that {what}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    _check(args)
    if args.api:
        _serve_api(args)
    elif args.space is not None:
        _write_space(args)
    else:
        _serve_page(args)


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that would do nothing."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    if args.space is None and args.package is not None:
        raise UserError("--package belongs to --space.")
    if args.api and (odd := given & {"share", "space"}):
        raise UserError(f"--{min(odd)} is of the page, which --api does not serve.")
    if not args.api and (odd := given & {"batch_size", "batch_wait", "forbid", "require"}):
        raise UserError(f"--{min(odd).replace('_', '-')} belongs to --api.")


def _serve_api(args: argparse.Namespace) -> None:
    from ..hub.endpoint.handler import RequestHandler
    from ..hub.endpoint.server import Server, bind, log_to_terminal
    from ..hub.endpoint.service import ServerLimits

    with user_errors(kinds=(OSError,)):  # before a model is loaded for a port that is taken
        listener = bind(args.host, 8080 if args.port is None else args.port)
    with listener:
        model, processor, name = load_checkpoint(args.model)
        with user_errors(kinds=(ValueError,)):  # a concept that is not known
            handler = RequestHandler(model, processor, forbid=args.forbid or (), require=args.require or ())
        seconds = None if args.batch_wait is None else args.batch_wait / 1000
        given = {"batch_size": args.batch_size, "batch_seconds": seconds}
        limits = ServerLimits(**{name: value for name, value in given.items() if value is not None})
        if name in BUNDLED:
            print(f"note: {BUNDLED[name]}", file=sys.stderr)
        log_to_terminal()
        host, port = listener.getsockname()[:2]
        print(f"{name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        Server(handler, limits).run(sockets=[listener])


def _serve_page(args: argparse.Namespace) -> None:
    with user_errors("the live page needs gradio: pip install 'segcompass_hf[explain]'", (ImportError,)):
        from ..explain.live.app import build_app, launch_options
    from ..explain.live.examples import card_examples
    from ..explain.live.model import LiveModel

    model, processor, name = load_checkpoint(args.model)
    live, note = LiveModel(model, processor, name), BUNDLED.get(name, "")
    app = build_app(live, scenes=name == SCENES, note=note, examples=card_examples(name))
    with user_errors(kinds=(OSError,)):  # gradio's, for a port that is taken
        _, local, public = app.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            prevent_thread_lock=True,
            **launch_options(),
        )
    print(f"{name}: {local}" + (f" and {public}" if public else ""), flush=True)
    app.block_thread()


def _write_space(args: argparse.Namespace) -> None:
    from ..hub.space.write import write_space

    with user_errors():
        written = write_space(args.space, args.model, args.package)
    print(f"{args.space}: {', '.join(path.name for path in written)}")
    files = [path.name for path in written] + [args.package] * str(args.package).endswith(".whl")
    names = " ".join(f"--include {shlex.quote(name)}" for name in files)  # whatever else lies there stays there
    print(f"upload with: hf upload OWNER/NAME {shlex.quote(str(args.space))} . --repo-type space {names}")


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; they go from 1 to 65535")
    return int(text)


def _milliseconds(text: str) -> int:
    if not text.isdigit() or int(text) > 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds; they go from 0 to 10000")
    return int(text)
