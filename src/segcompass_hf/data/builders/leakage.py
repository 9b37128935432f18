# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO share photographs: one's training images are in another's test set."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .build_report import BuildReport
from .coco_instances import describe_folder, image_key
from .refer import SPLITS, find_folder, read_refs, refs_file


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
