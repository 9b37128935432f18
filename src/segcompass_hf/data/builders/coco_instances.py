# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The annotations of a COCO `instances.json`, as masks by image, and the photographs they belong to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from .build_report import BuildReport, RowProblem
from .polygons import polygons_to_rle
from .rows import image_size

SUBFOLDERS = ("", "train2014", "val2014", "train2017", "val2017", "images")  # COCO 2017 dealt the same images anew


def image_key(image: Any) -> str:
    """An image's id as text, from the id or a file name: 9, `"9"` and `"COCO_train2014_000000000009.jpg"` give `"9"`.

    Raises:
        ValueError: there is no number in it.
    """
    stem = re.sub(r"\.[A-Za-z]+$", "", str(image))
    found = re.search(r"(\d+)$", stem)
    if not found:
        raise ValueError(f"{image!r} is no image id: expected a number or a file name that ends with one.")
    return str(int(found.group(1)))


def read_json(path: str | os.PathLike, report: BuildReport) -> Any:
    """Read a json file.

    Raises:
        FileNotFoundError, ValueError: it is not there, or broken; also in the report, as `missing_file` or `bad_json`.
    """
    path = Path(path)
    if not path.is_file():
        report.add("missing_file", path.name, "there is no such file", lost=False)
        raise FileNotFoundError(f"there is no file {str(path)!r}; {describe_folder(path.parent)}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        report.add("bad_json", path.name, str(error), lost=False)
        raise ValueError(f"{str(path)!r} is no complete json ({error}); is the download cut short?") from error


def describe_folder(folder: str | os.PathLike, shown: int = 8) -> str:
    """What a folder holds, for messages about what it lacks."""
    if not os.path.isdir(folder):
        return f"there is no folder {os.fspath(folder)!r}."
    names = sorted(name + "/" * os.path.isdir(os.path.join(folder, name)) for name in os.listdir(folder))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{os.fspath(folder)!r} holds {', '.join(names[:shown]) or 'nothing'}{more}."


def _once(known: dict[int, Any], key: int, make: Callable[[], Any]) -> Any:
    """What `make` returned, or the problem that it met, when it was first asked."""
    if key not in known:
        try:
            known[key] = make()
        except RowProblem as problem:
            known[key] = problem
    if isinstance(known[key], RowProblem):
        raise RowProblem(known[key].kind, str(known[key]))
    return known[key]


class CocoInstances:
    """The annotations of some images.

    Args:
        path: of the json file.
        report (`BuildReport`): gets what is wrong with the file's entries.
        images (`Collection[str]`, *optional*): keys (`image_key`) of the images that matter; others are forgotten.
        renumber (`bool`, *optional*, defaults to `False`): give annotations without an id, or with that of another,
            one of their own: where nothing refers to ids, an object must not be lost for them.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not in this format.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        report: BuildReport,
        images: Collection[str] | None = None,
        renumber: bool = False,
    ):
        self.name, self.report = Path(path).name, report
        content = read_json(path, report)
        lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations")]
        if not all(isinstance(entries, list) for entries in lists):
            report.add("bad_json", self.name, "no lists 'images' and 'annotations'", lost=False)
            raise ValueError(
                f"{os.fspath(path)!r} is no COCO annotation file: it has no lists images and annotations."
            )
        self.images = self._by_id(lists[0], "image", lambda image: images is None or image_key(image["id"]) in images)

        def belongs(annotation: dict) -> bool:
            known = annotation["image_id"] in self.images
            if images is None and not known:
                raise ValueError(f"there is no image {annotation['image_id']!r}")
            return known

        self.annotations = self._by_id(lists[1], "annotation", belongs, renumber)
        self.categories = content.get("categories")
        self.of_image: dict[int, list[int]] = {}
        for number, annotation in self.annotations.items():
            self.of_image.setdefault(annotation["image_id"], []).append(number)
        self._rles: dict[int, dict | RowProblem] = {}
        self._named: set[int] = set()

    def _by_id(self, entries: list, what: str, wanted: Any, renumber: bool = False) -> dict[int, dict]:
        found: dict[int, dict] = {}
        given = (entry.get("id") for entry in entries if isinstance(entry, dict)) if renumber else ()
        fresh = 1 + max((number for number in given if type(number) is int), default=0)
        for index, entry in enumerate(entries):
            try:
                if not wanted(entry):
                    continue
                if renumber and type(entry.get("id")) is not int:
                    detail = f"has the id {entry.get('id')!r:.40}; it is called {fresh}"
                    self.report.add("bad_annotation", f"{self.name} {what} at {index}", detail, lost=False)
                    entry, fresh = {**entry, "id": fresh}, fresh + 1
                number = int(entry["id"])
            except (KeyError, TypeError, ValueError) as error:
                detail = f"has no usable ids ({type(error).__name__}: {error})"
                self.report.add("bad_annotation", f"{self.name} {what} at {index}", detail, lost=False)
                continue
            if number in found and renumber and entry != found[number]:
                detail = f"the id appears again at {index}, for another object; that one is called {fresh}"
                self.report.add("duplicate_id", f"{self.name} {what} {number}", detail, lost=False)
                number, fresh = fresh, fresh + 1
            if number in found:
                detail = f"the id appears again at {index}; the first is used"
                self.report.add("duplicate_id", f"{self.name} {what} {number}", detail, lost=False)
                continue
            found[number] = entry
        return found

    def size(self, image_id: int) -> tuple[int, int]:
        """(height, width) of an image in pixels, as the file states it.

        Raises:
            RowProblem: `"bad_annotation"`.
        """
        entry = self.images.get(image_id)
        if entry is None:
            raise RowProblem("bad_annotation", f"image {image_id} is not in {self.name}.")
        height, width = entry.get("height"), entry.get("width")
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise RowProblem("bad_annotation", f"image {image_id} has height {height!r} and width {width!r}.")
        return height, width

    def rle(self, annotation_id: int, image_id: int) -> dict[str, Any]:
        """One annotation's mask, drawn when first asked for.

        Raises:
            RowProblem: `"missing_annotation"`, or what `polygons_to_rle` finds.
        """
        annotation = self.annotations.get(annotation_id)
        if annotation is None or annotation["image_id"] != image_id:
            raise RowProblem(
                "missing_annotation", f"image {image_id} has no annotation {annotation_id} in {self.name}."
            )
        return _once(self._rles, annotation_id, lambda: self._draw(annotation_id, annotation))

    def _draw(self, annotation_id: int, annotation: dict[str, Any]) -> dict[str, Any]:
        try:
            return polygons_to_rle(annotation.get("segmentation"), *self.size(annotation["image_id"]))
        except RowProblem as problem:
            raise RowProblem(problem.kind, f"annotation {annotation_id}: {problem}") from problem
        finally:
            annotation["segmentation"] = None  # its polygons are the bulk of the memory

    def others(self, image_id: int, targets: Collection[int]) -> list[dict[str, Any]]:
        """Masks of the image's objects that are not meant; broken ones are named once and left out.

        Crowd regions are no objects but unseparated many, and stay out.
        """
        masks = []
        for number in self.of_image.get(image_id, ()):
            if number in targets or self.annotations[number].get("iscrowd"):
                continue
            try:
                masks.append(self.rle(number, image_id))
            except RowProblem as problem:
                if number not in self._named:
                    self._named.add(number)
                    detail = f"left out of the other objects: {problem}"
                    self.report.add(problem.kind, f"{self.name} annotation {number}", detail, lost=False)
        return masks


class Photographs:
    """Finds the files of COCO images, in the folder itself or in `train2014/` and the like.

    Args:
        folder: of the images.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike):
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"images_dir: there is no folder {os.fspath(folder)!r}; give the one that holds the photographs (COCO "
                "train2014)."
            )
        self.folder = os.path.abspath(folder)
        self._paths: dict[tuple, str | RowProblem] = {}

    def path(self, image_id: int, size: tuple[int, int], file_names: Collection[str | None]) -> str:
        """The image's file, which has the size that its annotations were made on.

        Args:
            image_id (`int`): names the file where it is called by 12 digits.
            size (`tuple[int, int]`): (height, width) in pixels.
            file_names (`Collection[str]`): as the annotations call it, with or without the folders in it.

        Raises:
            RowProblem: `"missing_image"`, `"unreadable_image"` or `"wrong_size"`.
        """
        return _once(self._paths, image_id, lambda: self._find(image_id, size, file_names))

    def _find(self, image_id: int, size: tuple[int, int], file_names: Collection[str | None]) -> str:
        plain = f"{image_id:012d}.jpg"
        given = [
            form
            for name in file_names
            if isinstance(name, str) and name
            for form in (name, os.path.basename(name))
            if not os.path.isabs(form) and ".." not in Path(form).parts  # stays inside the folder
        ]
        names = list(dict.fromkeys([*given, f"COCO_train2014_{plain}", plain]))
        paths = [os.path.join(self.folder, sub, name) for sub in SUBFOLDERS for name in names]
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is None:
            raise RowProblem(
                "missing_image", f"there is no {' or '.join(names)} in {self.folder!r} or its train2014/ and the like."
            )
        actual = image_size(path)
        if actual != tuple(size):
            raise RowProblem(
                "wrong_size", f"{path!r} is {actual} but its annotations are for {tuple(size)} (height, width)."
            )
        return path
