# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that annotations name: found however their names are written, and only inside the folder that was given."""

from __future__ import annotations

import filecmp
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from .build_report import RowProblem

# The formats that images are read in, by the suffixes of their files.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2")
PICTURES += (".ppm",)

_CHANGES = (
    lambda name: name.replace("\\", "/"),
    unquote,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    quote,
)


def spellings(name: str) -> list[str]:
    """A path as it stands, then as others write it: / for backslashes, %20 or a space, é as one or two characters."""
    forms = [name, name.strip()]
    for change in _CHANGES:
        forms += [change(form) for form in forms if form.isprintable()]
    return list(dict.fromkeys(forms))


class TrustedFolder:
    """The folder whose files may be read because annotations name them.

    A file that `..`, an absolute path or a link leads to elsewhere would become part of the data set, and public with
    it. Links of the Hub's cache from a snapshot to its own blobs stay inside.

    Args:
        root: The folder.
        allow_outside (`bool`, *optional*, defaults to `False`): Read files anywhere.
    """

    def __init__(self, root: str | os.PathLike, allow_outside: bool = False):
        self.root, self.allow_outside = os.path.abspath(root), allow_outside
        real = Path(os.path.realpath(root))
        self._inside = [real]
        self._inside += [parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots"]

    def holds(self, path: str | os.PathLike) -> bool:
        """Whether a file may be read: it is inside once links are followed, or files elsewhere are allowed."""
        real = Path(os.path.realpath(path))
        return self.allow_outside or any(real.is_relative_to(folder) for folder in self._inside)

    def check(self, path: str | os.PathLike) -> None:
        """Refuse a file that is not inside.

        Raises:
            RowProblem: `"outside_folder"`.
        """
        if not self.holds(path):
            raise RowProblem(
                "outside_folder",
                f"{os.fspath(path)!r} lies outside of {self.root!r} and would become part of the data set. Copy it "
                "into the folder, or allow such files with allow_outside=True (--allow-outside).",
            )

    def find(
        self, names: Iterable[str], starts: Sequence[str], implied: Sequence[str] = (), never: str | None = None
    ) -> str | None:
        """The first of some names that is a file.

        Args:
            names (`Iterable[str]`): Of one file, the likeliest first.
            starts (`Sequence[str]`): Folders that the names start from; the first that has the file counts.
            implied (`Sequence[str]`, *optional*): Folders where it may lie though no name says so; it must be one
                file, not different ones in several of them.
            never (`str`, *optional*): A file that is not meant.

        Returns:
            `str` or `None`: Its path, or `None` where there is none.

        Raises:
            RowProblem: `"outside_folder"`, or `"ambiguous_file"`.
        """
        outside = None
        for name in names:
            for places in (starts, implied):
                paths = [os.path.normpath(os.path.join(place, name)) for place in places]
                paths = [path for path in dict.fromkeys(paths) if path != never and os.path.isfile(path)]
                inside = [path for path in paths if self.holds(path)]
                outside = outside or next((path for path in paths if path not in inside), None)
                others = inside[1:] if places is implied else []
                others = [path for path in others if not filecmp.cmp(inside[0], path, shallow=False)]
                if others:
                    raise RowProblem(
                        "ambiguous_file", f"{name!r} is {inside[0]!r} or {others[0]!r}; write the folder in its name."
                    )
                if inside:
                    return inside[0]
        if outside is not None:
            self.check(outside)
        return None
