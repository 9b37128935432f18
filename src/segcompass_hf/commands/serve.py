# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass serve`: the live page, here or as the files of a Hugging Face Space."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..checkpoint import BUNDLED, SCENES
from .common import UserError, add_model, load_checkpoint, user_errors


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "serve", help="a live page: draw or upload a picture, ask, watch it think, turn concepts up and down"
    )
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (%(default)s)"
    )
    parser.add_argument("--port", type=_port, help="port to listen on (the first free one from 7860)")
    parser.add_argument(
        "--share", action="store_true", help="a public address for three days, through gradio's servers"
    )
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write the files of a Hugging Face Space instead, and stop"
    )
    parser.add_argument(
        "--package", help="with --space: what the Space installs this package from (segcompass_hf from PyPI)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    if args.space is not None:
        _write_space(args)
        return
    if args.package is not None:
        raise UserError("--package belongs to --space.")
    with user_errors("the live page needs gradio: pip install 'segcompass_hf[explain]'", (ImportError,)):
        from ..explain.live.app import build_app, launch_options
    from ..explain.live.model import LiveModel

    model, processor, name = load_checkpoint(args.model)
    app = build_app(LiveModel(model, processor, name), scenes=name == SCENES, note=BUNDLED.get(name, ""))
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
