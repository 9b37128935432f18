# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""webdataset's tar files: neighbours of one name are a sample, each file is a shard, read from front to end."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..data.builders.values import parse_json
from .places import Place
from .shards import Shard, SourceRow, numbered

MAX_MEMBER_BYTES = 256_000_000  # of a file in a tar; what is larger is no picture


class TarSource:
    """Samples of tar files: `000.jpg` and `000.json` are one, named `000`.

    Args:
        place ([`Place`]): The tar files.
        pictures (`Sequence[str]`): Suffixes of pictures.
        instruction_column (`str`, *optional*): A suffix whose file holds the instruction as text (`txt`), or a field
            of the sample's `.json`.
    """

    def __init__(self, place: Place, pictures: Sequence[str], instruction_column: str | None):
        self.place, self.name = place, place.name
        self._pictures = [suffix.lstrip(".") for suffix in pictures]
        self._column = instruction_column
        self._suffixes = {*self._pictures, "json", *([] if instruction_column is None else [instruction_column])}
        self.shards = numbered([(name,) for name in place.sizes])

    def read(self, shard: Shard) -> Iterator[SourceRow]:
        with self.place.open(shard.file) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for index, (key, parts) in enumerate(self._samples(archive)):
                yield self._row(shard.file, index, key, parts)
            file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes the end of a file for that of the archive
                raise tarfile.ReadError("it has no end mark")

    def _samples(self, archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes | str]]]:
        """Name of each sample, and its files by suffix: content, or where it is too large, a text that says so."""
        current, parts = None, {}
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.name.startswith("."):
                continue
            stem, _, suffix = path.name.partition(".")
            suffix = suffix if suffix == self._column else suffix.lower()
            key = str(path.with_name(stem))
            if key != current and parts:
                yield current, parts
                parts = {}
            current = key
            if suffix in self._suffixes:
                too_large = member.size > MAX_MEMBER_BYTES
                parts[suffix] = (
                    f"{member.name} has {member.size} bytes; at most {MAX_MEMBER_BYTES} are read."
                    if too_large
                    else archive.extractfile(member).read()
                )
        if parts:
            yield current, parts

    def _row(self, file: str, index: int, key: str, parts: dict[str, bytes | str]) -> SourceRow:
        row = SourceRow(file, index, key)
        picture = next((parts[suffix] for suffix in parts if suffix in self._pictures), None)
        refused = next((part for part in parts.values() if isinstance(part, str)), None)
        if picture is None:
            row.problem = f"the sample {key!r} has no picture; it has {', '.join(parts)}."
        elif refused is not None:
            row.problem = refused
        else:
            row.image = picture
        try:
            row.instruction = None if self._column is None else self._instruction(key, parts)
        except ValueError as error:
            row.problem = row.problem or str(error)
        return row

    def _instruction(self, key: str, parts: dict[str, bytes | str]) -> Any:
        if self._column in parts:
            return parts[self._column].decode().strip()
        fields = parse_json(parts["json"]) if "json" in parts else {}
        if not isinstance(fields, dict) or self._column not in fields:
            raise ValueError(f"the sample {key!r} has neither a .{self._column} nor a .json with {self._column!r}.")
        return fields[self._column]

    def description(self) -> dict[str, Any]:
        return self.place.description() | {"instruction_column": self._column}
