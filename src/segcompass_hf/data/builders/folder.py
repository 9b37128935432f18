# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Your own pictures: a folder with images and a JSONL or CSV file of instructions and masks."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...image_files_segcompass import is_turned, open_image
from .annotation_files import find_annotations, named_splits, read_lines
from .build_report import BuildReport, RowProblem
from .found_files import TrustedFolder, spellings
from .own_masks import FORMS, Objects, is_number, objects_of, union_of
from .rows import SampleIds, dataset_from_rows, image_size, kind_by_number, make_row, usable_rows
from .values import as_flag, parse_json

logger = logging.get_logger(__name__)

# Name of a field -> how it may be called.
FIELDS = {
    "image": ("image", "file_name"),
    "instruction": ("instruction", "text"),
    "masks": ("masks", "mask", "polygons", "rle"),
    "distractors": ("distractors", "distractor_masks"),
    "ignore": ("ignore",),
    "reasoning": ("reasoning",),
    "sample_id": ("sample_id",),
    "image_id": ("image_id",),
    "kind": ("kind",),
    "is_reasoning": ("is_reasoning",),
    "split": ("split",),
}
KNOWN = [name for names in FIELDS.values() for name in names]
# In names of columns that hold masks or boxes elsewhere.
MASK_WORDS = ("mask", "polygon", "segm", "contour", "box", "annotation", "region", "rle")


def build_folder(
    root: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    split: str = "train",
    report: BuildReport | None = None,
    allow_outside: bool = False,
) -> Any:
    r"""A folder of your own in the row schema: images, and a JSONL or CSV file with one line per sample.

    A line has `image` (or `file_name`), `instruction` (or `text`) and `masks` (or `mask`, `polygons`, `rle`; all take
    every form) with one entry per object that is meant. Coordinates are pixels of the image as a viewer shows it, that is after its EXIF rotation. Nothing
    meant is `[]`, `null` or no `masks` at all. Every form in JSONL:

    ```json
    {"image": "dog.jpg", "instruction": "the dog", "masks": [[[10, 10, 90, 10, 90, 60, 10, 60]]]}
    {"image": "dog.jpg", "instruction": "the dog behind the post", "masks": [[[10, 10, 40, 10, 40, 60], [50, 10, 90, 10, 90, 60]]]}
    {"image": "dog.jpg", "instruction": "both dogs", "masks": [[[10, 10, 40, 10, 40, 60]], [[50, 10, 90, 10, 90, 60]]]}
    {"image": "dog.jpg", "instruction": "the dog", "masks": [{"size": [480, 640], "counts": "..."}]}
    {"image": "dog.jpg", "instruction": "both dogs", "masks": ["masks/dog_0.png", "masks/dog_1.png"]}
    {"image": "dog.jpg", "instruction": "all dogs", "masks": "masks/dogs.png"}
    {"image": "dog.jpg", "instruction": "the cat", "masks": []}
    ```

    The first is one object of one polygon, the second one object in two parts, the third two objects. RLE is COCO's, as
    text or as a list of run lengths. A PNG that stands alone has one object per value above 0 (0 is background); among
    several PNGs each is one object. Beside other values 255 is the void of Pascal VOC, which metrics leave out. In a
    CSV file lists stand as JSON in quotes, and paths with `;` between:

    ```text
    image,instruction,masks
    dog.jpg,"the dog, asleep","[[[10, 10, 90, 10, 90, 60]]]"
    dog.jpg,both dogs,masks/dog_0.png;masks/dog_1.png
    dog.jpg,the cat,
    ```

    A line may also have `distractors` (other known objects, in the same forms), `ignore` (what metrics leave out, in
    the same forms), `reasoning` (a reference chain of thought), `is_reasoning` (whether the instruction needs one),
    `kind` (of instruction; by default `none`, `single` or `multi` by the number of objects), `sample_id`, `image_id`
    and `split`. A line with anything wrong is left out as a whole, and named in the report.

    Args:
        root: Folder of the images. Paths in lines start from the annotation file's folder or from `root`; images may
            also lie in its `images/`, masks in its `masks/`, and both in a folder of the split's name.
        annotations (path, *optional*): The JSONL or CSV file. By default `{split}.jsonl`, `annotations.jsonl`,
            `metadata.jsonl`, the same as `.csv`, or the only file of these types.
        split (`str`, *optional*, defaults to `"train"`): Which lines to take. Without a column `split` all lines are
            taken, and called so.
        report (`BuildReport`, *optional*): Lists what could not be used.
        allow_outside (`bool`, *optional*, defaults to `False`): Use files outside of `root` as well, where links or
            the lines lead there.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        FileNotFoundError: There is no such folder or file; the message says what there is.
        ValueError: The file cannot be read, has no line of this split, or no line could be used.

    Example:

    ```python
    >>> report = BuildReport()
    >>> dataset = build_folder("my_pictures", report=report)
    >>> report.summary()
    '120 rows, 2 lost. Problems: wrong_size x 2 (first: annotations.jsonl line 7: ...)'
    ```
    """  # noqa: E501 - one line per sample is the format
    report = BuildReport() if report is None else report
    path = find_annotations(root, annotations, split)
    files = TrustedFolder(root, allow_outside)
    if annotations is None:
        files.check(path)
    rows = _FolderRows(files, Path(os.path.abspath(path)), split, report)
    return dataset_from_rows(rows.rows(), f"folder-{split}", report)


class _FolderRows:
    def __init__(self, files: TrustedFolder, path: Path, split: str, report: BuildReport):
        self.files, self.root, self.path = files, Path(files.root), path
        self.split, self.report, self.source = split, report, self.root.name or "folder"
        self.starts = list(dict.fromkeys([str(path.parent), files.root]))
        self.has_splits = self._check_splits()
        self.ids = SampleIds(report)
        self.sizes: dict[str, tuple[int, int]] = {}
        self.per_image: Counter[str] = Counter()
        self.unknown: set[str] = set()
        self.has_masks, self.num_lines = False, 0

    def _check_splits(self) -> bool:
        """Whether lines say their split."""
        named = named_splits(self.path)
        if not named:
            if self.split != "train" and self.path.stem != self.split and self.path.parent.name != self.split:
                logger.warning(
                    f"{str(self.path)!r} does not say which lines are of which split, so all are taken as "
                    f"{self.split!r}, as they would be for any other split; add a column split."
                )
            return False
        if self.split not in named:
            listed = ", ".join(f"{name} ({count})" for name, count in named.items())
            raise ValueError(f"{str(self.path)!r} has no line of split {self.split!r}; it has {listed}.")
        return True

    def rows(self) -> Iterator[dict[str, Any]]:
        lines = ((f"{self.path.name} line {number}", fields) for number, fields in read_lines(self.path))
        entries = ((where, f if isinstance(f, RowProblem) else (f, where)) for where, f in lines)
        yield from usable_rows(entries, lambda line: self._row(self._known(*line)), self.report)
        if self.num_lines and not self.has_masks:
            raise ValueError(
                f'no line of {str(self.path)!r} has "masks": {FORMS}. If indeed nothing is meant in any image, write '
                '"masks": [] (in a CSV file an empty column masks).'
            )

    def _known(self, fields: dict[str, Any], where: str) -> dict[str, Any]:
        """A line's fields under one name each; others are named once per file."""
        known: dict[str, Any] = {}
        for name, names in FIELDS.items():
            given = [key for key in names if _is_given(fields.get(key))]
            if len(given) > 1:
                raise RowProblem("bad_annotation", f"the line has both {' and '.join(given)}; one is enough.")
            known[name] = fields[given[0]] if given else None
        self.has_masks |= any(key in fields for key in FIELDS["masks"])
        self.num_lines += 1
        unused = {str(key): value for key, value in fields.items() if str(key) not in KNOWN and _is_given(value)}
        meant = [key for key, value in unused.items() if _may_be_masks(key, value)]
        if known["masks"] is None:
            meant += [key for key, value in unused.items() if self._is_mask_file(value)]
        if meant and (known["masks"] is None or str(known["masks"]).replace(" ", "") == "[]"):
            raise RowProblem(
                "unknown_column",
                f"the line has no masks, but {meant[0]!r}, which is not used; if it holds them, call it masks.",
            )
        for key in sorted(set(map(str, fields)) - set(KNOWN) - self.unknown):
            self.unknown.add(key)
            close = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"lines have {', '.join(KNOWN)}."
            self.report.add("unknown_column", where, f"{key!r} is not used; {hint}", lost=False)
        return known

    def _is_mask_file(self, value: Any) -> bool:
        """Whether this names a file of the folder which may be a mask: of a format that keeps values as they are."""
        if not isinstance(value, str) or not value.strip().lower().endswith((".png", ".tif", ".tiff", ".bmp")):
            return False
        try:
            return self.files.find(spellings(value), self.starts, [str(self.root / "masks")]) is not None
        except RowProblem:
            return True  # it is there, outside or twice

    def _row(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        split = _text(fields["split"])
        if self.has_splits and not split:
            raise RowProblem("bad_annotation", "the line has no split, though others have one.")
        if self.has_splits and split != self.split:
            self.report.left_out["other splits"] += 1
            return None
        name, instruction = fields["image"], fields["instruction"]
        if not isinstance(name, str):
            raise RowProblem("bad_annotation", f"image is {name!r:.60}; expected the path of an image file.")
        if not isinstance(instruction, str):
            raise RowProblem("empty_text", f"instruction is {instruction!r:.60}; expected a text.")
        path = self._find(name, "missing_image")
        if path not in self.sizes:
            self.sizes[path] = image_size(path)
        found = {name: self._masks(fields, name, path) for name in ("masks", "distractors", "ignore")}
        masks, others = found["masks"].masks, found["distractors"].masks
        if (fields["kind"] == "none") if masks else fields["kind"] in ("single", "multi"):
            detail = f"kind is {fields['kind']!r} but the line has {len(masks)} masks; which of them is right?"
            raise RowProblem("bad_annotation", detail)
        ignored = [*found["ignore"].masks, *(rle for objects in found.values() for rle in objects.void)]
        image_id = _text(fields["image_id"]) or Path(os.path.relpath(path, self.root)).as_posix()  # one per file
        wanted = _text(fields["sample_id"]) or f"{Path(name).as_posix()}-{self.per_image[path]}".replace("/", "_")
        self.per_image[path] += 1
        content = (path, instruction, [rle["counts"] for rle in masks])
        return make_row(
            image=path,
            instruction=instruction.strip(),
            masks=masks,
            distractor_masks=None if fields["distractors"] is None else others,
            ignore=union_of(ignored, self.sizes[path]),
            instance_ids=found["masks"].values,
            sample_id=self.ids.unique(wanted, content),
            image_id=image_id,
            source=self.source,
            split=self.split,
            kind=_text(fields["kind"]) or kind_by_number(len(masks)),
            is_reasoning=as_flag(fields["is_reasoning"], "is_reasoning"),
            reasoning=_text(fields["reasoning"]) or None,
        )

    def _masks(self, fields: dict[str, Any], name: str, image: str) -> Objects:
        try:
            find = partial(self._find, kind="missing_mask", image=image)
            return objects_of(fields[name], self.sizes[image], find, name)
        except RowProblem as problem:
            detail = str(problem)
            if problem.kind == "wrong_size" and _is_turned(image):
                detail += (
                    " The photograph has an EXIF rotation: masks belong to the image as a viewer shows it. Turn the "
                    "masks, or save the photograph without that entry."
                )
            raise RowProblem(problem.kind, detail) from problem

    def _find(self, name: str, kind: str, image: str | None = None) -> str:
        """The file of a path in a line; of an image, or of a mask of the given one, which is another file."""
        if "://" in name:
            raise RowProblem(kind, f"{name} is an address; download it into the folder and give its path.")
        implied = [str(self.root / ("images" if image is None else "masks")), str(self.root / self.split)]
        path = self.files.find(spellings(name), self.starts, implied, never=image)
        if path is None:
            looked = ", ".join(repr(folder) for folder in (*self.starts, *implied) if os.path.isdir(folder))
            raise RowProblem(kind, f"there is no file {name!r} in {looked}.")
        return path


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _may_be_masks(name: str, value: Any) -> bool:
    """Whether a column that is not used holds masks or boxes, by its name and what it holds."""
    named = any(word in name.lower() for word in MASK_WORDS)
    named = named or bool(difflib.get_close_matches(name.lower(), FIELDS["masks"], n=1))
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        with suppress(ValueError):
            value = parse_json(value)
    if isinstance(value, str):
        return named and bool(re.search(r"\.\w{2,4}\s*(;|$)", value))  # a path
    return isinstance(value, (list, dict)) and bool(value) and (named or _holds_coordinates(value))


def _holds_coordinates(value: Any) -> bool:
    """Whether lists in lists end in numbers, or there is an RLE or a field of masks in an object: at any depth."""
    if isinstance(value, dict):
        return "counts" in value or any(_may_be_masks(str(name), part) for name, part in value.items())
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list) and first and is_number(first[0]):
        return True
    return isinstance(first, (list, dict)) and _holds_coordinates(first)


def _is_turned(path: str) -> bool:
    with open_image(path) as image:
        return is_turned(image)
