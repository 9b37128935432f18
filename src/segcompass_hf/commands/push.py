# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass push`: a checkpoint or adapter to the Hub, after a look at what would be published."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import user_errors


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "push", help="a checkpoint or adapter, its code, card and concept dictionary to the Hub, checked first"
    )
    parser.add_argument(
        "folder", help="a saved model or adapter with its processor; or `scenes-tiny` or `photos-small`"
    )
    parser.add_argument("repo_id", metavar="repository", help="OWNER/NAME on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="check and show the tree with sizes, without a network")
    parser.add_argument("--private", action="store_true", help="for yourself and your organisation only")
    parser.add_argument("--revision", help="branch to publish on, made where missing (main)")
    parser.add_argument("--base-model", help="Hub id of the base model; an adapter is loaded onto it")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--collection", help="title of a collection of the owner's, made where missing, or a slug")
    card = parser.add_argument_group("model card", "without any of these, the folder's README.md stays as it is")
    card.add_argument("--recipe", help="what there is to tell: a YAML file, or a name (a wrong one lists them)")
    card.add_argument("--license", help="identifier of the Hub, such as apache-2.0")
    card.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="SUMMARY", help="summary.json of evaluations"
    )
    card.add_argument("--training", type=Path, help="Markdown, or the YAML file it was trained with")
    card.add_argument(
        "--example", nargs=2, action="append", default=[], metavar=("IMAGE", "INSTRUCTION"), help="for the page"
    )
    card.add_argument("--dataset", nargs="+", default=[], help="Hub ids of what it was trained on")
    card.add_argument("--space", help="Hub id of a Space to try it in")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Publish, or show what would be."""
    from transformers.utils import logging

    from ..checkpoint import bundled_folder
    from ..hub import push_to_hub

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    evaluations, card = [_read_summary(path) for path in args.evaluation], _card(args)
    with user_errors(kinds=(Exception,)):  # besides bad input whatever the network makes the Hub's client raise
        publication = push_to_hub(
            Path(bundled_folder(args.folder)),
            args.repo_id,
            private=args.private,
            revision=args.revision,
            dry_run=args.dry_run,
            base_model=args.base_model,
            evaluations=evaluations,
            collection=args.collection,
            commit_message=args.message,
            **card,
        )
    print(f"would be published as {args.repo_id}:" if args.dry_run else f"{publication.url}:")
    print(publication.to_text())
    if publication.commit:
        print(f'to pin it: revision="{publication.commit}"')
    if publication.collection:
        print(f"collection: {publication.collection}")


def _card(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the card that were given."""
    given = {"recipe": args.recipe, "license": args.license, "datasets": args.dataset, "space": args.space}
    given |= {"training": _read_training(args.training), "examples": [tuple(example) for example in args.example]}
    return {name: value for name, value in given.items() if value}


def _read_summary(path: Path) -> dict[str, Any]:
    path = path / "summary.json" if path.is_dir() else path
    kinds = (OSError, ValueError, KeyError, TypeError)
    with user_errors(f"--evaluation {path} is no summary of `segcompass evaluate`", kinds):
        figures = json.loads(path.read_text(encoding="utf-8"))
        figures["metrics"], figures["counts"], figures["versions"]  # noqa: B018
    return figures


def _read_training(path: Path | None) -> str | None:
    if path is None:
        return None
    from ..pages import code_block
    from ..private_text import check_publishable

    with user_errors(f"cannot read --training {path}"):
        text = path.read_text(encoding="utf-8").strip()
    with user_errors():
        check_publishable(f"--training {path}", text)
    return code_block(text, "yaml") if path.suffix in (".yaml", ".yml") else text
