# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""LabelMe: a json of labelled shapes for each photograph, the labels as instructions."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..schema import encode_mask
from .build_report import BuildReport, RowProblem
from .categories import build_categories, check_arguments
from .coco_instances import CocoInstances, describe_folder
from .found_files import spellings
from .photographs import Photographs
from .shapes import draw_shape, read_shapes, shape_points
from .values import as_id


def build_labelme(
    root: str | os.PathLike,
    instruction: str = "{category}",
    split: str = "train",
    report: BuildReport | None = None,
    num_absent: int = 0,
    categories: Collection[str] | None = None,
    seed: int = 0,
    allow_outside: bool = False,
) -> Any:
    """A folder of LabelMe's files in the row schema: one sample per photograph and label.

    Every shape is an object, and shapes of one label and `group_id` are one. All objects of the label are `masks`,
    those of other labels `distractor_masks`. Polygons, rectangles, circles and masks have an area; a label that was
    also drawn as lines or points gives no sample there, and is named. Labels that differ in case or spaces are one.
    A photograph lies where `imagePath` says, or under its name beside the json or in `root`; what is stored inside the
    json is not used. Files with a list `text` hold instructions of their own: [`build_reasonseg`] reads these.

    Args:
        root: The folder, with all folders in it.
        instruction (`str`, *optional*, defaults to `"{category}"`): The text, with the label in it.
        split (`str`, *optional*, defaults to `"train"`): What the rows are called; the folder is one split.
        report (`BuildReport`, *optional*): Lists what could not be used.
        num_absent (`int`, *optional*, defaults to 0): Samples without target per photograph, for labels that have no
            shape on it. True only where every object of every label is drawn.
        categories (`Collection[str]`, *optional*): Labels to ask for; by default all.
        seed (`int`, *optional*, defaults to 0): Chooses the absent labels, for every photograph on its own.
        allow_outside (`bool`, *optional*, defaults to `False`): Use files outside of `root` as well, where links or
            `imagePath` lead there.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has no labelled shape, an argument is wrong, or no sample could be used.

    Example:

    ```python
    >>> build_labelme("my_drawings", instruction="every {category}", num_absent=1)
    ```
    """
    check_arguments(instruction, num_absent, categories)
    report = BuildReport() if report is None else report
    if not os.path.isdir(root):
        raise FileNotFoundError(f"LabelMe: {describe_folder(root)}")
    instances = LabelMeInstances(root, report, Photographs(root, allow_outside), renumber=True)
    return build_categories(instances, "labelme", split, instruction, num_absent, categories, seed)


class LabelMeInstances(CocoInstances):
    """What differs from COCO: the jsons of a folder are read as one file, and objects are drawn from shapes."""

    def read(self, path: Path) -> dict[str, Any]:
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        for file in sorted(path.rglob("*.json")):
            try:
                self.photographs.files.check(file)
                self._add(file, file.relative_to(path).as_posix(), content)
            except RowProblem as problem:
                self.report.add(problem.kind, file.relative_to(path).as_posix(), str(problem))
        labels = {entry["category_id"] for entry in content["annotations"]} - {None}
        content["categories"] = [{"id": label, "name": str(label)} for label in sorted(labels, key=str)]
        if not labels:
            detail = f" {self.report.summary()}" if self.report.problems else ""
            raise ValueError(
                f"LabelMe: no json in {str(path)!r} has a labelled shape; {describe_folder(path)}{detail}"
            )
        return content

    def _add(self, file: Path, name: str, content: dict[str, Any]) -> None:
        """The photograph and the objects of one json."""
        read = read_shapes(file)
        image = self._file_name(file, read.get("imagePath"))
        size = {"height": read.get("imageHeight"), "width": read.get("imageWidth")}
        content["images"].append({"id": image, "file_name": image, **size})
        objects: dict[Any, list[tuple[int, Any]]] = {}
        for place, shape in enumerate(read["shapes"]):
            fields = shape if isinstance(shape, dict) else {}
            group = as_id(fields.get("group_id"))
            objects.setdefault(place if group is None else (fields.get("label"), group), []).append((place, fields))
        for shapes in objects.values():
            number, label = len(content["annotations"]) + 1, shapes[0][1].get("label")
            own = {"category_id": as_id(label) if isinstance(label, str) else None, "segmentation": shapes}
            own["called"] = f"{name} shape {shapes[0][0]}"
            content["annotations"].append({"id": number, "image_id": image, **own})

    def _file_name(self, file: Path, stated: Any) -> str:
        """The photograph of a json, from the folder: where the json says, or under that name beside it."""
        if not isinstance(stated, str) or not stated.strip():
            raise RowProblem("missing_image", f"imagePath is {stated!r:.60}; expected the path of the photograph.")
        names = spellings(stated)
        names += [name.rpartition("/")[2] for name in names if "\\" not in name]
        with suppress(RowProblem):  # what lies outside is named when the row is made
            path = self.photographs.files.find(names, [str(file.parent)])
            if path is not None:
                return Path(os.path.relpath(path, self.photographs.folder)).as_posix()
        return stated

    def called(self, annotation_id: int) -> str:
        return self.annotations[annotation_id]["called"]

    def draw(self, annotation: dict[str, Any]) -> dict[str, Any]:
        size = self.size(annotation["image_id"])
        mask = np.zeros(size, dtype=bool)
        for place, shape in annotation["segmentation"]:
            drawn = draw_shape(shape, shape_points(shape.get("points"), place, size), place, size)
            mask |= False if drawn is None else drawn
        if not mask.any():
            raise RowProblem("empty_mask", f"it has no pixel inside the image of {size[0]} x {size[1]}.")
        return encode_mask(mask)


__all__ = ["LabelMeInstances", "build_labelme"]
