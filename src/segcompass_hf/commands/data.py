# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass data`: benchmarks and your own folders to Parquet shards with a card, and from there to the Hub."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .common import UserError, positive, user_errors

_BUILD_EPILOG = """\
SPEC is what `segcompass evaluate --dataset` takes, such as
  scenes:val   refcoco:ROOT:IMAGES:train   reasonseg:ROOT:val   folder:ROOT::train
Its help lists all. SPECs of one split are joined. Rows that cannot be used are counted in the card and listed in
build_report.json.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("data", help="build a data set with a card, and publish it")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="data sets to a folder of Parquet shards that load_dataset reads and streams",
        epilog=_BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("specs", nargs="+", metavar="SPEC", help="what to build, see below")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    build.add_argument("--split", help="one split for all rows (each SPEC's own)")
    build.add_argument("--limit", type=positive, help="only the first so many rows of each SPEC (all; of Scenes 500)")
    build.add_argument("--license", help="a Hub identifier such as cc-by-4.0, or a file with the licence's text")
    build.add_argument("--name", help="title of the card (the folder's name)")
    build.add_argument(
        "--allow-outside",
        action="store_true",
        help="read files outside of a SPEC's folder too, where its annotations or links lead there",
    )
    build.add_argument("--shard-size", default="500MB", help="size of a file (%(default)s)")
    build.add_argument("--json", action="store_true", help="print the counts as JSON")
    build.set_defaults(run=_build)

    push = actions.add_parser("push", help="publish such a folder on the Hub, after a check")
    push.add_argument("folder", type=Path, metavar="DIR", help="folder that `segcompass data build` has written")
    push.add_argument("repo_id", metavar="REPO_ID", help="owner/name")
    push.add_argument("--private", action="store_true", help="for yourself and your organisation only")
    push.add_argument("--dry-run", action="store_true", help="check, and show what would be published")
    push.set_defaults(run=_push)


def _build(args: argparse.Namespace) -> None:
    import datasets

    from ..data.hosting.write import check_split_name, write_dataset

    if args.split is not None:
        with user_errors("--split"):
            check_split_name(args.split)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    license = _license(args.license)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output} is there already; remove it or name another.")
    splits, reports, origins = _named_splits(args)
    with user_errors():
        written = write_dataset(
            splits, args.output, reports, args.shard_size, license, args.name, list(dict.fromkeys(origins))
        )
    if args.json:
        print(json.dumps(written.to_dict(), indent=1))
        return
    for split, counted in written.statistics.items():
        report, shards = written.reports[split], counted.num_shards
        print(
            f"{split}: {counted.num_rows} samples on {len(counted.images)} images ({counted.objects[0]} no target), "
            f"{shards} file{'s' * (shards > 1)}, {counted.bytes_on_disk / 1e6:.1f} MB"
        )
        if report.problems or report.left_out:
            print(f"  {report.summary()}")
    print(f"{args.output}: README.md, data/")


def _named_splits(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Split -> data set, split -> report, and what they were built from."""
    import datasets

    from ..data.builders.build_report import BuildReport
    from ..evaluation import datasets_spec

    parts: dict[str, list[Any]] = {}
    reports: dict[str, Any] = {}
    origins = []
    for spec in args.specs:
        with user_errors(spec):
            named = datasets_spec.load_dataset_of(spec, args.limit, args.allow_outside)
        split = args.split or named.split or _split_of_rows(named.dataset)
        joined = reports.setdefault(split, BuildReport())
        if named.report is not None:
            joined.problems += named.report.problems
            joined.left_out += Counter(named.report.left_out)
        dataset, cut = named.dataset, len(named.dataset) - (args.limit or len(named.dataset))
        if cut > 0:
            dataset = dataset.select(range(args.limit))
            joined.left_out["beyond --limit"] += cut
        parts.setdefault(split, []).append(dataset)
        origins.append(named.name)
    with user_errors("these data sets cannot be joined", (ValueError,)):  # columns of one name and several types
        return {split: datasets.concatenate_datasets(part) for split, part in parts.items()}, reports, origins


def _split_of_rows(dataset: Any) -> str:
    """What the rows call their split, where they agree on a name."""
    if "split" not in dataset.column_names:
        return "train"
    names = set(dataset.unique("split"))
    return names.pop() or "train" if len(names) == 1 else "train"


def _license(given: str | None) -> str | None:
    from ..data.hosting.card import is_license_id

    if given is None:
        return None
    if Path(given).is_file():
        with user_errors(f"cannot read --license {given}"):
            text = Path(given).read_text(encoding="utf-8").strip()
        if not text:
            raise UserError(f"--license {given} is an empty file.")
        return text + "\n"  # a line break tells a text from an identifier
    if not is_license_id(given):
        raise UserError(f"--license {given!r} is neither a file nor an identifier such as cc-by-4.0.")
    return given


def _push(args: argparse.Namespace) -> None:
    from ..data.hosting.publish import push_dataset

    with user_errors(kinds=(Exception,)):  # besides bad input whatever the network makes the Hub's client raise
        publication = push_dataset(args.folder, args.repo_id, private=args.private, dry_run=args.dry_run)
    print(f"would be published as {args.repo_id}:" if args.dry_run else f"{publication.url}:")
    print(publication.to_text())
