# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The photographs that a COCO file's annotations belong to."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from .build_report import RowProblem
from .found_files import TrustedFolder, spellings
from .rows import image_size

SUBFOLDERS = ("train2014", "val2014", "train2017", "val2017", "images")  # COCO 2017 dealt the same images anew
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)")


def once(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returned, or the problem that it met, when it was first asked."""
    if key not in known:
        try:
            known[key] = make()
        except RowProblem as problem:
            known[key] = problem
    if isinstance(known[key], RowProblem):
        raise RowProblem(known[key].kind, str(known[key]))
    return known[key]


def names_of(image: Any) -> list[str]:
    """Names of an image's file: its `file_name`, or, as LVIS has it, the path in its `coco_url`.

    Where `path` is the same with folders, as COCO Annotator has it, that counts; so does the path in an address, and
    what follows `?d=` in one of Label Studio's local files.
    """
    entry = image if isinstance(image, dict) else {}
    texts = [entry[key] for key in ("file_name", "coco_url") if isinstance(entry.get(key), str) and entry[key].strip()]
    path = entry.get("path")
    if texts and isinstance(path, str) and path.endswith(f"/{texts[0]}"):
        texts = [path]
    texts = [re.sub(r".*/local-files/\?d=", "", text) for text in texts[:1]]
    return [urlsplit(text).path if "://" in text else text for text in texts]


def file_of(image: Any) -> str | None:
    """The file of an image with all its folders, which / parts; `None` where it has no name."""
    return next((tails[0] for name in names_of(image) if (tails := _tails(name))), None)


def _tails(name: str) -> list[str]:
    """A path and what is left of it without its first folder, its first two and so on; none with `..`, no drive."""
    parts = [part for part in re.split(r"[/\\]", re.sub("^[A-Za-z]:", "", name)) if part not in ("", ".")]
    return ["/".join(parts[start:]) for start in range(len(parts)) if ".." not in parts[start:]]


def _plain(path: str) -> str:
    """One spelling of a path that may be written in several."""
    return unicodedata.normalize("NFC", unquote(path))


class Photographs:
    """Finds the files of COCO images, in the folder itself or in `train2014/` and the like.

    Args:
        folder: of the images.
        allow_outside (`bool`, *optional*, defaults to `False`): read files outside of the folder as well.
        coco_ids (`bool`, *optional*, defaults to `False`): ids are those of COCO, which also name the files. Elsewhere
            an id says nothing about a name: the file called by it may be another photograph.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike, allow_outside: bool = False, coco_ids: bool = False):
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"images_dir: there is no folder {os.fspath(folder)!r}; give the one that holds the photographs (COCO "
                "train2014)."
            )
        self.folder, self.coco_ids = os.path.abspath(folder), coco_ids
        self.files = TrustedFolder(folder, allow_outside)
        self._paths: dict[Any, str | RowProblem] = {}
        self._whole: set[str] = set()
        self._claimed: Counter[str] = Counter()

    def claim(self, names: Iterable[list[str]]) -> None:
        """Note how all images are called: `a/x.jpg` may lie as `x.jpg`, unless there is `b/x.jpg` too."""
        self._whole = {_plain(tails[0]) for given in names for name in given if (tails := _tails(name))}
        self._claimed = Counter(tail for path in self._whole for tail in _tails(path))

    def path(self, image_id: int | str, size: tuple[int, int] | None, file_names: Collection[str]) -> str:
        """The image's file, which has the size that its annotations were made on.

        Args:
            image_id (`int` or `str`): names the file too where ids are COCO's.
            size (`tuple[int, int]`, *optional*): (height, width) in pixels, where it is stated.
            file_names (`Collection[str]`): as the annotations call it, with or without the folders in it.

        Raises:
            RowProblem: `"missing_image"`, `"ambiguous_file"`, `"outside_folder"`, `"unreadable_image"` or
                `"wrong_size"`.
        """
        return once(self._paths, image_id, lambda: self._find(image_id, size, file_names))

    def _find(self, image_id: int | str, size: tuple[int, int] | None, file_names: Collection[str]) -> str:
        implied = [os.path.join(self.folder, sub) for sub in SUBFOLDERS]
        names = self._names(image_id, file_names)
        path = self.files.find(names, [self.folder], implied)
        if path is not None and self._is_another(path, file_names):
            path = None
        if path is None and not names:
            raise RowProblem("missing_image", f"image {image_id} has no file_name, so its photograph is not known.")
        if path is None:
            shown = dict.fromkeys([*file_names, *(os.path.basename(name) for name in names)])
            raise RowProblem(
                "missing_image",
                f"there is no {' or '.join(list(shown)[:4])} in {self.folder!r} or its train2014/ and the like.",
            )
        actual = image_size(path)
        if size is not None and actual != tuple(size):
            raise RowProblem(
                "wrong_size", f"{path!r} is {actual} but its annotations are for {tuple(size)} (height, width)."
            )
        return path

    def _names(self, image_id: int | str, file_names: Collection[str]) -> list[str]:
        names = []
        for form in (form for name in file_names for form in spellings(name)):
            names += [form, *(tail for tail in _tails(form) if self._claimed[_plain(tail)] <= 1)]
        numbered = [match[1] for name in names if (match := _COCO_NAME.fullmatch(os.path.basename(name)))]
        if self.coco_ids:
            numbered.append(f"{image_id:012d}.jpg")
        others = [f"{start}{name}" for name in numbered for start in ("COCO_train2014_", "COCO_val2014_", "")]
        return list(dict.fromkeys([*names, *(name for name in others if not self._claimed[name])]))

    def _is_another(self, path: str, file_names: Collection[str]) -> bool:
        """Whether a file is what another image is called: `images/x.jpg` is not `x.jpg` where there are both."""
        relative = _plain(os.path.relpath(path, self.folder).replace(os.sep, "/"))
        own = {_plain(tails[0]) for name in file_names if (tails := _tails(name))}
        return relative in self._whole and relative not in own
