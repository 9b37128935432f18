# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO, from the files their authors published."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .build_report import BuildReport, RowProblem
from .coco_instances import CocoInstances, describe_folder, image_key, read_json
from .photographs import Photographs
from .rows import SampleIds, dataset_from_rows, kind_by_number, make_row, usable_rows
from .safe_pickle import load_plain_pickle
from .values import as_flag, as_whole

UNC = ("train", "val", "testA", "testB")
# Benchmark -> who split it -> splits.
SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    "refcoco": {"unc": UNC, "google": ("train", "val", "test")},
    "refcoco+": {"unc": UNC},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
    "grefcoco": {"unc": UNC},
}


def build_refcoco(
    root: str | os.PathLike,
    images_dir: str | os.PathLike,
    name: str = "refcoco",
    split_by: str = "unc",
    split: str = "train",
    exclude_images: Collection[Any] | None = None,
    report: BuildReport | None = None,
    allow_outside: bool = False,
) -> Any:
    """RefCOCO, RefCOCO+ or RefCOCOg in the row schema: one object per sample, every sentence a sample.

    `distractor_masks` are all other annotated objects of the image. The text is the benchmarks' `sent` (lower case).

    Args:
        root: Folder with `refs(unc).p` (or `google`, `umd`) and `instances.json`, or the one that holds it as
            `refcoco/`, `refcoco+/` or `refcocog/`.
        images_dir: COCO train2014 photographs, here or in `train2014/`, as `COCO_train2014_000000000009.jpg` or
            `000000000009.jpg`.
        name (`str`): `"refcoco"`, `"refcoco+"` or `"refcocog"`.
        split_by (`str`): `"unc"`; for RefCOCOg `"umd"` or `"google"`.
        split (`str`): `"train"`, `"val"`, and `"testA"` and `"testB"` (unc) or `"test"` (umd).
        exclude_images (`Collection`, *optional*): Ids or file names of images to leave out, see `eval_image_ids`.
        report (`BuildReport`, *optional*): Lists what could not be used.
        allow_outside (`bool`, *optional*, defaults to `False`): Use photographs outside of `images_dir` as well, where
            links or the annotations lead there.

    Returns:
        `datasets.Dataset`, memory-mapped, with images as paths.

    Raises:
        FileNotFoundError: A file or folder is not there; the message says what is.
        ValueError: There is no such split, a file is broken or a pickle unsafe, or no sample could be used.
    """
    if name == "grefcoco":
        raise ValueError("gRefCOCO has several objects per sample: use build_grefcoco.")
    return _build(name, root, images_dir, split_by, split, exclude_images, report, allow_outside)


def build_grefcoco(
    root: str | os.PathLike,
    images_dir: str | os.PathLike,
    split_by: str = "unc",
    split: str = "train",
    exclude_images: Collection[Any] | None = None,
    report: BuildReport | None = None,
    allow_outside: bool = False,
) -> Any:
    """gRefCOCO in the row schema: none, one or several objects per sample; `kind` is `none`, `single` or `multi`.

    Args: as [`build_refcoco`]; `root` holds `grefs(unc).json` and `instances.json`, or them in `grefcoco/`.
    """
    return _build("grefcoco", root, images_dir, split_by, split, exclude_images, report, allow_outside)


def _build(
    name: str,
    root: str | os.PathLike,
    images_dir: str | os.PathLike,
    split_by: str,
    split: str,
    exclude_images: Collection[Any] | None,
    report: BuildReport | None,
    allow_outside: bool,
) -> Any:
    report = BuildReport() if report is None else report
    photographs = Photographs(images_dir, allow_outside, coco_ids=True)
    samples = _Samples(name, root, photographs, split_by, split, exclude_images, report)
    rows = usable_rows(samples.sentences(), samples.row, report)
    return dataset_from_rows(rows, f"{name}-{split_by}-{split}", report)


def find_folder(root: str | os.PathLike, name: str) -> Path:
    """The folder of a benchmark: `root/name`, or `root` itself where that holds the files.

    Raises:
        FileNotFoundError: it is not there, with what `root` holds instead.
        ValueError: there is no such benchmark.
    """
    if name not in SPLITS:
        raise ValueError(f"there is no benchmark {name!r}; choose one of {', '.join(SPLITS)}.")
    root = Path(root)
    if (root / name).is_dir():
        return root / name
    if any((root / refs_file(name, split_by)).is_file() for split_by in SPLITS[name]):
        if root.name in SPLITS and root.name != name:
            raise FileNotFoundError(f"{str(root)!r} is the folder of {root.name}, not of {name}; give its parent.")
        return root
    files = " or ".join(refs_file(name, split_by) for split_by in SPLITS[name])
    raise FileNotFoundError(f"{name}: there is no {name}/ and no {files}: {describe_folder(root)}")


def refs_file(name: str, split_by: str) -> str:
    return f"grefs({split_by}).json" if name == "grefcoco" else f"refs({split_by}).p"


def read_refs(folder: Path, name: str, split_by: str, report: BuildReport) -> list[dict[str, Any]]:
    """The usable refs of all splits of a benchmark.

    Raises:
        FileNotFoundError, ValueError: the file is not there, broken, unsafe or of another format.
    """
    path = folder / refs_file(name, split_by)
    if path.suffix == ".json" or not path.is_file():
        refs = read_json(path, report)
    else:
        try:
            refs = load_plain_pickle(path)
        except ValueError as error:
            report.add("bad_pickle", path.name, str(error), lost=False)
            raise
    if not isinstance(refs, list):
        report.add("bad_annotation", path.name, f"holds a {type(refs).__name__}", lost=False)
        raise ValueError(f"{str(path)!r} holds a {type(refs).__name__}; expected a list of refs.")
    usable = []
    for index, ref in enumerate(refs):
        keys = ("ref_id", "image_id", "ann_id", "split", "sentences")
        lacking = [key for key in keys if not isinstance(ref, dict) or key not in ref]
        types = {"sentences": list, "split": str}
        image_id = None if lacking else as_whole(ref["image_id"])
        if image_id is None or not all(isinstance(ref[key], kind) for key, kind in types.items()):
            detail = f"lacks {', '.join(lacking)}" if lacking else "has a split, image_id or sentences of another type"
            report.add("bad_annotation", f"{path.name} ref at {index}", detail)
        else:
            usable.append(ref | {"image_id": image_id})
    return usable


class _Samples:
    """Every sentence of one split as a row, in the order of the file."""

    def __init__(
        self,
        name: str,
        root: str | os.PathLike,
        photographs: Photographs,
        split_by: str,
        split: str,
        exclude_images: Collection[Any] | None,
        report: BuildReport,
    ):
        folder = find_folder(root, name)
        if split_by not in SPLITS[name]:
            raise ValueError(f"{name} is split by {' or '.join(SPLITS[name])}, not by {split_by!r}.")
        if split not in SPLITS[name][split_by]:
            raise ValueError(f"{name} ({split_by}) has the splits {', '.join(SPLITS[name][split_by])}, not {split!r}.")
        if isinstance(exclude_images, str):
            raise ValueError(f"exclude_images is the text {exclude_images!r}; expected a collection of image ids.")
        self.name, self.split_by, self.split, self.report = name, split_by, split, report
        self.excluded = {image_key(image) for image in exclude_images or ()}
        refs = read_refs(folder, name, split_by, report)
        self.refs = [ref for ref in refs if ref["split"] == split]
        if not self.refs:
            found = ", ".join(f"{key} ({count})" for key, count in Counter(ref["split"] for ref in refs).items())
            path = str(folder / refs_file(name, split_by))
            raise ValueError(f"{path!r} has no refs of split {split!r}; it has {found or 'none'}.")
        wanted = {str(ref["image_id"]) for ref in self.refs} - self.excluded
        self.instances = CocoInstances(folder / "instances.json", report, photographs, wanted)
        self.ids = SampleIds(report)

    def sentences(self) -> Iterator[tuple[str, Any]]:
        """Sample id, and the sentence with what it shares with the other ones of its ref."""
        for ref in self.refs:
            if str(ref["image_id"]) in self.excluded:
                self.report.left_out["excluded images"] += len(ref["sentences"])
                continue
            stem = f"{self.name}-{self.split_by}-{self.split}-{ref['ref_id']}"
            if not ref["sentences"]:
                self.report.add("empty_text", stem, "the ref has no sentence.", lost=False)
            try:
                fields: dict[str, Any] | RowProblem = self._fields(ref, stem)
            except RowProblem as problem:
                fields = problem
            for position, sentence in enumerate(ref["sentences"]):
                number = sentence.get("sent_id", position) if isinstance(sentence, dict) else position
                sample_id = f"{stem}-{number}"
                yield sample_id, fields if isinstance(fields, RowProblem) else (sample_id, sentence, fields)

    def row(self, entry: tuple[str, Any, dict[str, Any]]) -> dict[str, Any]:
        """The row of a sentence."""
        sample_id, sentence, fields = entry
        text = _text(sentence)
        sample_id = self.ids.unique(sample_id, (text, fields["image_id"], fields["instance_ids"]))
        return make_row(instruction=text, sample_id=sample_id, **fields)

    def _fields(self, ref: dict[str, Any], stem: str) -> dict[str, Any]:
        """The columns that all sentences of a ref share."""
        image_id, targets = ref["image_id"], self._targets(ref, stem)
        return {
            "image": self.instances.photograph(image_id),
            "masks": [self.instances.rle(number, image_id) for number in targets],
            "distractor_masks": self.instances.others(image_id, targets),
            "instance_ids": targets,
            "image_id": str(image_id),
            "source": self.name,
            "split": self.split,
            "kind": kind_by_number(len(targets)),
        }

    def _targets(self, ref: dict[str, Any], stem: str) -> list[int]:
        given, flag = ref["ann_id"], as_flag(ref.get("no_target"), "no_target")
        numbers = given if self.name == "grefcoco" and isinstance(given, list) else [given]
        numbers = [as_whole(number) for number in numbers]
        if not all(number is not None and -1 <= number < 2**63 for number in numbers):
            raise RowProblem("bad_annotation", f"ann_id is {given!r:.60}; expected annotation ids.")
        none = self.name == "grefcoco" and (numbers == [-1] or (not numbers and flag))
        if none:
            return []
        if flag or not numbers or -1 in numbers:
            raise RowProblem("bad_annotation", f"ann_id {given!r:.60} and no_target {flag!r} contradict each other.")
        targets = list(dict.fromkeys(numbers))
        if len(targets) < len(numbers):
            self.report.add("duplicate_id", stem, f"ann_id {given!r:.60} repeats an object, used once", lost=False)
        return targets


def _text(sentence: Any) -> str:
    """The sentence as the benchmarks evaluate it."""
    if not isinstance(sentence, dict):
        raise RowProblem("bad_annotation", f"the sentence is {sentence!r:.60}; expected a dict.")
    text = sentence.get("sent") or sentence.get("raw")
    if not isinstance(text, str) or not text.strip():
        raise RowProblem("empty_text", f"the sentence is {text!r}.")
    return text.strip()
