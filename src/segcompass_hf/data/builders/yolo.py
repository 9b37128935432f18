# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""YOLO segmentation: a text file of classes and corners for each photograph, the names of classes as instructions."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from .build_report import BuildReport, RowProblem
from .categories import build_categories, check_arguments
from .coco_instances import CocoInstances, describe_folder
from .found_files import PICTURES
from .photographs import Photographs
from .polygons import MARGIN_SHARE, polygons_to_rle
from .values import as_whole


def build_yolo(
    data: str | os.PathLike,
    instruction: str = "{category}",
    split: str = "train",
    report: BuildReport | None = None,
    num_absent: int = 0,
    categories: Collection[str] | None = None,
    seed: int = 0,
    allow_outside: bool = False,
) -> Any:
    """A YOLO segmentation data set in the row schema: one sample per photograph and class.

    A label file has one line per object: the number of its class, then x and y of its corners as shares of width and
    height. All objects of the class are `masks`, those of other classes `distractor_masks`. The label file of
    `images/train/dog.jpg` is `labels/train/dog.txt`, or `dog.txt` beside it; a photograph without one has no objects.
    Lines that are boxes are no masks: their class gives no sample there, and is named.

    Args:
        data: The yaml file of the data set. Its `names` are a list or a mapping from numbers; `train`, `val` and
            `test` are folders of photographs or text files that list them, from the folder `path`, by default the
            file's own.
        instruction (`str`, *optional*, defaults to `"{category}"`): The text, with the name of the class in it.
        split (`str`, *optional*, defaults to `"train"`): Which of the file's splits.
        report (`BuildReport`, *optional*): Lists what could not be used.
        num_absent (`int`, *optional*, defaults to 0): Samples without target per photograph, for classes that have no
            line for it. True only where every object of every class is labelled.
        categories (`Collection[str]`, *optional*): Names of the classes to ask for; by default all.
        seed (`int`, *optional*, defaults to 0): Chooses the absent classes, for every photograph on its own.
        allow_outside (`bool`, *optional*, defaults to `False`): Use files outside of the yaml file's folder as well.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        FileNotFoundError: The file or a folder that it names is not there.
        ValueError: The file is of another form or lacks the split, an argument is wrong, or no sample could be used.

    Example:

    ```python
    >>> build_yolo("data.yaml", instruction="every {category}", split="val", num_absent=1)
    ```
    """
    check_arguments(instruction, num_absent, categories)
    report, data = BuildReport() if report is None else report, Path(data)
    if not data.is_file():
        raise FileNotFoundError(f"YOLO: there is no file {str(data)!r}; {describe_folder(data.parent)}")
    instances = YoloInstances(data, split, report, Photographs(data.parent, allow_outside))
    return build_categories(instances, "yolo", split, instruction, num_absent, categories, seed)


class YoloInstances(CocoInstances):
    """What differs from COCO: a yaml file and the text files that it leads to are read, and corners are shares."""

    def __init__(self, path: Path, split: str, report: BuildReport, photographs: Photographs):
        self.split = split
        super().__init__(path, report, photographs, renumber=True)

    def read(self, path: Path) -> dict[str, Any]:
        settings = _read_yaml(path)
        names = settings["names"]
        numbered = enumerate(names) if isinstance(names, list) else names.items()
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": number, "name": name} for number, name in numbered]
        labelled = False
        for image in self._images(path, settings):
            labels = _label_file(image)
            labelled |= labels is not None
            name, where = _relative(image, path), _relative(labels or image, path)
            try:
                lines = [] if labels is None else self._lines(labels)
            except RowProblem as problem:
                self.report.add(problem.kind, name, str(problem))
                continue
            content["images"].append({"id": name, "file_name": name})
            for place, line in enumerate(lines, start=1):
                if line.strip():
                    number, called = len(content["annotations"]) + 1, f"{where} line {place}"
                    own = {"category_id": as_whole(line.split()[0]), "segmentation": line, "called": called}
                    content["annotations"].append({"id": number, "image_id": name, **own})
        if not labelled:
            raise ValueError(
                f"YOLO: none of the {len(content['images'])} photographs of split {self.split!r} has a label file; "
                "that of images/dog.jpg is labels/dog.txt or images/dog.txt."
            )
        return content

    def _images(self, path: Path, settings: dict[str, Any]) -> list[Path]:
        """The photographs of the split, in order."""
        root, stated, images = path.parent / str(settings.get("path") or ""), settings.get(self.split), []
        if not stated:
            splits = ", ".join(name for name in ("train", "val", "test") if settings.get(name))
            raise ValueError(f"YOLO: {path.name} has no split {self.split!r}; it has {splits or 'none'}.")
        for place in map(str, stated if isinstance(stated, list) else [stated]):
            found = root / place
            if not found.exists() and place.startswith("../"):  # as Roboflow writes what lies beside the file
                found = root / place[len("../") :]
            if found.is_dir():
                images += sorted(one for one in found.rglob("*") if one.suffix.lower() in PICTURES)
            elif found.is_file():
                images += [found.parent / line.strip() for line in self._lines(found) if line.strip()]
            else:
                raise FileNotFoundError(f"YOLO: {path.name} names {str(found)!r}; {describe_folder(found.parent)}")
        return list(dict.fromkeys(images))

    def _lines(self, path: Path) -> list[str]:
        self.photographs.files.check(path)
        try:
            return path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise RowProblem("bad_annotation", f"{path.name} is no text in UTF-8 ({error}).") from error

    def called(self, annotation_id: int) -> str:
        return self.annotations[annotation_id]["called"]

    def draw(self, annotation: dict[str, Any]) -> dict[str, Any]:
        words = annotation["segmentation"].split()[1:]
        if len(words) == 4:
            raise RowProblem("bad_annotation", "four numbers are a box, which is no mask; export for segmentation.")
        try:
            shares = np.array([float(word) for word in words])
        except ValueError as error:
            raise RowProblem("bad_annotation", f"{error}; expected x and y of corners.") from error
        if shares.size < 6:
            raise RowProblem("bad_annotation", f"{shares.size} numbers enclose nothing; expected three corners.")
        if not (shares.min() >= -MARGIN_SHARE and shares.max() <= 1 + MARGIN_SHARE):
            detail = f"corners go from {shares.min():g} to {shares.max():g}; expected shares of the sides, 0 to 1."
            raise RowProblem("bad_annotation", detail)
        height, width = self.size(annotation["image_id"])
        pixels = shares * np.where(np.arange(shares.size) % 2, height, width)
        return polygons_to_rle([pixels.tolist()], height, width)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The yaml file, with names of classes as a list or a mapping."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"YOLO: {str(path)!r} is no yaml file ({error}).") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("names"), list | dict):
        raise ValueError(f"YOLO: {str(path)!r} has no `names`: a list of classes, or their numbers and names.")
    return settings


def _relative(file: Path, data: Path) -> str:
    """A file as seen from the folder of the yaml file."""
    return Path(os.path.relpath(file, data.parent)).as_posix()


def _label_file(image: Path) -> Path | None:
    """The text file of a photograph; `None` where there is none."""
    parts = list(image.parts)
    folders = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    places = [image.with_suffix(".txt")]
    if folders:
        parts[folders[-1]] = "labels"
        places.insert(0, Path(*parts).with_suffix(".txt"))
    return next((place for place in places if place.is_file()), None)


__all__ = ["YoloInstances", "build_yolo"]
