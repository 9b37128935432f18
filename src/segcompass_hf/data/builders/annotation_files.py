# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Lines of a JSONL or CSV file of annotations, found in a folder, with broken ones named."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .build_report import RowProblem
from .coco_instances import describe_folder
from .values import parse_json

SUFFIXES = (".jsonl", ".csv")
NAMES = ("annotations", "metadata")
SPLIT_NAMES = ("train", "val", "validation", "test")


def find_annotations(root: str | os.PathLike, annotations: str | os.PathLike | None, split: str) -> Path:
    """The annotation file of a folder.

    Without a name: `{split}.jsonl`, `annotations.jsonl`, `metadata.jsonl`, the same as `.csv`, or the only file of
    these types, in the folder or in its `{split}/`.

    Raises:
        FileNotFoundError: There is none; the message says what there is.
        ValueError: There are several to choose from, or it is of another type.
    """
    root = Path(root)
    if root.is_file():
        raise ValueError(f"{os.fspath(root)!r} is a file; give its folder, and the file with annotations=.")
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {os.fspath(root)!r}; give the one that holds your images and their annotations."
        )
    if annotations is not None:
        return _given(root, Path(annotations))
    for folder in (root, root / split):
        names = [f"{name}{suffix}" for suffix in SUFFIXES for name in (split, *NAMES)]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is not None:
            return found
        files = [
            file for suffix in SUFFIXES for file in sorted(folder.glob(f"*{suffix}")) if not file.name.startswith(".")
        ]
        other = [file.name for file in files if file.stem in SPLIT_NAMES]
        if other:
            raise FileNotFoundError(
                f"there is no {split}.jsonl or {split}.csv in {os.fspath(folder)!r}, but {', '.join(other)}: choose a "
                "split that is there, or name the file with annotations=."
            )
        if len(files) > 1:
            raise ValueError(
                f"{os.fspath(folder)!r} holds {', '.join(file.name for file in files)}; name one with annotations=, "
                "or call it annotations.jsonl."
            )
        if files:
            return files[0]
    raise FileNotFoundError(
        f"there is no annotations.jsonl (nor another .jsonl or .csv) in {os.fspath(root)!r}. Write one line per "
        'sample, such as {"image": "dog.jpg", "instruction": "the dog", "masks": [[[10, 10, 90, 10, 90, 60]]]}. '
        f"{describe_folder(root)}"
    )


def _given(root: Path, annotations: Path) -> Path:
    path = next((path for path in (root / annotations, annotations) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no file {os.fspath(annotations)!r}; {describe_folder(root)}")
    if path.suffix.lower() not in SUFFIXES:
        hint = " For COCO annotations use build_coco." if path.suffix.lower() == ".json" else ""
        raise ValueError(f"{os.fspath(path)!r} is neither .jsonl (one JSON object per line) nor .csv.{hint}")
    return path


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    """Lines of a file with their numbers, from 1 on; a broken line comes as its problem.

    Raises:
        ValueError: The file cannot be read on: it is no UTF-8 (CSV), or has no header.
    """
    return _csv_lines(path) if path.suffix.lower() == ".csv" else _jsonl_lines(path)


def named_splits(path: Path) -> Counter[str]:
    """Values of the column `split`, and how often each comes; lines without one do not count."""
    lines = (fields for _, fields in read_lines(path) if not isinstance(fields, RowProblem))
    names = (str(fields["split"]).strip() for fields in lines if fields.get("split") is not None)
    return Counter(name for name in names if name)


def _jsonl_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                start = line[:60].decode("utf-8", "replace").strip()
                detail = f"the line is no complete JSON object in UTF-8 ({error}): {start}"
                yield number, RowProblem("bad_json", detail)
                continue
            if isinstance(fields, dict):
                yield number, fields
            else:
                detail = f"the line is a JSON {type(fields).__name__}; expected an object per line, as {{...}}."
                yield number, RowProblem("bad_json", detail)


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    limit = csv.field_size_limit(1 << 30)  # polygons in a cell are longer than the default of 128 kB
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
            if not header.strip():
                raise ValueError(f"{os.fspath(path)!r} is empty; its first line names the columns.")
            for fields in reader:
                names = [str(name).strip() for name in reader.fieldnames or ()]
                cells = [value for name, value in fields.items() if name is not None]
                if None in fields or None in cells:
                    count = "more" if None in fields else "fewer"
                    detail = f"the line has {count} cells than the header, {', '.join(names)}; texts with a comma and "
                    yield reader.line_num, RowProblem("bad_annotation", detail + 'lists stand in double quotes "...".')
                else:
                    yield reader.line_num, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not in UTF-8 ({error}); save it as CSV UTF-8 (spreadsheets offer that by name)."
        ) from error
    except csv.Error as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read as CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
