# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a builder could not use, counted and listed: no row of a benchmark disappears without a word."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...files import write_whole
from ...printable import printable

logger = logging.get_logger(__name__)


class RowProblem(ValueError):
    """Something that keeps a mask, an image or a row from being used.

    Args:
        kind (`str`): what it is called in a `BuildReport`, such as `"empty_mask"`.
        detail (`str`): what was got and what is expected.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, str(self))


class BuildReport:
    """Problems met while a data set was built.

    Every sample of the source ends up in exactly one place: in the data set (`num_rows`), left out because of a
    problem (`num_lost`), or left out on purpose (`left_out`, such as the images of another benchmark's test set).

    Kinds in use: `missing_file`, `bad_json`, `missing_image`, `unreadable_image`, `bad_annotation`,
    `missing_annotation`, `empty_mask`, `wrong_size`, `duplicate_id`, `empty_text`. Builders may add others.

    Example:

    ```python
    >>> report = BuildReport()
    >>> report.add("empty_mask", "refcoco-unc-train-7-12", "the mask has no pixel.")
    >>> report.counts, report.num_lost
    ({'empty_mask': 1}, 1)
    ```
    """

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self.left_out: Counter[str] = Counter()  # reason -> samples left out on purpose
        self.num_rows = 0

    def add(self, kind: str, where: str, detail: str, lost: bool = True) -> None:
        """List a problem.

        Args:
            kind (`str`): one name per kind of problem.
            where (`str`): sample, file or annotation.
            detail (`str`): what is wrong with it.
            lost (`bool`, *optional*, defaults to `True`): whether a row is missing from the data set because of it.
        """
        self.problems.append({"kind": kind, "where": str(where), "detail": str(detail), "lost": lost})

    @property
    def counts(self) -> dict[str, int]:
        """Problems by kind, the most frequent first."""
        return dict(Counter(problem["kind"] for problem in self.problems).most_common())

    @property
    def num_lost(self) -> int:
        """Samples that are missing from the data set because of a problem."""
        return sum(problem["lost"] for problem in self.problems)

    def summary(self) -> str:
        """One line: rows, losses and what they come from, with the first example of each kind."""
        text = f"{self.num_rows} rows"
        if self.left_out:
            text += ", " + ", ".join(f"{number} left out ({why})" for why, number in self.left_out.items())
        if not self.problems:
            return text + ", no problems."
        first: dict[str, dict[str, Any]] = {}
        for problem in self.problems:
            first.setdefault(problem["kind"], problem)
        kinds = [
            f"{kind} x {number} (first: {printable(first[kind]['where'])}: {printable(first[kind]['detail']):.200})"
            for kind, number in self.counts.items()
        ]
        return f"{text}, {self.num_lost} lost. Problems: " + "; ".join(kinds)

    def log(self, name: str) -> None:
        """Say the summary: as a warning where there are problems."""
        (logger.warning if self.problems else logger.info)(f"{name}: {self.summary()}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "num_lost": self.num_lost,
            "left_out": dict(self.left_out),
            "counts": self.counts,
            "problems": self.problems,
        }

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_whole(path, text.encode(errors="backslashreplace"))
