# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets that can be hosted: Parquet shards with the images inside, a card, and a list of what was left out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...files import staged_folder
from ...private_text import without_folders
from ..builders.build_report import BuildReport
from ..schema import row_features
from .card import is_license_id, render_card
from .figure import save_contact_sheet
from .shards import SHOWN_ROWS, SplitWriter
from .statistics import SplitStatistics

logger = logging.get_logger(__name__)

REPORT_FILE, FIGURE_FILE = "build_report.json", "samples.png"

__all__ = ["WrittenDataset", "write_dataset"]


@dataclass
class WrittenDataset:
    """What `write_dataset` has written.

    Args:
        folder (`Path`): Where.
        statistics (`dict[str, SplitStatistics]`): By split.
        reports (`dict[str, BuildReport]`): By split.
    """

    folder: Path
    statistics: dict[str, SplitStatistics]
    reports: dict[str, BuildReport]

    def to_dict(self) -> dict[str, Any]:
        """Counts, for json."""
        splits = {}
        for split, counted in self.statistics.items():
            report = self.reports[split]
            problems = {"lost": report.num_lost, "left_out": dict(report.left_out), "problems": report.counts}
            splits[split] = counted.to_dict() | problems
        return {"folder": str(self.folder), "splits": splits}


def write_dataset(
    splits: Any,
    folder: str | os.PathLike,
    report: BuildReport | Mapping[str, BuildReport] | None = None,
    shard_size: int | str = "500MB",
    license: str | None = None,
    name: str | None = None,
    origins: Sequence[str] = (),
) -> WrittenDataset:
    """Write a data set that `datasets.load_dataset(folder)` loads and streams, and `push_dataset` publishes.

    The folder gets `data/{split}-00000-of-00003.parquet`, a card (`README.md`), `build_report.json`, with matplotlib
    a figure of samples (`samples.png`), and `LICENSE` where a licence's text is given. It is made aside and appears
    when it is complete: a build that is killed leaves nothing in its place, and the next one starts afresh. Images
    are the bytes of their files. Every image and mask is decoded once; rows that fail are left out and reported.

    Args:
        splits: `DatasetDict`, `IterableDatasetDict` or dict of split -> rows, or one data set or iterable of rows,
            which is then called `train`. Rows are in the row schema, see `schema.row_features`.
        folder: Where to; it must not hold anything yet.
        report (`BuildReport` or `Mapping[str, BuildReport]`, *optional*): What the builders could not use, by split;
            goes into the card, and gets the rows that cannot be written. Folders in it are not published.
        shard_size (`int` or `str`, *optional*, defaults to `"500MB"`): Size of a file at which the next one starts.
        license (`str`, *optional*): A Hub identifier such as `"cc-by-4.0"`, or the text of a licence. Without it the
            card states what is known of the sources' licences.
        name (`str`, *optional*): Title of the card; the folder's name by default.
        origins (`Sequence[str]`, *optional*): What it was built from, for the card.

    Returns:
        [`WrittenDataset`]

    Raises:
        FileExistsError: The folder holds something, or another build writes to it.
        ValueError: Columns are not those of the row schema, a split has no usable row or an impossible name.
    """
    from datasets.utils.py_utils import convert_file_size_to_int

    folder, splits = Path(os.path.abspath(folder)), _as_splits(splits)
    reports, shard_bytes = _as_reports(report, list(splits)), convert_file_size_to_int(shard_size)
    if shard_bytes < 1:
        raise ValueError(f"shard_size is {shard_size!r}; expected a positive size such as '500MB'.")
    if set("[]") & set(folder.name):
        raise ValueError(f"the folder is called {folder.name!r}; datasets would take the brackets for a pattern.")
    _check_free(folder)
    with staged_folder(folder) as part:
        statistics = _write_parts(splits, part, reports, shard_bytes)
        _write_card(part, statistics, reports, license, name or folder.name, origins)
    return WrittenDataset(folder, statistics, reports)


def _write_parts(
    splits: dict[str, Any], part: Path, reports: dict[str, BuildReport], shard_bytes: int
) -> dict[str, SplitStatistics]:
    statistics, shown = {}, []
    for split, rows in splits.items():
        writer = SplitWriter(split, part, shard_bytes, reports[split])
        known = len(reports[split].problems)  # which the builder has logged
        statistics[split] = writer.write(rows)
        shown.append(writer.sample_rows())
        if len(reports[split].problems) > known:
            reports[split].log(f"split {split}")
    if not save_contact_sheet(_in_turn(shown), part / FIGURE_FILE):
        logger.warning("the card has no figure of samples; it needs matplotlib: pip install 'segcompass_hf[demo]'.")
    return statistics


def _in_turn(lists: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first rows of all splits, the second ones and so on; images that were not seen yet go first."""
    turns = [row for turn in zip_longest(*lists) for row in turn if row is not None]
    images: set[bytes] = set()
    again = []
    for row in turns:
        again.append(row["image"]["bytes"] in images)
        images.add(row["image"]["bytes"])
    order = sorted(range(len(turns)), key=again.__getitem__)  # stable
    return [turns[index] for index in order[:SHOWN_ROWS]]


def _write_card(
    part: Path,
    statistics: dict[str, SplitStatistics],
    reports: dict[str, BuildReport],
    license: str | None,
    name: str,
    origins: Sequence[str],
) -> None:
    from ... import __version__

    figure = FIGURE_FILE if (part / FIGURE_FILE).exists() else None
    card = render_card(name, statistics, reports, license, origins, figure, __version__)
    (part / "README.md").write_text(card, encoding="utf-8")
    listed = {split: without_folders(report.to_dict()) for split, report in reports.items()}
    (part / REPORT_FILE).write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if license is not None and not is_license_id(license):
        (part / "LICENSE").write_text(license.strip() + "\n", encoding="utf-8")


def _as_splits(splits: Any) -> dict[str, Any]:
    """Split -> rows whose columns are those of the schema, images undecoded."""
    if not isinstance(splits, Mapping):
        splits = {"train": splits}
    if not splits:
        raise ValueError("there is no split to write.")
    for split in splits:
        check_split_name(str(split))
    return {str(split): _encoded_rows(rows, str(split)) for split, rows in splits.items()}


def check_split_name(split: str) -> None:
    """Refuse a name that `datasets` would not read back.

    Raises:
        ValueError: It is no name, or means all splits together.
    """
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"{split!r} is no name of a split; expected letters, digits, _ and dots inside.")
    if split.lower() == "all":
        raise ValueError(f"a split cannot be called {split!r}, which to datasets means all splits; name another.")


def _encoded_rows(rows: Any, split: str) -> Iterable[dict[str, Any]]:
    if not hasattr(rows, "cast_column"):
        return rows
    import datasets

    expected, found = row_features(), rows.features
    if found is None:
        raise ValueError(f"split {split!r} is a stream of unknown columns; cast it to schema.row_features() first.")
    plain = datasets.Features({**found, "image": expected["image"]}) if _has_image(found) else found
    wrong = [column for column in expected if column not in plain or plain[column] != expected[column]]
    more = [column for column in plain if column not in expected]
    if wrong or more:
        raise ValueError(
            f"split {split!r} is not in the row schema: columns {wrong} are missing or of another type, {more} are "
            "unknown. Expected are the columns of schema.row_features(); the builders of segcompass_hf.data give them."
        )
    return rows.with_format(None).cast_column("image", datasets.Image(decode=False))


def _has_image(features: Any) -> bool:
    import datasets

    return isinstance(features.get("image"), datasets.Image)


def _as_reports(report: Any, splits: list[str]) -> dict[str, BuildReport]:
    if isinstance(report, BuildReport):
        if len(splits) > 1:
            raise ValueError(f"there is one report for the splits {splits}; pass a dict of split -> BuildReport.")
        return {splits[0]: report}
    unknown = sorted(set(report or {}) - set(splits))
    if unknown:
        raise ValueError(f"there are reports for {unknown}, but the splits are {splits}.")
    return {split: (report or {}).get(split) or BuildReport() for split in splits}


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} is there already; remove it or name another.")
