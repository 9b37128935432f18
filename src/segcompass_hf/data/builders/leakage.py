# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets share photographs: one's training images are in another's test set, as in the RefCOCO family."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...images_segcompass import to_rgb_image
from .build_report import BuildReport
from .coco_instances import describe_folder, image_key
from .refer import SPLITS, find_folder, read_refs, refs_file

THUMBNAIL = 16  # pixels a side
# Among 3,015 photographs of COCO different ones come to 0.960 at most. Copies of a quarter of the size at JPEG
# quality 30 come to 0.986 at least, of half the size to 0.990.
SAME_CORRELATION = 0.98


def eval_image_ids(root: str | os.PathLike, names: Sequence[str] | None = None) -> set[str]:
    """Images in the validation or test splits of the RefCOCO family, for `exclude_images` of the builders.

    Args:
        root: Folder that holds `refcoco/`, `refcoco+/`, `refcocog/`, `grefcoco/`, or one of these.
        names (`Sequence[str]`, *optional*): Benchmarks that will be evaluated on; by default all that are there. Of
            each, every published split found in its folder counts (`unc`, `umd`, `google`).

    Returns:
        `set[str]`: Image ids as in the column `image_id`.

    Raises:
        FileNotFoundError: A benchmark named, or any at all, is not there.
        ValueError: A file is broken or unsafe.

    Example:

    ```python
    >>> held_out = eval_image_ids("refer_data", ["refcoco", "refcocog"])  # doctest: +SKIP
    >>> train = build_refcoco("refer_data", "train2014", exclude_images=held_out)  # doctest: +SKIP
    ```
    """
    if isinstance(names, str):
        names = [names]
    found: set[str] = set()
    searched = 0
    for name in SPLITS if names is None else names:
        try:
            folder = find_folder(root, name)
        except FileNotFoundError:
            if names is not None:
                raise
            continue
        present = [split_by for split_by in SPLITS[name] if (folder / refs_file(name, split_by)).is_file()]
        if names is not None and not present:
            raise FileNotFoundError(f"{name}: there are no refs: {describe_folder(folder)}")
        for split_by in present:
            searched += 1
            refs = read_refs(folder, name, split_by, BuildReport())
            found.update(image_key(ref["image_id"]) for ref in refs if ref["split"] != "train")
    if not searched:
        raise FileNotFoundError(f"there is none of {', '.join(SPLITS)}: {describe_folder(root)}")
    return found


def same_pictures(images: Sequence[Any], others: Sequence[Any]) -> list[tuple[int, int]]:
    """Pictures that are in both of two collections, by what they show: ids and file names differ between data sets.

    Pictures are shrunk to 16 x 16 grey values; those whose values correlate by 0.98 or more are the same, whatever
    their size and compression. One that was cropped or mirrored is another.

    Args:
        images, others (`Sequence[PIL.Image.Image | path]`): The two collections.

    Returns:
        `list[tuple[int, int]]`: Index in `images` and in `others` of every pair, in that order.

    Raises:
        ValueError: An image cannot be read.

    Example:

    ```python
    >>> pairs = same_pictures(train["image"], test["image"])  # doctest: +SKIP
    >>> train = train.select(sorted(set(range(len(train))) - {index for index, _ in pairs}))  # doctest: +SKIP
    ```
    """
    if not len(images) or not len(others):
        return []
    thumbnails, theirs = (np.stack([_thumbnail(image) for image in group]) for group in (images, others))
    return [(int(one), int(other)) for one, other in np.argwhere(thumbnails @ theirs.T >= SAME_CORRELATION)]


def _thumbnail(image: Any) -> np.ndarray:
    """Grey values `(256,)` of mean 0 and norm 1, so that products are correlations; all 0 of a plain picture."""
    small = to_rgb_image(image, "the image").convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1.0)  # grey values are whole numbers: only plain ones are below
