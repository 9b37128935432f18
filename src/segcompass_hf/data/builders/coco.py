# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""COCO-style instance annotations: the categories of an image as instructions."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from .build_report import BuildReport
from .categories import build_categories, check_arguments
from .coco_instances import CocoInstances
from .photographs import Photographs


def build_coco(
    annotations: str | os.PathLike,
    images_dir: str | os.PathLike,
    instruction: str = "{category}",
    split: str = "train",
    report: BuildReport | None = None,
    num_absent: int = 0,
    categories: Collection[str] | None = None,
    seed: int = 0,
    allow_outside: bool = False,
) -> Any:
    """COCO-style instances in the row schema: one sample per image and category.

    All instances of the category are `masks`, those of other categories `distractor_masks`. Categories of one name are
    one. Crowd regions (`iscrowd`, or `ignore`) hold objects that are not told apart: those of the category become
    `ignore`, and where there is nothing else of it the sample is left out. Ids may be numbers or text. Where a file
    states no `height` and `width`, those of the photographs count. Images of one `file_name` are one. Categories that
    LVIS lists in an image's `not_exhaustive_category_ids` are left out there. `kind` is `none`, `single` or `multi` by
    the number of objects. Captions are not used.

    Args:
        annotations: The json file, with `images`, `annotations` and `categories`.
        images_dir: Folder of the images, as `file_name` calls them, or COCO's own.
        instruction (`str`, *optional*, defaults to `"{category}"`): The text, with the category's name in it.
        split (`str`, *optional*, defaults to `"train"`): What the rows are called; the file is one split.
        report (`BuildReport`, *optional*): Lists what could not be used.
        num_absent (`int`, *optional*, defaults to 0): Samples without target per image, for categories that have no
            annotation on it, nor one of a category whose `supercategory` they are. True only where every object of
            every category is annotated, or where images have LVIS's `neg_category_ids`, which are then chosen from.
            Images with an annotation whose category is not known get none.
        categories (`Collection[str]`, *optional*): Names of the categories to ask for; by default all.
        seed (`int`, *optional*, defaults to 0): Chooses the absent categories, for every image on its own.
        allow_outside (`bool`, *optional*, defaults to `False`): Use photographs outside of `images_dir` as well, where
            links or the annotations lead there.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        FileNotFoundError: The file or folder is not there.
        ValueError: The file is broken or of another format, an argument is wrong, or no sample could be used.

    Example:

    ```python
    >>> build_coco("instances.json", "images", instruction="every {category} in the picture", num_absent=1)
    ```
    """
    check_arguments(instruction, num_absent, categories)
    report = BuildReport() if report is None else report
    instances = CocoInstances(annotations, report, Photographs(images_dir, allow_outside), renumber=True)
    return build_categories(instances, "coco", split, instruction, num_absent, categories, seed)
