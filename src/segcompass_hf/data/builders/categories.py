# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The categories of an image as instructions: what COCO, LabelMe and YOLO files become."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Collection, Iterator
from typing import Any

from .build_report import BuildReport, RowProblem
from .coco_instances import CocoInstances
from .own_masks import union_of
from .rows import dataset_from_rows, kind_by_number, make_row, usable_rows
from .values import as_id


def build_categories(
    instances: CocoInstances,
    source: str,
    split: str,
    instruction: str,
    num_absent: int,
    categories: Collection[str] | None,
    seed: int,
) -> Any:
    """One row per image and category, as the builders of `segcompass_hf.data` describe it.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        ValueError: no row could be used, or there is no category of a name in `categories`.
    """
    rows = CategoryRows(instances, source, split, instances.report)
    rows.choose(categories)
    samples = usable_rows(rows.samples(num_absent, seed), lambda sample: rows.row(sample, instruction), rows.report)
    return dataset_from_rows(samples, f"{source}-{split}", rows.report)


def check_arguments(instruction: str, num_absent: int, categories: Collection[str] | None) -> None:
    """Refuse arguments that no file can be read with.

    Raises:
        ValueError: one is wrong.
    """
    if "{category}" not in instruction:
        raise ValueError(f"instruction is {instruction!r}; it must have {{category}} where the category's name goes.")
    if num_absent < 0:
        raise ValueError(f"num_absent is {num_absent}; it must be 0 or more.")
    if isinstance(categories, str):
        raise ValueError(f"categories is the text {categories!r}; expected a collection of names.")


class CategoryRows:
    """One row per image and category.

    Args:
        instances ([`CocoInstances`]): The objects of the images, in whatever form they were drawn.
        source (`str`): What the rows say they come from.
        split (`str`): What the rows are called.
        report (`BuildReport`): Gets what could not be used.
    """

    def __init__(self, instances: CocoInstances, source: str, split: str, report: BuildReport):
        self.instances, self.source, self.split, self.report = instances, source, split, report
        self.first: dict[int | str, int | str] = {}  # category -> the first one of its name, which stands for all
        self.names: dict[int | str, str] = {}
        self.broader: dict[int | str, set[int | str]] = {}  # category -> those which are its supercategory
        self._read_categories()
        self.chosen = set(self.names)
        strays = {self._category(annotation) for annotation in instances.strays}
        self.never_absent = strays if strays <= set(self.names) else set(self.names)

    def _read_categories(self) -> None:
        listed, file = self.instances.categories, self.instances.name
        if not isinstance(listed, list) or not listed:
            self.report.add("bad_json", file, "no list 'categories'", lost=False)
            raise ValueError(f"{file} has no list categories with an id and a name each: there is nothing to ask for.")
        of_name: dict[str, int | str] = {}
        for place, category in enumerate(listed):
            number = as_id(category.get("id")) if isinstance(category, dict) else None
            name = category.get("name") if isinstance(category, dict) else None
            if number is None or not isinstance(name, str) or not name.strip():
                detail = f"{category!r:.60} has no integer id or no name; its objects cannot be asked for"
                self.report.add("bad_annotation", f"{file} category at {place}", detail, lost=False)
            elif number in self.first:
                detail = f"the id appears again at {place}; the first is used"
                self.report.add("duplicate_id", f"{file} category {number}", detail, lost=False)
            else:
                self.first[number] = of_name.setdefault(_same_name(name), number)
                self.names.setdefault(self.first[number], name.strip())
        for category in (category for category in listed if isinstance(category, dict)):
            stated, above = as_id(category.get("id")), category.get("supercategory")
            number = None if stated is None else self.first.get(stated)
            if number is not None and isinstance(above, str) and _same_name(above) in of_name:
                self.broader.setdefault(number, set()).add(of_name[_same_name(above)])

    def choose(self, categories: Collection[str] | None) -> None:
        """Ask for these categories only.

        Raises:
            ValueError: one is not there.
        """
        if categories is None:
            return
        wanted, known = set(map(_same_name, categories)), set(map(_same_name, self.names.values()))
        missing = sorted(name for name in set(categories) if _same_name(name) not in known)
        if missing:
            raise ValueError(f"there is no category {', '.join(missing)}; there are {', '.join(self.names.values())}.")
        self.chosen = {number for number, name in self.names.items() if _same_name(name) in wanted}

    def _category(self, annotation: dict[str, Any]) -> int | str:
        """Its category, by the first one of that name; what it says instead where there is none."""
        stated = annotation.get("category_id")
        number = as_id(stated)
        return repr(stated) if number is None else self.first.get(number, number)

    def samples(self, num_absent: int, seed: int) -> Iterator[tuple[str, tuple[int | str, Any, list[int]]]]:
        """Sample id, and image, category and annotations, of every image and category that is asked for."""
        for image_id in self.instances.images:
            present: dict[Any, list[int]] = {}
            for number in self.instances.of_image.get(image_id, ()):
                present.setdefault(self._category(self.instances.annotations[number]), []).append(number)
            absent = self._absent(image_id, present, num_absent, seed)
            for category, numbers in [*present.items(), *((category, []) for category in absent)]:
                if category in self.names and category not in self.chosen:
                    continue
                yield self._sample_id(image_id, category), (image_id, category, numbers)

    def _sample_id(self, image_id: int | str, category: int | str) -> str:
        return f"{self.source}-{self.split}-{image_id}-{category}"

    def _absent(self, image_id: int | str, present: Collection[Any], num_absent: int, seed: int) -> list[int | str]:
        """Categories that are not on an image; none where an annotation may be of any category."""
        if any(category not in self.names for category in present):
            return []
        left = self.chosen - self._with_broader(present) - self.never_absent
        if isinstance(self.instances.images[image_id].get("neg_category_ids"), list):
            left &= self._listed(image_id, "neg_category_ids")
        absent = sorted(left, key=lambda number: (isinstance(number, str), number))
        return random.Random(f"{seed}-{image_id}").sample(absent, min(num_absent, len(absent)))

    def _with_broader(self, present: Collection[Any]) -> set[Any]:
        """Categories on an image, and those above them: Roboflow lists "cups", which no object has, above "cup"."""
        found, left = set(), list(present)
        while left:
            category = left.pop()
            if category not in found:
                found.add(category)
                left += self.broader.get(category, ())
        return found

    def _listed(self, image_id: int | str, key: str) -> set[Any]:
        """Categories in a list of LVIS's at an image."""
        listed = self.instances.images[image_id].get(key)
        return {self._category({"category_id": number}) for number in listed} if isinstance(listed, list) else set()

    def row(self, sample: tuple[int | str, Any, list[int]], instruction: str) -> dict[str, Any] | None:
        """The row of an image, a category and its annotations; `None` where there are crowd regions only."""
        image_id, category, numbers = sample
        if category not in self.names:
            detail = f"{self.instances.called(numbers[0])} has the category {category}, which is not in categories."
            raise RowProblem("bad_annotation", detail)
        if category in self._listed(image_id, "not_exhaustive_category_ids"):
            self.report.left_out["not all objects annotated"] += 1
            return None
        crowds = [number for number in numbers if self.instances.is_crowd(number)]
        targets = [number for number in numbers if number not in crowds]
        if crowds and not targets:
            self.report.left_out["crowd regions only"] += 1
            return None
        image = self.instances.photograph(image_id)
        size = self.instances.size(image_id)
        return make_row(
            image=image,
            instruction=instruction.replace("{category}", self.names[category]),
            masks=[self.instances.rle(number, image_id) for number in targets],
            distractor_masks=self.instances.others(image_id, targets),
            ignore=union_of([self.instances.rle(number, image_id) for number in crowds], size),
            instance_ids=targets,
            sample_id=self._sample_id(image_id, category),
            image_id=str(image_id),
            source=self.source,
            split=self.split,
            kind=kind_by_number(len(targets)),
        )


def _same_name(name: str) -> str:
    """What two names of one category have in common: "Cup " and "cup" ask for the same."""
    return unicodedata.normalize("NFC", " ".join(name.split())).casefold()
