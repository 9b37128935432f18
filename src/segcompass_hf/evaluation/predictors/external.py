# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks of any other model, from a folder of PNGs or a JSONL, under the same protocol as our own.

A prediction is either of:

- `NAME.png` (or `.PNG`) in the folder, at the size of the sample's image: 0 is background, every other value one
  object. A file without object is an empty prediction. `prediction_file_name` gives NAME: letters, digits and `_.-~`
  of the `sample_id` as they are, every other byte of its UTF-8 as `%XX` (`val/7` -> `val%2F7.png`).
- a line of a `.jsonl` in the folder (its records may be spread over several): `sample_id`, `masks` (COCO RLE or
  polygons in pixels, one per object, `[]` for none), and optionally `scores` (one per mask), `reasoning` and `text`.
  The `samples.jsonl` of our own runs has this form.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from transformers.utils import logging

from ...data.builders.build_report import RowProblem
from ...data.builders.mask_files import objects_of_values, read_mask_file
from ...data.builders.polygons import check_no_grid, polygons_to_rle
from ...data.schema import check_mask_pixels, decode_mask
from ...files import file_digest
from ..prediction import Prediction
from ..records import CHECKSUM, is_as_written

logger = logging.get_logger(__name__)

_LONGEST_NAME = 200  # characters; file systems take 255 bytes
_SHOWN = 5


def prediction_file_name(sample_id: str) -> str:
    """The PNG that holds the prediction of a sample; see the module for the rule.

    Names of more than 200 characters are cut there and end with the first 16 digits of the id's SHA-256.
    """
    name = quote(sample_id, safe="")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}"
    return f"{name}.png"


class FolderPredictor:
    """Predictions that lie in a folder.

    Args:
        folder (path): Folder of PNGs and JSONLs, or one JSONL.
        sample_ids (iterable of `str`, *optional*): Those of the data set, so that what is missing or too much shows
            before anything is evaluated. Without them it shows batch by batch, and what is too much not at all.
        missing (`str`, *optional*, defaults to `"error"`): Samples without prediction: `"error"` stops; `"empty"`
            counts them as empty predictions, in `num_missing`.
        name (`str`, *optional*): What reports call it; the folder's name by default.

    Attributes:
        missing_ids (`list[str]`): Samples without prediction, of `sample_ids`.
        extra (`list[str]`): Files and ids that are no prediction of any sample, which are not read.
        num_missing (`int`): Empty predictions given in this process for want of one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no prediction, two for one sample, a broken line, or too few.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        sample_ids: Iterable[str] | None = None,
        missing: Literal["error", "empty"] = "error",
        name: str | None = None,
    ):
        if missing not in ("error", "empty"):
            raise ValueError(f"missing is {missing!r}; it must be 'error' or 'empty'.")
        self.folder, self.missing, self.num_missing = Path(folder), missing, 0
        path = Path(os.path.realpath(self.folder))
        self.name = name or (path.stem if path.suffix.lower() == ".jsonl" else path.name)
        self._files, self._lines, self.extra = _index(self.folder)
        self._checked = False
        self.missing_ids: list[str] = []
        if sample_ids is not None:
            self._check(list(sample_ids))
        if self.extra:
            logger.warning(
                f"{self.folder}: {len(self.extra)} files or ids are no prediction of a known sample and are not used: "
                f"{_some(self.extra)}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """A digest of all predictions, and what happens without one."""
        hasher = hashlib.sha256()
        jsonls = {path for path, _ in self._lines.values()}
        for path in sorted({*self._files.values(), *jsonls}):
            hasher.update(path.name.encode() + b"\0" + bytes.fromhex(file_digest(path)))
        settings = {"predictions": hasher.hexdigest()[:16], "missing": self.missing}
        return settings | {"num_missing": len(self.missing_ids)} if self._checked else settings

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        """Look the rows' predictions up by `sample_id`.

        Raises:
            ValueError: one is missing (unless counted as empty), damaged, or of another size than its image.
        """
        ids = [row["sample_id"] for row in rows if row.get("sample_id") is not None]
        if len(ids) < len(rows):
            raise ValueError("a row has no sample_id, by which predictions in a folder are found; give every row one.")
        lost = [sample_id for sample_id in ids if not self._has(sample_id)]
        if lost and self.missing == "error":
            raise self._missing_error(lost, f"of {len(ids)} samples in this batch")
        self.num_missing += len(lost)
        return [self._read(row["sample_id"], (row["image"].height, row["image"].width)) for row in rows]

    def _check(self, sample_ids: list[str]) -> None:
        twice = [sample_id for sample_id, number in Counter(sample_ids).items() if number > 1 or sample_id is None]
        if twice:
            raise ValueError(
                f"{len(twice)} sample_ids of the data set are missing or stand for several samples ({_some(twice)}); "
                "predictions in a folder need one id per sample."
            )
        self._checked, known = True, set(sample_ids)
        self.missing_ids = [sample_id for sample_id in sample_ids if not self._has(sample_id)]
        names = set(map(prediction_file_name, sample_ids))
        self.extra += [name for name in self._files if name not in names]
        self.extra += [sample_id for sample_id in self._lines if sample_id not in known]
        if self.missing_ids and self.missing == "error":
            raise self._missing_error(self.missing_ids, f"of {len(sample_ids)} samples")
        if self.missing_ids:
            logger.warning(
                f"{self.folder}: {len(self.missing_ids)} of {len(sample_ids)} samples have no prediction and count as "
                f"empty ones: {_some(self.missing_ids)}"
            )

    def _missing_error(self, lost: list[str], among: str) -> ValueError:
        hint = f"; unused there: {_some(self.extra)}" if self.extra else ""
        return ValueError(
            f"{os.fspath(self.folder)!r} has no prediction for {len(lost)} {among}: {_some(lost)}{hint}. A sample's "
            f"file is, for instance, {prediction_file_name(lost[0])!r}, or a line of a .jsonl with its sample_id. "
            'Count them as empty predictions with missing="empty".'
        )

    def _has(self, sample_id: str) -> bool:
        as_file, as_line = prediction_file_name(sample_id) in self._files, sample_id in self._lines
        if as_file and as_line:
            path, _ = self._lines[sample_id]
            raise ValueError(
                f"sample {sample_id!r} has two predictions, {prediction_file_name(sample_id)!r} and a line of "
                f"{path.name!r}; leave one."
            )
        return as_file or as_line

    def _read(self, sample_id: str, size: tuple[int, int]) -> Prediction:
        path, offset = self._files.get(prediction_file_name(sample_id)), None
        if path is None and sample_id in self._lines:
            path, offset = self._lines[sample_id]
        if path is None:
            return Prediction(np.zeros((0, *size), dtype=bool))
        try:
            if offset is None:
                return _read_png(path, size)
            with open(path, "rb") as file:
                file.seek(offset)
                return _read_record(json.loads(file.readline()), size)
        except ValueError as error:
            raise ValueError(f"the prediction of {sample_id!r} in {os.fspath(path)!r}: {error}") from error


def _index(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[Path, int]], list[str]]:
    """PNGs by name (ending in `.png`), JSONL lines by sample id as (file, byte offset), and the names of all else."""
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder of predictions {os.fspath(folder)!r}.")
    paths = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    files: dict[str, Path] = {}
    lines: dict[str, tuple[Path, int]] = {}
    extra = []
    for path in paths:
        ending = path.suffix.lower()
        if path.name.startswith(".") and ending != ".png":  # .DS_Store and the like
            continue
        if ending == ".png" and path.is_file():
            name = path.stem + ending
            if name in files:
                raise ValueError(f"a sample has two predictions, {files[name].name!r} and {path.name!r}; leave one.")
            files[name] = path
        elif ending == ".jsonl" and path.is_file():
            for sample_id, offset in _record_ids(path):
                if sample_id in lines:
                    where = lines[sample_id][0].name
                    raise ValueError(f"sample {sample_id!r} has two predictions, in {where!r} and {path.name!r}.")
                lines[sample_id] = (path, offset)
        else:
            extra.append(path.name + ("/" if path.is_dir() else ""))
    if not files and not lines:
        raise ValueError(
            f"{os.fspath(folder)!r} holds no predictions (found: {_some(extra) or 'nothing'}); expected one PNG per "
            "sample, or a .jsonl with sample_id and masks."
        )
    return files, lines, extra


def _record_ids(path: Path) -> Iterator[tuple[str, int]]:
    """Sample id and byte offset of every line of a JSONL; blank lines are passed over."""
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record_id(line, f"{path}, line {number}"), offset
            offset += len(line)


def _record_id(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no json ({error}); was the file cut short?") from error
    if not isinstance(record, dict) or not isinstance(record.get("sample_id"), str) or "masks" not in record:
        shown = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f'{where} holds {shown}; expected an object with "sample_id" (a text) and "masks" (a list).')
    return record["sample_id"]


def _read_png(path: Path, size: tuple[int, int]) -> Prediction:
    values = read_mask_file(path)
    if values.shape != size:
        hint = " It looks transposed." if values.shape == size[::-1] else ""
        raise RowProblem(
            "wrong_size",
            f"it is {values.shape} but the image is {size} (height, width); save masks at the image's own size.{hint}",
        )
    objects = objects_of_values(values, f"mask {path.name!r}")
    return Prediction(np.stack([*objects.values()]) if objects else np.zeros((0, *size), dtype=bool))


def _read_record(record: dict[str, Any], size: tuple[int, int]) -> Prediction:
    if not is_as_written(record):
        raise ValueError(
            f"it has changed since it was written: its values and its {CHECKSUM} differ. Write it again, or without "
            f'"{CHECKSUM}".'
        )
    if not isinstance(record["masks"], list):
        raise ValueError(f'"masks" is {record["masks"]!r:.60}; expected a list of RLEs, [] for no object.')
    check_mask_pixels(len(record["masks"]), *size)
    check_no_grid(record["masks"], *size)
    masks = np.zeros((len(record["masks"]), *size), dtype=bool)
    for index, entry in enumerate(record["masks"]):
        masks[index] = _mask(entry, size, f"mask {index}")
    scores = [] if record.get("scores") is None else record["scores"]
    if not isinstance(scores, list) or not all(_is_score(score) for score in scores):
        raise ValueError(f'"scores" is {scores!r:.60}; expected one number in [0, 1] per mask.')
    reasoning, answer = record.get("reasoning"), record.get("text")
    for name, text in (("reasoning", reasoning), ("text", answer)):
        if text is not None and not isinstance(text, str):
            raise ValueError(f'"{name}" is a {type(text).__name__}; expected a text.')
    return Prediction(masks, [float(score) for score in scores], reasoning=reasoning, text=answer)


def _mask(entry: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """A mask as builders read it. A model may well predict one without a pixel: an RLE, or no polygon at all."""
    nothing = isinstance(entry, list) and all(polygon == [] for polygon in entry)
    try:
        return np.zeros(size, dtype=bool) if nothing else decode_mask(polygons_to_rle(entry, *size))
    except RowProblem as problem:
        if problem.kind == "empty_mask" and isinstance(entry, dict):
            return np.zeros(size, dtype=bool)
        hint = " Is it a box? A mask without a pixel is written as []." if problem.kind == "empty_mask" else ""
        raise RowProblem(problem.kind, f"{where}: {problem}{hint}") from problem


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
