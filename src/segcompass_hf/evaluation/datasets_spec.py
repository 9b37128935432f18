# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets named in one word of a command line.

A specification is a kind and its arguments with colons between them, or a path or Hub id of a data set in the row
schema; `describe_known()` lists them. Folders whose names hold a colon need the builders of `segcompass_hf.data`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.builders.build_report import BuildReport
from ..data.datasets_cache import named_cache
from ..data.parquet_sizes import check_parquet

SCENES_SAMPLES = 500  # of a split of Scenes, which has no end of its own
MAX_LISTED_PROBLEMS = 100


class DatasetSpecError(ValueError):
    """A specification that names no data set."""


@dataclass
class NamedDataset:
    """A data set that a specification names.

    Args:
        dataset (`datasets.Dataset`): In the row schema.
        name (`str`): For reports, without folders: `refcoco unc testA`.
        kind (`str`): What model cards call its type: the kind, or a Hub id.
        split (`str`, *optional*): Of it.
        report (`BuildReport`, *optional*): What its builder could not use.
    """

    dataset: Any
    name: str
    kind: str
    split: str | None = None
    report: BuildReport | None = None

    def notes(self) -> dict[str, Any]:
        """What an evaluation's summary says about the data: type, split, and rows that were lost in building."""
        notes: dict[str, Any] = {"dataset_type": self.kind, "dataset_split": self.split}
        if self.report is not None:
            built = self.report.to_dict()
            notes["build"] = built | {"problems": built["problems"][:MAX_LISTED_PROBLEMS]}
        return notes


def load_dataset_of(spec: str, num_samples: int | None = None, allow_outside: bool = False) -> NamedDataset:
    """Build or load what a specification names.

    Args:
        spec (`str`): Such as `"scenes:val"`; see `describe_known`.
        num_samples (`int`, *optional*): How many rows are wanted. Only Scenes needs to know; others are whole.
        allow_outside (`bool`, *optional*, defaults to `False`): Read files outside of the data set's folder as well,
            where its annotations, paths in its rows or links lead there.

    Raises:
        DatasetSpecError: it is not known, or has too few or too many arguments; with what is known.
        FileNotFoundError, ValueError: whatever its builder raises.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in _KINDS:
        if not _is_path_or_id(spec):
            raise DatasetSpecError(f"there is no data set {spec!r}. Known are: {describe_known('; ')}.")
        return _stored(spec, allow_outside)
    loader, usage = _KINDS[kind]
    arguments = rest.split(":") if colon else []
    places = list(inspect.signature(loader).parameters.values())[3:]
    needed = sum(place.default is inspect.Parameter.empty for place in places)
    if not needed <= len(arguments) <= len(places) or not all(arguments[:needed]):
        raise DatasetSpecError(f"{spec!r} has {len(arguments)} arguments; expected {usage}.")
    return loader(kind, num_samples, allow_outside, *arguments)


def describe_known(separator: str = "\n") -> str:
    """The forms of a specification."""
    return separator.join(dict.fromkeys([*(usage for _, usage in _KINDS.values()), *_STORED_USAGES]))


def _scenes(kind: str, num_samples: int | None, _: bool, split: str, seed: str = "0") -> NamedDataset:
    from ..data import scenes

    if split not in scenes.SPLITS:
        raise DatasetSpecError(f"Scenes has no split {split!r}; choose one of {', '.join(scenes.SPLITS)}.")
    if not seed.isdigit():
        raise DatasetSpecError(f"the seed of Scenes is {seed!r}; expected a number.")
    name = f"scenes {split}" + ("" if seed == "0" else f" seed {seed}")
    return NamedDataset(scenes.build(split, num_samples or SCENES_SAMPLES, int(seed)), name, kind, split)


def _refcoco(
    kind: str, _: int | None, out: bool, root: str, images: str, split: str, split_by: str = ""
) -> NamedDataset:
    from ..data.builders.refer import build_refcoco

    split_by, report = split_by or ("umd" if kind == "refcocog" else "unc"), BuildReport()
    dataset = build_refcoco(root, images, kind, split_by, split, report=report, allow_outside=out)
    return NamedDataset(dataset, f"{kind} {split_by} {split}", kind, split, report)


def _grefcoco(
    kind: str, _: int | None, out: bool, root: str, images: str, split: str, split_by: str = "unc"
) -> NamedDataset:
    from ..data.builders.refer import build_grefcoco

    report = BuildReport()
    dataset = build_grefcoco(root, images, split_by, split, report=report, allow_outside=out)
    return NamedDataset(dataset, f"{kind} {split_by} {split}", kind, split, report)


def _reasonseg(kind: str, _: int | None, out: bool, root: str, split: str = "test") -> NamedDataset:
    from ..data.builders.reasonseg import build_reasonseg

    report = BuildReport()
    dataset = build_reasonseg(root, split, report=report, allow_outside=out)
    return NamedDataset(dataset, f"{kind} {split}", kind, split, report)


def _hosted(kind: str, _: int | None, out: bool, path_or_id: str, split: str = "test") -> NamedDataset:
    from ..data.builders.hosted import from_hosted_reasonseg

    report = BuildReport()
    dataset = from_hosted_reasonseg(path_or_id, split, report=report, allow_outside=out)
    name = Path(path_or_id).name
    return NamedDataset(dataset, f"{name} {split}", name if os.path.exists(path_or_id) else path_or_id, split, report)


def _folder(kind: str, _: int | None, out: bool, root: str, annotations: str = "", split: str = "") -> NamedDataset:
    from ..data.builders.folder import build_folder

    report = BuildReport()
    dataset = build_folder(root, annotations or None, split or "test", report, allow_outside=out)
    return NamedDataset(dataset, f"{Path(os.path.realpath(root)).name} {split}".strip(), kind, split or None, report)


def _coco(kind: str, _: int | None, out: bool, annotations: str, images: str) -> NamedDataset:
    from ..data.builders.coco import build_coco

    report = BuildReport()
    dataset = build_coco(annotations, images, report=report, allow_outside=out)
    return NamedDataset(dataset, Path(annotations).stem, kind, None, report)


def _labelme(kind: str, _: int | None, out: bool, root: str) -> NamedDataset:
    from ..data.builders.labelme import build_labelme

    report = BuildReport()
    dataset = build_labelme(root, report=report, allow_outside=out)
    return NamedDataset(dataset, Path(os.path.realpath(root)).name, kind, None, report)


def _yolo(kind: str, _: int | None, out: bool, data: str, split: str) -> NamedDataset:
    from ..data.builders.yolo import build_yolo

    report = BuildReport()
    dataset = build_yolo(data, split=split, report=report, allow_outside=out)
    return NamedDataset(dataset, f"{Path(os.path.realpath(data)).parent.name} {split}", kind, split, report)


_REFER_USAGE = "refcoco|refcoco+|refcocog|grefcoco:ROOT:IMAGES:SPLIT[:SPLIT_BY]"
_KINDS: dict[str, tuple[Callable[..., NamedDataset], str]] = {
    "scenes": (_scenes, "scenes:SPLIT[:SEED]"),
    "refcoco": (_refcoco, _REFER_USAGE),
    "refcoco+": (_refcoco, _REFER_USAGE),
    "refcocog": (_refcoco, _REFER_USAGE),
    "grefcoco": (_grefcoco, _REFER_USAGE),
    "reasonseg": (_reasonseg, "reasonseg:ROOT[:SPLIT]"),
    "hosted": (_hosted, "hosted:PARQUET_OR_ID[:SPLIT]"),
    "folder": (_folder, "folder:ROOT[:ANNOTATIONS[:SPLIT]]"),
    "coco": (_coco, "coco:ANNOTATIONS:IMAGES"),
    "labelme": (_labelme, "labelme:ROOT"),
    "yolo": (_yolo, "yolo:DATA.yaml:SPLIT"),
}
_STORED_USAGES = ("FILE.parquet", "FOLDER[:SPLIT]", "OWNER/NAME[:SPLIT]")


def _is_path_or_id(spec: str) -> bool:
    path = spec.partition(":")[0]
    return os.path.exists(path) or re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None


def _stored(spec: str, allow_outside: bool) -> NamedDataset:
    """A data set in the row schema, from a disk or the Hub."""
    import datasets

    from ..data.builders.stored import rows_inside

    path, _, split = spec.partition(":")
    try:
        loaded = _load_stored(path)
    except datasets.exceptions.DatasetGenerationError as error:  # which hides what it met
        reason = " ".join(str(error.__cause__ or error).split())
        raise DatasetSpecError(f"{path!r} cannot be read ({reason}); is a file damaged?") from error
    except (OSError, DatasetSpecError):
        raise
    except Exception as error:  # damaged files raise about anything, from KeyError to NotImplementedError
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DatasetSpecError(f"{path!r} cannot be read ({reason}); is a file damaged?") from error
    if isinstance(loaded, dict):
        if not split and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            wanted = f"there is no split {split!r} in" if split else "name a split of"
            raise DatasetSpecError(f"{wanted} {path!r}: {', '.join(f'{path}:{name}' for name in loaded)}.")
        loaded = loaded[split]
    report = BuildReport()
    if not allow_outside:
        loaded = rows_inside(loaded, _own_folders(path), report)
    name = Path(os.path.realpath(path)).name if os.path.exists(path) else path
    return NamedDataset(loaded, f"{name} {split}".strip(), name, split or None, report if report.problems else None)


def _own_folders(path: str) -> list[str]:
    """Where the files of a data set lie: its folder, or what the caches hold of it where it is of the Hub."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    if os.path.exists(path):
        return [path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))]
    repository = os.path.join(HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}")
    return [repository, str(datasets.config.DOWNLOADED_DATASETS_PATH)]


@named_cache()
def _load_stored(path: str) -> Any:
    import datasets

    if os.path.isfile(path):
        if not path.endswith(".parquet"):
            raise DatasetSpecError(f"{path!r} is a file but no .parquet file. Known are: {describe_known('; ')}.")
        check_parquet(path, repr(path))
        return datasets.load_dataset("parquet", data_files=path, split="train")
    if os.path.isfile(os.path.join(path, "state.json")) or os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return datasets.load_from_disk(path)
    for file in sorted(Path(path).rglob("*.parquet")) if os.path.isdir(path) else ():
        check_parquet(file, repr(str(file)))
    return datasets.load_dataset(path)
