# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders of pictures, alone or with a JSONL or CSV file that has a line for each question."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.builders.annotation_files import find_annotations, read_lines
from ..data.builders.build_report import RowProblem
from ..data.builders.found_files import TrustedFolder, spellings
from ..files import file_digest
from .places import Place
from .shards import Shard, SourceRow, numbered, ranges

_IMAGE_FIELDS = ("image", "file_name")  # as folders of one's own are read for training and evaluation


class PicturesSource:
    """Every picture of a folder, by name.

    Args:
        place ([`Place`]): The pictures.
        rows_per_shard (`int`): Pictures of a shard.
        allow_outside (`bool`): Also follow links that lead out of the folder.
    """

    def __init__(self, place: Place, rows_per_shard: int, allow_outside: bool):
        self.place, self.name = place, place.name
        self._names = list(place.sizes)
        self._trusted = TrustedFolder(place.root, allow_outside) if place.is_local else None
        self.shards = numbered([("", *place) for place in ranges(len(self._names), rows_per_shard)])

    def read(self, shard: Shard) -> Iterator[SourceRow]:
        for row, name in enumerate(self._names[shard.start : shard.stop], shard.start):
            found = SourceRow(name, row, name, self.place.address(name))
            try:
                if self._trusted is not None:
                    self._trusted.check(found.image)
            except RowProblem as problem:
                found.problem = str(problem)
            yield found

    def description(self) -> dict[str, Any]:
        return self.place.description()


class LinesSource:
    """Lines of the annotation file of a folder: a picture and an instruction each.

    Args:
        place ([`Place`]): The pictures, on this machine.
        rows_per_shard (`int`): Lines of a shard.
        instruction_column (`str`): The field of a line with the instruction.
        allow_outside (`bool`): Also follow paths that lead out of the folder.

    Raises:
        FileNotFoundError: There is no annotation file.
        ValueError: The folder is on another machine, or the file has no line.
    """

    def __init__(self, place: Place, rows_per_shard: int, instruction_column: str, allow_outside: bool):
        if not place.is_local:
            raise ValueError(
                f"{place.name!r} holds pictures without instructions; ask the same of every picture with "
                "--instruction, or store pictures and instructions in Parquet files."
            )
        self.place, self.name, self._column = place, place.name, instruction_column
        self._trusted = TrustedFolder(place.root, allow_outside)
        try:
            self._file = find_annotations(place.root, None, "train")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no instructions: {error} Or ask the same of every picture with --instruction."
            ) from error
        self._lines = list(read_lines(self._file))
        if not self._lines:
            raise ValueError(f"{self._file} has no line.")
        self.shards = numbered([("", *rows) for rows in ranges(len(self._lines), rows_per_shard)])

    def read(self, shard: Shard) -> Iterator[SourceRow]:
        file, root = Path(self._file).name, self.place.root
        starts, implied = [os.path.dirname(os.path.abspath(self._file)), root], [os.path.join(root, "images")]
        for row, (number, fields) in enumerate(self._lines[shard.start : shard.stop], shard.start):
            found = SourceRow(file, row, f"{file}:{number}")
            try:
                if isinstance(fields, RowProblem):
                    raise fields
                found.sample_id = str(fields.get("sample_id") or found.sample_id)
                found.instruction = fields.get(self._column)
                name = next((fields[field] for field in _IMAGE_FIELDS if fields.get(field)), None)
                if not isinstance(name, str):
                    raise RowProblem("bad_annotation", f"image is {name!r:.60}; expected the path of an image file.")
                found.image = self._trusted.find(spellings(name), starts, implied)
                if found.image is None:
                    raise RowProblem("missing_image", f"there is no file {name!r} in {', '.join(map(repr, starts))}.")
            except RowProblem as problem:
                found.problem = str(problem)
            yield found

    def description(self) -> dict[str, Any]:
        return self.place.description() | {
            "instruction_column": self._column,
            "annotations": file_digest(self._file)[:16],
        }
