# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""COCO-style instance annotations: the categories of an image as instructions."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator
from typing import Any

from .build_report import BuildReport, RowProblem
from .coco_instances import CocoInstances, Photographs
from .own_masks import union_of
from .rows import dataset_from_rows, kind_by_number, make_row, usable_rows


def build_coco(
    annotations: str | os.PathLike,
    images_dir: str | os.PathLike,
    instruction: str = "{category}",
    split: str = "train",
    report: BuildReport | None = None,
    num_absent: int = 0,
    categories: Collection[str] | None = None,
    seed: int = 0,
) -> Any:
    """COCO-style instances in the row schema: one sample per image and category.

    All instances of the category are `masks`, those of other categories `distractor_masks`. Crowd regions hold objects
    that are not told apart: those of the category become `ignore`, and where there is nothing else of it the sample is
    left out. `kind` is `none`, `single` or `multi` by the number of objects. Captions are not used.

    Args:
        annotations: The json file, with `images`, `annotations` and `categories`.
        images_dir: Folder of the images, as `file_name` calls them, or COCO's own.
        instruction (`str`, *optional*, defaults to `"{category}"`): The text, with the category's name in it.
        split (`str`, *optional*, defaults to `"train"`): What the rows are called; the file is one split.
        report (`BuildReport`, *optional*): Lists what could not be used.
        num_absent (`int`, *optional*, defaults to 0): Samples without target per image, for categories that have no
            annotation on it. True only where every object of every category is annotated.
        categories (`Collection[str]`, *optional*): Names of the categories to ask for; by default all.
        seed (`int`, *optional*, defaults to 0): Chooses the absent categories, for every image on its own.

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
    if "{category}" not in instruction:
        raise ValueError(f"instruction is {instruction!r}; it must have {{category}} where the category's name goes.")
    if num_absent < 0:
        raise ValueError(f"num_absent is {num_absent}; it must be 0 or more.")
    if isinstance(categories, str):
        raise ValueError(f"categories is the text {categories!r}; expected a collection of names.")
    report = BuildReport() if report is None else report
    rows = _CocoRows(CocoInstances(annotations, report, renumber=True), images_dir, split, report)
    rows.choose(categories)
    samples = usable_rows(rows.samples(num_absent, seed), lambda sample: rows.row(*sample, instruction), report)
    return dataset_from_rows(samples, f"coco-{split}", report)


class _CocoRows:
    def __init__(self, instances: CocoInstances, images_dir: str | os.PathLike, split: str, report: BuildReport):
        self.instances, self.photographs = instances, Photographs(images_dir)
        self.split, self.report = split, report
        self.names = self._category_names()
        self.chosen = set(self.names)

    def _category_names(self) -> dict[int, str]:
        listed, file = self.instances.categories, self.instances.name
        if not isinstance(listed, list) or not listed:
            self.report.add("bad_json", file, "no list 'categories'", lost=False)
            raise ValueError(f"{file} has no list categories with an id and a name each: there is nothing to ask for.")
        names: dict[int, str] = {}
        for place, category in enumerate(listed):
            number = category.get("id") if isinstance(category, dict) else None
            name = category.get("name") if isinstance(category, dict) else None
            if type(number) is not int or not isinstance(name, str) or not name.strip():
                detail = f"{category!r:.60} has no integer id or no name; its objects cannot be asked for"
                self.report.add("bad_annotation", f"{file} category at {place}", detail, lost=False)
            elif number in names:
                detail = f"the id appears again at {place}; the first is used"
                self.report.add("duplicate_id", f"{file} category {number}", detail, lost=False)
            else:
                names[number] = name.strip()
        return names

    def choose(self, categories: Collection[str] | None) -> None:
        """Ask for these categories only.

        Raises:
            ValueError: one is not there.
        """
        if categories is None:
            return
        missing = sorted(set(categories) - set(self.names.values()))
        if missing:
            raise ValueError(f"there is no category {', '.join(missing)}; there are {', '.join(self.names.values())}.")
        self.chosen = {number for number, name in self.names.items() if name in set(categories)}

    def samples(self, num_absent: int, seed: int) -> Iterator[tuple[str, tuple[int, Any, list[int]]]]:
        """Sample id, and image, category and annotations, of every image and category that is asked for."""
        for image_id in self.instances.images:
            present: dict[Any, list[int]] = {}
            for number in self.instances.of_image.get(image_id, ()):
                category = self.instances.annotations[number].get("category_id")
                present.setdefault(category if type(category) is int else repr(category), []).append(number)
            # Names count, not ids: a category listed twice is not absent where its twin is present.
            named = {self.names.get(category) for category in present}
            absent = sorted(number for number in self.chosen if self.names[number] not in named)
            absent = random.Random(f"{seed}-{image_id}").sample(absent, min(num_absent, len(absent)))
            for category, numbers in [*present.items(), *((category, []) for category in absent)]:
                if category in self.names and category not in self.chosen:
                    continue
                yield f"coco-{self.split}-{image_id}-{category}", (image_id, category, numbers)

    def row(self, image_id: int, category: Any, numbers: list[int], instruction: str) -> dict[str, Any] | None:
        """The row of an image and a category; `None` where there are crowd regions only."""
        if category not in self.names:
            detail = f"annotation {numbers[0]} has the category {category}, which is not in categories."
            raise RowProblem("bad_annotation", detail)
        crowds = [number for number in numbers if self.instances.annotations[number].get("iscrowd")]
        targets = [number for number in numbers if number not in crowds]
        if crowds and not targets:
            self.report.left_out["crowd regions only"] += 1
            return None
        size = self.instances.size(image_id)
        return make_row(
            image=self.photographs.path(image_id, size, [self.instances.images[image_id].get("file_name")]),
            instruction=instruction.replace("{category}", self.names[category]),
            masks=[self.instances.rle(number, image_id) for number in targets],
            distractor_masks=self.instances.others(image_id, targets),
            ignore=union_of([self.instances.rle(number, image_id) for number in crowds], size),
            instance_ids=targets,
            sample_id=f"coco-{self.split}-{image_id}-{category}",
            image_id=str(image_id),
            source="coco",
            split=self.split,
            kind=kind_by_number(len(targets)),
        )
