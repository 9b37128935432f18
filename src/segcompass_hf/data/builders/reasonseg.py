# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""ReasonSeg from the files its authors published: a photograph and a json of labelled polygons per sample."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..schema import encode_mask
from .build_report import BuildReport, RowProblem
from .coco_instances import describe_folder
from .found_files import TrustedFolder
from .rows import dataset_from_rows, image_size, make_row, usable_rows
from .shapes import draw_shape, read_shapes, shape_points
from .values import as_id, as_whole

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PARENTS = ("", "ReasonSeg", "reason_seg/ReasonSeg")  # as downloaded, and where LISA's code expects it


def build_reasonseg(
    root: str | os.PathLike,
    split: str = "train",
    report: BuildReport | None = None,
    texts: Literal["all", "first"] = "all",
    allow_outside: bool = False,
) -> Any:
    """ReasonSeg in the row schema: every text of a file a sample, `is_reasoning` true.

    Files of the same form drawn in LabelMe are read as well.

    Shapes are drawn as the benchmark's own code does: corners cut to whole pixels, outline included, from the largest
    to the smallest, so that the smaller of two overlapping shapes decides what a pixel is. `target` shapes become
    `masks`, one each, without what is ignored; those of one `group_id` are one. The benchmark's files do not say which
    shapes are parts of one object, so that only their union is reliable, and the union is what metrics compare. By
    `shape_type` a shape is a polygon, rectangle, circle or mask; lines and points have no area, and a file with such
    a target or ignored shape is refused. `ignore` shapes become `ignore`. `flag` shapes
    mean nothing and are passed over. `kind` is `"sentence"` (the paper's long queries) or `"phrase"` (its short ones).

    Args:
        root: Folder that holds `train/`, `val/`, `test/` (also as `ReasonSeg/train/`), or a split's folder itself.
        split (`str`): `"train"`, `"val"` or `"test"`.
        report (`BuildReport`, *optional*): Lists what could not be used.
        texts (`str`, *optional*, defaults to `"all"`): `"first"` leaves a file's further texts out, as LISA's
            evaluation does.
        allow_outside (`bool`, *optional*, defaults to `False`): Follow links that lead out of `root`.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        FileNotFoundError: There is no such folder; the message says what there is.
        ValueError: There is no such split, or no sample could be used.
    """
    if split not in SPLITS:
        raise ValueError(f"ReasonSeg has the splits {', '.join(SPLITS)}, not {split!r}.")
    if texts not in ("all", "first"):
        raise ValueError(f"texts is {texts!r}; it must be 'all' or 'first'.")
    report = BuildReport() if report is None else report
    files = _Files(_split_folder(root, split), TrustedFolder(root, allow_outside), split, report, texts)
    rows = usable_rows(files.texts(), lambda fields: make_row(**fields), report)
    return dataset_from_rows(rows, f"reasonseg-{split}", report)


def _split_folder(root: str | os.PathLike, split: str) -> Path:
    root = Path(root)
    for parent in PARENTS:
        if (root / parent / split).is_dir():
            return root / parent / split
    resolved = Path(os.path.abspath(root))
    if resolved.name in SPLITS and resolved.name != split and root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is the folder of split {resolved.name}, not of {split}.")
    if any(root.glob("*.json")):
        return root
    raise FileNotFoundError(
        f"ReasonSeg: there is no {split}/ and no photograph with a json beside it: {describe_folder(root)}"
    )


class _Files:
    """The photographs and json files of a split."""

    def __init__(self, folder: Path, trusted: TrustedFolder, split: str, report: BuildReport, texts: str):
        self.folder, self.trusted, self.split = folder, trusted, split
        self.report, self.first_only = report, texts == "first"

    def texts(self) -> Iterator[tuple[str, Any]]:
        """Sample id, and the fields of the row of every text; or what is wrong with it, its file or its photograph."""
        names = sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        images: dict[str, list[str]] = {}
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                path = os.path.join(os.path.abspath(self.folder), name)
                images.setdefault(os.path.splitext(name)[0], []).append(path)
        annotated = [name[: -len(".json")] for name in names if name.endswith(".json")]
        for stem in sorted(set(images) - set(annotated)):
            problem = RowProblem("missing_annotation", f"there is no {stem}.json beside the photograph.")
            yield f"reasonseg-{self.split}-{stem}", problem
        for stem in annotated:
            yield from self._texts_of(stem, images.get(stem, []))

    def _texts_of(self, stem: str, images: list[str]) -> Iterator[tuple[str, Any]]:
        name = f"reasonseg-{self.split}-{stem}"
        try:
            self.trusted.check(self.folder / f"{stem}.json")
            content = read_shapes(self.folder / f"{stem}.json")
            instructions = _texts(content)
        except RowProblem as problem:
            yield name, problem
            return
        if self.first_only and len(instructions) > 1:
            self.report.left_out["further texts"] += len(instructions) - 1
            instructions = instructions[:1]
        try:
            fields: dict[str, Any] | RowProblem = _fields(
                content, stem, self._photograph(stem, images, content), name, self.report
            )
        except RowProblem as problem:
            fields = problem
        for position, text in enumerate(instructions):
            sample_id = f"{name}-{position}"
            if isinstance(fields, RowProblem):
                yield sample_id, fields
            elif not isinstance(text, str) or not text.strip():
                yield sample_id, RowProblem("empty_text", f"the text is {text!r}.")
            else:
                own = {"instruction": text.strip(), "sample_id": sample_id, "split": self.split}
                yield sample_id, {**own, "source": "reasonseg", "is_reasoning": True, **fields}

    def _photograph(self, stem: str, images: list[str], content: dict[str, Any]) -> str:
        """The photograph beside a json; of several of that name the one that LabelMe's `imagePath` says."""
        if not images:
            raise RowProblem("missing_image", f"there is no photograph {stem}.jpg beside {stem}.json.")
        stated = re.split(r"[/\\]", str(content.get("imagePath")))[-1]
        named = [image for image in images if os.path.basename(image) == stated] or images
        if len(named) > 1:
            both = " and ".join(map(os.path.basename, named))
            raise RowProblem("ambiguous_file", f"{both} stand beside {stem}.json, which does not say which is meant.")
        self.trusted.check(named[0])
        return named[0]


def _texts(content: dict[str, Any]) -> list[Any]:
    texts = content.get("text")
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, list):
        raise RowProblem("bad_annotation", f'"text" is {texts!r:.60}; expected a list of texts.')
    if not texts:
        raise RowProblem("empty_text", '"text" is an empty list.')
    return texts


def _fields(content: dict, stem: str, image: str, name: str, report: BuildReport) -> dict[str, Any]:
    """The columns that all texts of a file share."""
    size = image_size(image)
    stated = content.get("imageHeight"), content.get("imageWidth")
    if any(side is not None and as_whole(side) != actual for side, actual in zip(stated, size, strict=True)):
        detail = f"imageHeight and imageWidth are {stated!r:.60} but the photograph is {size} (height, width)."
        raise RowProblem("wrong_size", detail)
    masks, ignore = _masks(content["shapes"], size, name, report)
    is_sentence = content.get("is_sentence")
    if not isinstance(is_sentence, (bool, int, type(None))):
        detail = f"is_sentence is {is_sentence!r:.40}; expected true or false, so the kind of the text is not known"
        report.add("bad_annotation", name, detail, lost=False)
        is_sentence = None
    return {
        "image": image,
        "masks": masks,
        "ignore": ignore,
        "image_id": stem,
        "kind": None if is_sentence is None else ("phrase", "sentence")[bool(is_sentence)],
    }


def _masks(shapes: list, size: tuple[int, int], name: str, report: BuildReport) -> tuple[list[dict], dict | None]:
    """Masks of the target shapes in the file's order, and what is ignored."""
    drawn, ignored, order, groups = [], [], [], []
    for index, shape in enumerate(shapes):
        where = f"{name} shape {index}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise RowProblem("bad_annotation", f"shape {index} has no label: {shape!r:.60}.")
        label = shape["label"].strip().lower()
        if label == "flag":
            continue
        points = shape_points(shape.get("points"), index, size)
        mask = draw_shape(shape, points, index, size)
        if mask is None or not mask.any():
            detail = f"the {label} shape of {len(points)} points has no pixel inside the image; passed over"
            report.add("empty_mask", where, detail, lost=False)
            continue
        if label not in ("target", "ignore"):
            taken = "ignore" if "ignore" in label else "target"
            detail = f"the label is {label!r}; taken as {taken}, as the benchmark does"
            report.add("bad_annotation", where, detail, lost=False)
        drawn.append(mask)
        ignored.append("ignore" in label)
        order.append(int(mask.sum()))
        group = shape.get("group_id")
        groups.append(f"shape {index}" if as_id(group) is None else f"group {as_id(group)}")
    painted = np.zeros(size, dtype=np.uint8)  # 1 = target, 2 = ignore
    for place in np.argsort(order)[::-1]:
        painted[drawn[place]] = 2 if ignored[place] else 1
    objects: dict[str, np.ndarray] = {}
    for mask, skip, group in zip(drawn, ignored, groups, strict=True):
        if not skip:
            objects[group] = objects.get(group, False) | (mask & (painted != 2))
    targets = list(objects.values())
    left = [mask for mask in targets if mask.any()]
    if not left:
        raise RowProblem("empty_mask", "there is no target shape with a pixel that is not ignored.")
    if len(left) < len(targets):
        detail = f"{len(targets) - len(left)} of {len(targets)} target shapes are covered by ignore shapes; left out"
        report.add("empty_mask", name, detail, lost=False)
    return [encode_mask(mask) for mask in left], encode_mask(painted == 2) if (painted == 2).any() else None
