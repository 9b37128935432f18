# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""ReasonSeg as it is mirrored on the Hub: Parquet files with a photograph, a text and one merged mask per row."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets_cache import named_cache
from ..parquet_sizes import check_parquet
from ..schema import encode_mask, row_features
from .build_report import BuildReport, RowProblem
from .coco_instances import describe_folder
from .found_files import TrustedFolder, spellings
from .mask_files import read_mask_file, split_void
from .polygons import polygons_to_rle
from .rows import SampleIds, dataset_from_rows, image_size, make_row, usable_rows
from .values import as_whole

COLUMNS = ("image", "text", "mask", "image_id", "ann_id")  # img_height and img_width are used where they are there
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}


def from_hosted_reasonseg(
    path_or_id: str | os.PathLike,
    split: str = "test",
    report: BuildReport | None = None,
    streaming: bool = False,
    allow_outside: bool = False,
) -> Any:
    """A hosted mirror of ReasonSeg in the row schema: one sample per row, with one merged mask.

    Rows have `image`, `text`, `mask`, `image_id`, `ann_id` and usually `img_height` and `img_width`. A mask may be
    nested lists or an array of 0 and 1 (also flat, by `img_height` and `img_width`), an image, or a COCO RLE. As the
    objects of a mask cannot be told apart, `masks` has one entry. `kind` is unknown in this format; `ignore` is what a
    mask marks with 255 beside other values.
    Rows of local files are read one at a time, so that memory does not grow with the data set, streamed or not; a
    stream from the Hub holds what `datasets` reads ahead.

    Args:
        path_or_id: A Parquet file, a folder with such files (there or in `data/`, named after their split), or the id
            of a data set on the Hub.
        split (`str`): Which part to read.
        report (`BuildReport`, *optional*): Lists what could not be used; for streams, as far as this process
            reads them.
        streaming (`bool`, *optional*, defaults to `False`): Return a `datasets.IterableDataset`.
        allow_outside (`bool`, *optional*, defaults to `False`): Use files outside of the folder as well, where links
            lead there, or rows with the path of a photograph in place of its bytes.

    Returns:
        `datasets.Dataset`, memory-mapped, or `datasets.IterableDataset`; images are kept as they are encoded.

    Raises:
        FileNotFoundError: There is no such file, folder or data set.
        ValueError: A file is no Parquet file, a column is missing, or no row could be used.
    """
    import datasets

    report = BuildReport() if report is None else report
    files = _local_files(path_or_id, split)
    is_folder = os.path.isdir(path_or_id)
    trusted = None
    if files:
        trusted = TrustedFolder(path_or_id if is_folder else Path(path_or_id).parent, allow_outside)
        for file in files if is_folder else ():
            trusted.check(file)
        _check_files(files, report)
    hosted = HostedRows(split, report, trusted)

    def rows(files: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
        hosted.start_again()
        for table in _tables(files):
            yield from hosted(table)

    if files and streaming:
        paths = [str(file) for file in files]  # a list is what workers share out
        return datasets.IterableDataset.from_generator(rows, features=row_features(), gen_kwargs={"files": paths})
    if files:
        return dataset_from_rows(rows(files), f"hosted-reasonseg-{split}", report, rows_per_batch=16)
    try:
        with named_cache():
            loaded = datasets.load_dataset(path_or_id, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"there is no file or folder {path_or_id!r}, and on the Hub: {error}") from error
    _check_columns(loaded.column_names, path_or_id)
    if streaming:
        return _stream(loaded, hosted)
    converted = (row for table in loaded.with_format("arrow").iter(batch_size=1) for row in hosted(table))
    return dataset_from_rows(converted, f"hosted-reasonseg-{split}", report, rows_per_batch=16)


def _local_files(path_or_id: str | os.PathLike, split: str) -> list[Path]:
    """The Parquet files of a split; none where the name is one of the Hub."""
    path = Path(path_or_id)
    if path.is_file():
        named = _split_in(path)
        if named not in (None, SPLIT_WORDS.get(split, split)):
            raise ValueError(f"{str(path)!r} is of split {named!r} by its name, not of {split!r}.")
        return [path]
    if not path.is_dir():
        if isinstance(path_or_id, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id):
            return []
        raise FileNotFoundError(
            f"there is no file or folder {os.fspath(path_or_id)!r}, and it is no Hub id (owner/name) either."
        )
    files = sorted(file for place in (path, path / "data", path / split) for file in place.glob("*.parquet"))
    splits = {file: _split_in(file) or _split_in(file.parent) for file in files}
    wanted = SPLIT_WORDS.get(split, split)
    if files and not any(splits.values()):
        return files
    chosen = [file for file in files if splits[file] == wanted]
    if not chosen:
        found = ", ".join(sorted({name for name in splits.values() if name}))
        raise FileNotFoundError(
            f"there is no Parquet file of split {split!r} in {str(path)!r} or its data/; "
            + (f"there are files of {found}." if found else describe_folder(path))
        )
    return chosen


def _split_in(path: Path) -> str | None:
    """The split that a file's or folder's name starts with, as `test-00000-of-00002.parquet`."""
    return SPLIT_WORDS.get(re.split(r"[-_.]", path.name.lower())[0])


def _check_files(files: list[Path], report: BuildReport) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            columns = pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            report.add("bad_parquet", file.name, str(error), lost=False)
            raise ValueError(f"{str(file)!r} is no complete Parquet file ({error}); is it cut short?") from error
        _check_columns(columns, file)
        check_parquet(file, repr(str(file)), row_by_row=True)


def _check_columns(columns: list[str] | None, where: Any) -> None:
    columns = list(COLUMNS) if columns is None else columns
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{os.fspath(where)!r} has no column {', '.join(missing)}; it has {', '.join(columns)}, and a mirror of "
            f"ReasonSeg {', '.join(COLUMNS)}."
        )


def _tables(files: Sequence[str | Path]) -> Iterator[Any]:
    """Tables of one row. A buffer keeps whole row groups, which may be whole files, out of memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            with pq.ParquetFile(file, buffer_size=1 << 20) as parquet:
                wanted = [name for name in (*COLUMNS, "img_height", "img_width") if name in parquet.schema_arrow.names]
                for batch in parquet.iter_batches(batch_size=1, columns=wanted, use_threads=False):
                    yield pa.Table.from_batches([batch])
        except pa.ArrowException as error:
            raise ValueError(f"{os.fspath(file)!r} is damaged ({error}); copy or download it again.") from error


def _stream(stream: Any, hosted: HostedRows) -> Any:
    import pyarrow as pa

    features = row_features()

    def convert(table: Any, indices: list[int]) -> Any:
        if indices[0] == 0:
            hosted.start_again()
        return pa.Table.from_pylist(hosted(table), schema=features.arrow_schema)

    converted = stream.with_format("arrow").map(  # what a function returns for a table takes its place as a whole
        convert, with_indices=True, batched=True, batch_size=1, features=features
    )
    return converted.with_format(None)


class HostedRows:
    """Rows of a mirror -> rows in the row schema.

    Args:
        split (`str`): of the rows.
        report (`BuildReport`): gets those that cannot be used.
        files ([`TrustedFolder`], *optional*): where photographs may lie whose rows have a path in place of bytes.
    """

    def __init__(self, split: str, report: BuildReport, files: TrustedFolder | None = None):
        self.split, self.report, self.files = split, report, files
        self._named: set[str] = set()
        self.start_again()

    def start_again(self) -> None:
        """Before every pass over the rows; a report names a row once."""
        self.ids, self.count = SampleIds(self.report), 0

    def __call__(self, table: Any) -> list[dict[str, Any]]:
        """The row of a `pyarrow.Table` of one row, or none where it is broken."""
        index, self.count = self.count, self.count + 1
        values = {name: table.column(name)[0].as_py() for name in table.column_names if name not in ("mask", "image")}
        sample_id = f"reasonseg-{self.split}-{values.get('image_id')}-{values.get('ann_id')}"
        entry = f"{sample_id} (row {index})", (table, values, sample_id)
        return list(usable_rows([entry], lambda fields: self._row(*fields), self))

    def add(self, kind: str, where: str, detail: str, lost: bool = True) -> None:
        """As that of the report, which names a row once."""
        if where not in self._named:
            self._named.add(where)
            self.report.add(kind, where, detail, lost)

    def _row(self, table: Any, values: dict[str, Any], sample_id: str) -> dict[str, Any]:
        text = values["text"]
        if not isinstance(text, str) or not text.strip():
            raise RowProblem("empty_text", f"the text is {text!r:.60}.")
        image = table.column("image")[0].as_py()
        encoded = self._content(image)
        size = image_size(encoded)
        stated = (as_whole(values.get("img_height")), as_whole(values.get("img_width")))
        if None not in stated and stated != size:
            detail = f"img_height and img_width are {stated} but the image is {size} (height, width); the image counts"
            self.add("wrong_size", sample_id, detail, lost=False)
        rle, ignore = hosted_mask(table.column("mask").combine_chunks(), size)
        return make_row(
            image={"bytes": encoded, "path": image.get("path") if isinstance(image, dict) else None},
            instruction=text.strip(),
            masks=[rle],
            ignore=ignore,
            sample_id=self.ids.unique(sample_id, (text.strip(), rle["counts"])),
            image_id=str(values["image_id"]),
            source="reasonseg",
            split=self.split,
            is_reasoning=True,
        )

    def _content(self, image: Any) -> bytes:
        """The bytes of a row's photograph."""
        encoded = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(encoded, bytes) and encoded:
            return encoded
        name = image.get("path") if isinstance(image, dict) and encoded is None else image
        path = None
        if isinstance(name, str) and name and "://" not in name and self.files is not None:
            path = self.files.find(spellings(name), [self.files.root])
        if path is None:
            raise RowProblem("missing_image", f"the image has no content: {image!r:.80}.")
        return Path(path).read_bytes()


def hosted_mask(column: Any, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RLE of a mask in any of the forms in which mirrors hold it, and of its void (see `split_void`).

    Args:
        column (`pyarrow.Array` of length 1): the mask.
        size (`tuple[int, int]`): (height, width) of the image.

    Raises:
        RowProblem: `"bad_annotation"`, `"wrong_size"`, `"empty_mask"`, `"unreadable_mask"`.
    """
    import pyarrow as pa

    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    if column.null_count:
        raise RowProblem("empty_mask", "the row has no mask.")
    if _is_list(column.type):
        mask = _nested_values(column, size)
    else:
        value = column[0].as_py()
        if isinstance(value, dict) and "counts" in value:
            return polygons_to_rle(value, *size), None
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise RowProblem("bad_annotation", f"the mask is {column.type}; expected lists, an image or an RLE.")
        mask = read_mask_file(value)
    if mask.ndim == 3 and mask.shape[1:] == tuple(size):
        mask = (mask != 0).any(axis=0)
    if mask.shape != tuple(size):
        hint = " It looks transposed: is it of the photograph before its EXIF rotation?" * (mask.shape == size[::-1])
        raise RowProblem("wrong_size", f"the mask is {mask.shape} but its image is {size} (height, width).{hint}")
    mask, void = split_void(mask, "the mask")
    if not mask.any():
        raise RowProblem("empty_mask", "the mask has no pixel.")
    return encode_mask(mask), None if void is None else encode_mask(void)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _nested_values(column: Any, size: tuple[int, int]) -> np.ndarray:
    """Nested lists as an array, without a Python object per pixel."""
    import pyarrow.compute as pc

    shape: list[int] = []
    while _is_list(column.type):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) > 1 or lengths == [None]:
            found = ", ".join(sorted(map(str, lengths)))
            raise RowProblem("bad_annotation", f"the mask's lines have different lengths: {found}.")
        shape.append(lengths[0] if lengths else 0)
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        detail = f"the mask holds {column.type} with {column.null_count} nulls; expected 0 and 1."
        raise RowProblem("bad_annotation", detail)
    return values.reshape(size if len(shape) == 1 and shape[0] == size[0] * size[1] else shape)
