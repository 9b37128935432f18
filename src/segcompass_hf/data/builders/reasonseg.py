# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""ReasonSeg from the files its authors published: a photograph and a json of labelled polygons per sample."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..schema import encode_mask
from .build_report import BuildReport, RowProblem
from .coco_instances import describe_folder
from .polygons import _checked_polygon
from .rows import dataset_from_rows, image_size, make_row, usable_rows

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
PARENTS = ("", "ReasonSeg", "reason_seg/ReasonSeg")  # as downloaded, and where LISA's code expects it


def build_reasonseg(
    root: str | os.PathLike,
    split: str = "train",
    report: BuildReport | None = None,
    texts: Literal["all", "first"] = "all",
) -> Any:
    """ReasonSeg in the row schema: every text of a file a sample, `is_reasoning` true.

    Shapes are drawn as the benchmark's own code does: corners cut to whole pixels, outline included, from the largest
    to the smallest, so that the smaller of two overlapping shapes decides what a pixel is. `target` shapes become
    `masks`, one each, without what is ignored: the format does not say which shapes are parts of one object, so that
    only their union is reliable, and the union is what metrics compare. `ignore` shapes become `ignore`. `flag` shapes
    mean nothing and are passed over. `kind` is `"sentence"` (the paper's long queries) or `"phrase"` (its short ones).

    Args:
        root: Folder that holds `train/`, `val/`, `test/` (also as `ReasonSeg/train/`), or a split's folder itself.
        split (`str`): `"train"`, `"val"` or `"test"`.
        report (`BuildReport`, *optional*): Lists what could not be used.
        texts (`str`, *optional*, defaults to `"all"`): `"first"` leaves a file's further texts out, as LISA's
            evaluation does.

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
    files = _Files(_split_folder(root, split), split, report, texts)
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

    def __init__(self, folder: Path, split: str, report: BuildReport, texts: str):
        self.folder, self.split, self.report, self.first_only = folder, split, report, texts == "first"

    def texts(self) -> Iterator[tuple[str, Any]]:
        """Sample id, and the fields of the row of every text; or what is wrong with it, its file or its photograph."""
        names = sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        images: dict[str, str] = {}
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                images.setdefault(os.path.splitext(name)[0], os.path.join(os.path.abspath(self.folder), name))
        annotated = [name[: -len(".json")] for name in names if name.endswith(".json")]
        for stem in sorted(set(images) - set(annotated)):
            problem = RowProblem("missing_annotation", f"there is no {stem}.json beside the photograph.")
            yield f"reasonseg-{self.split}-{stem}", problem
        for stem in annotated:
            yield from self._texts_of(stem, images.get(stem))

    def _texts_of(self, stem: str, image: str | None) -> Iterator[tuple[str, Any]]:
        name = f"reasonseg-{self.split}-{stem}"
        try:
            content = _read(self.folder / f"{stem}.json")
            instructions = _texts(content)
        except RowProblem as problem:
            yield name, problem
            return
        if self.first_only and len(instructions) > 1:
            self.report.left_out["further texts"] += len(instructions) - 1
            instructions = instructions[:1]
        try:
            fields = _fields(content, stem, image, name, self.report)
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


def _read(path: Path) -> dict[str, Any]:
    """A json in UTF-8 or, as some of the benchmark's files, cp1252."""
    data = path.read_bytes()
    try:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        content = json.loads(text)
    except ValueError as error:
        raise RowProblem("bad_json", f"{path.name} is no complete json in UTF-8 or cp1252 ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise RowProblem("bad_annotation", f'{path.name} is no object with a list "shapes" and a list "text".')
    return content


def _texts(content: dict[str, Any]) -> list[Any]:
    texts = content.get("text")
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, list):
        raise RowProblem("bad_annotation", f'"text" is {texts!r:.60}; expected a list of texts.')
    if not texts:
        raise RowProblem("empty_text", '"text" is an empty list.')
    return texts


def _fields(content: dict, stem: str, image: str | None, name: str, report: BuildReport) -> dict[str, Any]:
    """The columns that all texts of a file share."""
    if image is None:
        raise RowProblem("missing_image", f"there is no photograph {stem}.jpg beside {stem}.json.")
    masks, ignore = _masks(content["shapes"], image_size(image), name, report)
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
    drawn, ignored, order = [], [], []
    for index, shape in enumerate(shapes):
        where = f"{name} shape {index}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise RowProblem("bad_annotation", f"shape {index} has no label: {shape!r:.60}.")
        label = shape["label"].strip().lower()
        if label == "flag":
            continue
        points = _points(shape.get("points"), index, size)
        mask = draw_polygon(points, *size)
        if len(points) < 3 or not mask.any():
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
    painted = np.zeros(size, dtype=np.uint8)  # 1 = target, 2 = ignore
    for place in np.argsort(order)[::-1]:
        painted[drawn[place]] = 2 if ignored[place] else 1
    targets = [mask & (painted != 2) for mask, skip in zip(drawn, ignored, strict=True) if not skip]
    left = [mask for mask in targets if mask.any()]
    if not left:
        raise RowProblem("empty_mask", "there is no target shape with a pixel that is not ignored.")
    if len(left) < len(targets):
        detail = f"{len(targets) - len(left)} of {len(targets)} target shapes are covered by ignore shapes; left out"
        report.add("empty_mask", name, detail, lost=False)
    return [encode_mask(mask) for mask in left], encode_mask(painted == 2) if (painted == 2).any() else None


def _points(points: Any, index: int, size: tuple[int, int]) -> np.ndarray:
    """(n, 2) whole pixels (x, y), cut as the benchmark does."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        detail = f"shape {index} has points {points!r:.60}; expected [[x, y], ...] in pixels."
        raise RowProblem("bad_annotation", detail)
    values = _checked_polygon([number for point in points for number in point], index, *size) if points else []
    return np.asarray(values, dtype=np.float64).reshape(-1, 2).astype(np.int64)


def draw_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """A filled polygon with its outline, pixel for pixel as `cv2.fillPoly` draws one inside the image.

    Args:
        points (`np.ndarray` of shape `(num_points, 2)`, integer): corners (x, y); the last is joined to the first.
        height (`int`), width (`int`): of the image, in pixels.

    Returns:
        `np.ndarray` of shape `(height, width)`, bool.
    """
    ends = np.roll(points, -1, axis=0)
    (x0, y0), (x1, y1) = points.T, ends.T
    rows = np.arange(height)[:, None]
    row, edge = np.nonzero((rows >= np.minimum(y0, y1)) & (rows < np.maximum(y0, y1)))
    crossing = x0[edge] + (row - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    turns = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(turns, (row, np.clip(np.ceil(crossing), 0, width).astype(np.int64)), 1)
    mask = turns.cumsum(axis=1)[:, :width] % 2 == 1  # inside after an odd number of crossings
    for start, end in zip(points, ends, strict=True):
        x, y = _line(start, end)
        seen = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        mask[y[seen], x[seen]] = True
    return mask


def _line(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bresenham's line from left to right, with halves rounded towards its start."""
    if start[0] > end[0]:
        start, end = end, start
    length = np.abs(end - start)
    long = int(length.argmax())  # the axis on which every pixel is visited
    steps = np.arange(length[long] + 1)
    short_steps = -((length[long] - 2 * length[1 - long] * steps) // max(2 * length[long], 1))
    signs = np.sign(end - start)
    line = [None, None]
    line[long] = start[long] + signs[long] * steps
    line[1 - long] = start[1 - long] + signs[1 - long] * short_steps
    return line[0], line[1]
