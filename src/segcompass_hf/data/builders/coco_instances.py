# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The annotations of a COCO `instances.json`, as masks by image, and the photographs they belong to."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .build_report import BuildReport, RowProblem
from .photographs import Photographs, file_of, names_of, once
from .polygons import polygons_to_rle
from .rows import image_size
from .values import as_flag, as_id, as_whole, parse_json

CROWD_FLAGS = ("iscrowd", "ignore")  # the second as in CityPersons and other sets of detection


def image_key(image: Any) -> str:
    """An image's id as text, from the id or a file name: 9, `"9"` and `"COCO_train2014_000000000009.jpg"` give `"9"`.

    Raises:
        ValueError: there is no number in it.
    """
    number = as_whole(image)
    stem = re.sub(r"\.[A-Za-z]+$", "", str(image if number is None else number))
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
        return parse_json(path.read_bytes())
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


class CocoInstances:
    """The annotations of some images.

    Args:
        path: of the json file.
        report (`BuildReport`): gets what is wrong with the file's entries.
        photographs ([`Photographs`]): of the images.
        images (`Collection[str]`, *optional*): keys (`image_key`) of the images that matter; others are forgotten.
        renumber (`bool`, *optional*, defaults to `False`): nothing refers to ids, so that no object must be lost for
            them: give annotations without a number, or with that of another, one of their own, and count images that
            are one file as one.

    Attributes:
        images, annotations (`dict`): By id, see `as_id`.
        of_image (`dict[int | str, list[int]]`): Annotations by image.
        strays (`list[dict]`): Annotations of which it is not known on which image they are.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not in this format.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        report: BuildReport,
        photographs: Photographs,
        images: Collection[str] | None = None,
        renumber: bool = False,
    ):
        self.name, self.report, self.photographs = Path(path).name, report, photographs
        content = self.read(Path(path))
        self.categories = content.get("categories")
        self._clashing: dict[int | str, str] = {}
        self.images = self._read_images(content["images"], images)
        self._first = self._join_files() if renumber else {}  # image -> the first one of its file
        photographs.claim(names_of(entry) for entry in content["images"])
        self.strays: list[dict] = []
        self.annotations = self._read_annotations(content["annotations"], images is None, renumber)
        self.of_image: dict[int | str, list[int]] = {}
        for number, annotation in self.annotations.items():
            self.of_image.setdefault(annotation["image_id"], []).append(number)
        self._rles: dict[int, dict | RowProblem] = {}
        self._named: set[int] = set()

    def read(self, path: Path) -> dict[str, Any]:
        """What the file holds: lists `images` and `annotations`, and `categories`. Others draw in other forms.

        Raises:
            FileNotFoundError, ValueError: as of the class.
        """
        content = read_json(path, self.report)
        lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations")]
        if not all(isinstance(entries, list) for entries in lists):
            self.report.add("bad_json", self.name, "no lists 'images' and 'annotations'", lost=False)
            raise ValueError(f"{str(path)!r} is no COCO annotation file: it has no lists images and annotations.")
        return content

    def called(self, annotation_id: int) -> str:
        """What messages call an annotation."""
        return f"annotation {annotation_id}"

    def draw(self, annotation: dict[str, Any]) -> dict[str, Any]:
        """The mask of an annotation as COCO RLE.

        Raises:
            RowProblem: what `polygons_to_rle` finds.
        """
        return polygons_to_rle(annotation.get("segmentation"), *self.size(annotation["image_id"]))

    def _read_images(self, entries: list, wanted: Collection[str] | None) -> dict[int | str, dict]:
        found: dict[int | str, dict] = {}
        for index, entry in enumerate(entries):
            number = as_id(entry.get("id")) if isinstance(entry, dict) else None
            if number is None:
                self._name_unusable("image", index, entry, "id")
            elif wanted is not None and str(number) not in wanted:
                continue
            elif number not in found:
                found[number] = entry
            elif names_of(entry) != names_of(found[number]):
                both = " and ".join(str((names_of(one) or ["no file"])[0]) for one in (found[number], entry))
                self._clashing[number] = f"image {number} is {both}; whose its annotations are is not known."
            else:
                self._name_repeated("image", number, f"the id appears again at {index}; the first is used")
        return found

    def _join_files(self) -> dict[int | str, int | str]:
        """Images listed under several ids, as merged files have them: each sees but a part of the annotations."""
        of_file: dict[str, int | str] = {}
        joined: dict[int | str, int | str] = {}
        for number, entry in list(self.images.items()):
            file = file_of(entry)
            first = number if file is None else of_file.setdefault(file, number)
            if first == number:
                continue
            joined[number] = first
            one = self.images[first]
            if any(as_id(one.get(key)) != as_id(entry.get(key)) for key in ("height", "width", "coco_url")):
                self._clashing[first] = f"{file} is image {first} and {number}, of other height, width or coco_url."
            elif number in self._clashing:
                self._clashing.setdefault(first, self._clashing[number])
            else:
                self._name_repeated("image", number, f"{file} is image {first} too; their annotations count as of one")
        for number in joined:
            del self.images[number]
        return joined

    def _read_annotations(self, entries: list, all_images: bool, renumber: bool) -> dict[int, dict]:
        found: dict[int, dict] = {}
        numbers = (as_whole(entry.get("id")) for entry in entries if isinstance(entry, dict))
        fresh = 1 + max((number for number in numbers if number is not None), default=0)
        numbered = all(isinstance(image_id, int) for image_id in self.images)
        several, seen = set(self._first.values()), set()
        for index, entry in enumerate(entries):
            image_id = as_id(entry.get("image_id")) if isinstance(entry, dict) else None
            image_id = self._first.get(image_id, image_id)
            if image_id not in self.images:
                if all_images or image_id is None:
                    self._name_unusable("annotation", index, entry, "image_id")
                if isinstance(entry, dict) and not (numbered and isinstance(image_id, int)):
                    self.strays.append(entry)
                continue
            entry["image_id"], number = image_id, as_whole(entry.get("id"))
            if image_id in several:
                same = (image_id, str(entry.get("category_id")), repr(entry.get("segmentation")))
                if entry.get("segmentation") and same in seen:
                    self._name_repeated("annotation", entry.get("id"), f"the object comes again at {index}; used once")
                    continue
                seen.add(same)
            if number is None and not renumber:
                self._name_unusable("annotation", index, entry, "id")
                continue
            if number is None:
                detail = f"has the id {entry.get('id')!r:.40}; it is called {fresh}"
                self.report.add("bad_annotation", f"{self.name} annotation at {index}", detail, lost=False)
                number, fresh = fresh, fresh + 1
            elif number in found and renumber and entry != found[number]:
                again = f"the id appears again at {index}, for another object; that one is called {fresh}"
                self._name_repeated("annotation", number, again)
                number, fresh = fresh, fresh + 1
            if number in found:
                self._name_repeated("annotation", number, f"the id appears again at {index}; the first is used")
                continue
            found[number] = entry
        return found

    def _name_unusable(self, what: str, index: int, entry: Any, key: str) -> None:
        value = entry.get(key) if isinstance(entry, dict) else entry
        reason = f"there is no image {value!r:.40}" if key == "image_id" else f"the {key} is {value!r:.40}"
        detail = f"has no usable ids ({reason})"
        self.report.add("bad_annotation", f"{self.name} {what} at {index}", detail, lost=False)

    def _name_repeated(self, what: str, number: int | str, detail: str) -> None:
        self.report.add("duplicate_id", f"{self.name} {what} {number}", detail, lost=False)

    def photograph(self, image_id: int | str) -> str:
        """The image's file, which has the size that its annotations were made on.

        Raises:
            RowProblem: `"missing_image"` and the like, or what `size` finds.
        """
        stated = self._stated_size(image_id)
        return self.photographs.path(image_id, stated, names_of(self.images[image_id]))

    def size(self, image_id: int | str) -> tuple[int, int]:
        """(height, width) of an image in pixels, as the file states it, or else as its photograph has it.

        Raises:
            RowProblem: `"bad_annotation"`, or what keeps the photograph from being used.
        """
        stated = self._stated_size(image_id)
        return image_size(self.photograph(image_id)) if stated is None else stated

    def _stated_size(self, image_id: int | str) -> tuple[int, int] | None:
        entry = self.images.get(image_id)
        if entry is None:
            raise RowProblem("bad_annotation", f"image {image_id} is not in {self.name}.")
        if image_id in self._clashing:
            raise RowProblem("duplicate_id", self._clashing[image_id])
        height, width = entry.get("height"), entry.get("width")
        if height in (None, 0) and width in (None, 0):  # some tools write 0 for what they do not know
            return None
        size = as_whole(height), as_whole(width)
        if None in size or min(size) <= 0:
            raise RowProblem("bad_annotation", f"image {image_id} has height {height!r} and width {width!r}.")
        return size

    def is_crowd(self, annotation_id: int) -> bool:
        """Whether an annotation is a region of objects that are not told apart, or to be ignored.

        Raises:
            RowProblem: `"bad_annotation"`: what it says is neither true nor false.
        """
        annotation = self.annotations[annotation_id]
        return any(as_flag(annotation.get(name), f"annotation {annotation_id}: {name}") for name in CROWD_FLAGS)

    def rle(self, annotation_id: int, image_id: int | str) -> dict[str, Any]:
        """One annotation's mask, drawn when first asked for.

        Raises:
            RowProblem: `"missing_annotation"`, or what `draw` finds.
        """
        annotation = self.annotations.get(annotation_id)
        if annotation is None or annotation["image_id"] != image_id:
            raise RowProblem(
                "missing_annotation", f"image {image_id} has no annotation {annotation_id} in {self.name}."
            )
        return once(self._rles, annotation_id, lambda: self._draw(annotation_id, annotation))

    def _draw(self, annotation_id: int, annotation: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.draw(annotation)
        except RowProblem as problem:
            raise RowProblem(problem.kind, f"{self.called(annotation_id)}: {problem}") from problem
        finally:
            annotation["segmentation"] = None  # its polygons are the bulk of the memory

    def others(self, image_id: int | str, targets: Collection[int]) -> list[dict[str, Any]]:
        """Masks of the image's objects that are not meant; broken ones are named once and left out.

        Crowd regions are no objects but unseparated many, and stay out.
        """
        masks = []
        for number in self.of_image.get(image_id, ()):
            if number in targets:
                continue
            try:
                if not self.is_crowd(number):
                    masks.append(self.rle(number, image_id))
            except RowProblem as problem:
                if number not in self._named:
                    self._named.add(number)
                    detail = f"left out of the other objects: {problem}"
                    self.report.add(problem.kind, f"{self.name} {self.called(number)}", detail, lost=False)
        return masks
