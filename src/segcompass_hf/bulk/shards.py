# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What every source of images has in common: its shards, and rows of which none is dropped."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..printable import printable

DAMAGE = (EOFError, UnicodeDecodeError, tarfile.TarError, zlib.error, ValueError)  # pyarrow's is a `ValueError`


@dataclass(frozen=True)
class Shard:
    """What is answered as a whole: all rows of it are written, or none.

    Args:
        number (`int`): Its place among the shards of the data set.
        file (`str`): The file it is read from, by its name in the data set; empty where rows come from many.
        start (`int`, *optional*, defaults to 0): Its first row.
        stop (`int`, *optional*): The row after its last; `None` for a file whose rows are counted by reading it.
    """

    number: int
    file: str
    start: int = 0
    stop: int | None = None


@dataclass
class SourceRow:
    """One row of a data set, not yet decoded.

    Args:
        source (`str`): Name of the file that it comes from.
        row (`int`): Its place there.
        sample_id (`str`): The data set's own, or made of the two.
        image (`bytes` or `str`, *optional*): Content of an image file, or a path or URL of one.
        instruction (*optional*): What the data set's column holds.
        problem (`str`, *optional*): Why the row cannot be answered.
    """

    source: str
    row: int
    sample_id: str
    image: bytes | str | None = None
    instruction: Any = None
    problem: str | None = None


class Source(Protocol):
    """A data set of images. It can be pickled, and reads its shards in whatever process."""

    name: str
    shards: list[Shard]

    def read(self, shard: Shard) -> Iterator[SourceRow]:
        """The rows of a shard, in the same order whenever it is read.

        Raises:
            OSError: The file cannot be read now, for instance over a network.
            ValueError, EOFError, tarfile.TarError, zlib.error: It is damaged.
        """
        ...

    def description(self) -> dict[str, Any]:
        """What decides its rows, as json holds it, without reading them."""
        ...


def ranges(total: int, rows_per_shard: int) -> Iterator[tuple[int, int]]:
    """First row, and the row after the last, of shards of so many rows."""
    for start in range(0, total, rows_per_shard):
        yield start, min(start + rows_per_shard, total)


def numbered(places: Sequence[tuple[Any, ...]]) -> list[Shard]:
    """Shards of `(file, start, stop)`, in that order."""
    return [Shard(number, *place) for number, place in enumerate(places)]


def num_rows(shards: Sequence[Shard]) -> int | None:
    """Rows of shards together; `None` where one is counted by reading it."""
    if any(shard.stop is None for shard in shards):
        return None
    return sum(shard.stop - shard.start for shard in shards)


def read_with_problems(source: Source, shard: Shard) -> Iterator[SourceRow]:
    """The rows of a shard; where its file is damaged, a last row that says so in place of those behind it.

    Raises:
        OSError: The file cannot be read now; another try may succeed.
    """
    row = shard.start
    try:
        for found in source.read(shard):
            row = found.row + 1
            yield found
    except DAMAGE as error:
        yield _problem(shard, row, error)
    except OSError as error:
        if error.errno is not None or isinstance(error, TimeoutError | ConnectionError):
            raise
        yield _problem(shard, row, error)  # pyarrow's word for damaged pages; those of the system have a number


def _problem(shard: Shard, row: int, error: Exception) -> SourceRow:
    end = "to its end" if shard.stop is None else f"to row {shard.stop - 1}"
    reason = f"{shard.file} cannot be read from row {row} {end} ({type(error).__name__}: {error}); is it damaged?"
    return SourceRow(shard.file, row, f"{shard.file}:{row}", problem=printable(reason))
