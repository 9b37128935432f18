# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows to train on and rows to evaluate on, without an image in both."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .annotation_files import find_annotations, named_splits
from .build_report import BuildReport
from .folder import build_folder

logger = logging.get_logger(__name__)

HELD_OUT_SPLITS = ("val", "validation", "test")  # the first one there is


def split_by_image(dataset: Any, held_out_share: float = 0.2, seed: int = 0) -> tuple[Any, Any]:
    """Hold a share of the images out, with all their rows: instructions about a known image would be no test.

    Which images these are depends on their `image_id` and the seed, not on the order of the rows.

    Args:
        dataset (`datasets.Dataset`): In the row schema.
        held_out_share (`float`, *optional*, defaults to 0.2): Of the images, in (0, 1); at least one is held out.
        seed (`int`, *optional*, defaults to 0): Another seed holds others out.

    Returns:
        `tuple`: Rows to train on and rows held out, in the order of the data set.

    Raises:
        ValueError: The share is not in (0, 1), or there are fewer than two images.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(f"the held-out share is {held_out_share}; expected a number in (0, 1), such as 0.2.")
    ids = dataset["image_id"]
    images = sorted(set(ids), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if len(images) < 2:
        raise ValueError(f"all {len(ids)} rows are about one image; holding some out needs at least two images.")
    number = min(max(round(held_out_share * len(images)), 1), len(images) - 1)
    chosen = set(images[:number])
    held_out = [index for index, name in enumerate(ids) if name in chosen]
    train = [index for index, name in enumerate(ids) if name not in chosen]
    return dataset.select(train), dataset.select(held_out)


def build_folder_splits(
    root: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    held_out_share: float = 0.2,
    seed: int = 0,
    report: BuildReport | None = None,
    allow_outside: bool = False,
) -> tuple[Any, Any]:
    """A folder of your own (see [`build_folder`]) as rows to train on and rows to evaluate on.

    Where lines have a column `split`, or the splits have files of their own, those count: `train` against the first
    of `val`, `validation` and `test` that is there. Else a share of the images is held out.

    Args:
        root (path): Folder of the images.
        annotations (path, *optional*): The JSONL or CSV file, as for [`build_folder`].
        held_out_share (`float`, *optional*, defaults to 0.2): Of the images, where nothing says the splits.
        seed (`int`, *optional*, defaults to 0): Of that choice.
        report (`BuildReport`, *optional*): Lists what could not be used, of both; a broken line once.
        allow_outside (`bool`, *optional*, defaults to `False`): As for [`build_folder`].

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: To train on, and held out.

    Raises:
        FileNotFoundError, ValueError: As for [`build_folder`] and [`split_by_image`].
    """
    report = BuildReport() if report is None else report
    path = find_annotations(root, annotations, "train")
    named = named_splits(path)
    held_out = next((name for name in HELD_OUT_SPLITS if name in named), None)
    if held_out is None and annotations is None:
        held_out = next((name for name in HELD_OUT_SPLITS if _has_own_file(root, name, path)), None)
    train = build_folder(root, annotations, "train", report, allow_outside)
    if held_out is None:
        return split_by_image(train, held_out_share, seed)
    second = BuildReport()
    evaluation = build_folder(root, annotations, held_out, second, allow_outside)
    report.num_rows += second.num_rows
    report.problems += [problem for problem in second.problems if problem not in report.problems]
    report.left_out.pop("other splits", None)
    if others := sum(count for name, count in named.items() if name not in ("train", held_out)):
        report.left_out["other splits"] += others
    if shared := set(train["image_id"]) & set(evaluation["image_id"]):
        logger.warning(
            f"{len(shared)} images are both in train and in {held_out} (first: {min(shared)!r}): what is measured on "
            "them says little about new images."
        )
    return train, evaluation


def _has_own_file(root: str | os.PathLike, split: str, train_file: Path) -> bool:
    try:
        return find_annotations(root, None, split) != train_file
    except (FileNotFoundError, ValueError):
        return False
