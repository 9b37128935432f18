# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Dataset cards: counts, columns, problems and licences of a data set in the row schema."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..builders.build_report import BuildReport
from ..schema import row_features
from .statistics import SplitStatistics, shared_images

TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
TAGS = ("reasoning-segmentation", "referring-expression-segmentation", "segcompass")
SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
MOST_OBJECTS = 5  # columns of the table of objects per sample; the last is "or more"
MOST_KINDS = 20  # lines of the table of kinds

COLUMNS = {
    "image": "the image, as in its file",
    "instruction": "what is asked for, in words",
    "masks": "one COCO RLE `{size: [height, width], counts}` per object meant; empty where nothing in the image is",
    "distractor_masks": "other objects of the image whose masks are known; null where they are not known",
    "ignore": "pixels that metrics leave out; null where there are none",
    "instance_ids": "a number per mask, the source's own where it has them",
    "sample_id": "name of the sample",
    "image_id": "name of the image in its source",
    "source": "benchmark or folder that the sample comes from",
    "split": "split of the source that the sample comes from",
    "kind": "kind of instruction",
    "is_reasoning": "whether the instruction needs reasoning rather than names what is meant",
    "reasoning": "a reference chain of thought",
}

_COCO_IMAGES = (
    "masks: COCO annotations, CC BY 4.0; photographs: COCO 2014, which come from Flickr under the licence that each "
    "photographer chose, some of them for non-commercial use only"
)
_REFER = "expressions: the README of their authors' repository (lichengunc/refer) states no licence; " + _COCO_IMAGES
# Source -> (licence identifier where there is one for all of it, statement).
KNOWN_LICENCES: dict[str, tuple[str | None, str]] = {
    "scenes": ("apache-2.0", "drawn and worded by segcompass_hf, Apache License 2.0, no outside material"),
    "refcoco": (None, _REFER),
    "refcoco+": (None, _REFER),
    "refcocog": (None, _REFER),
    "grefcoco": (
        None,
        "expressions: the README of their authors' repository (henghuiding/gRefCOCO) states no licence; "
        + _COCO_IMAGES,
    ),
    "reasonseg": (
        None,
        "instructions and masks: the README of their authors' repository (dvlab-research/LISA) states no licence for "
        "the data; photographs: OpenImages and ScanNet v2, under the terms of these, of which ScanNet's allow "
        "non-commercial research and education only",
    ),
}
_NOT_KNOWN = "no licence is known to the builder; whoever publishes this has to state one"


def render_card(
    name: str,
    statistics: Mapping[str, SplitStatistics],
    reports: Mapping[str, BuildReport],
    license: str | None = None,
    origins: Sequence[str] = (),
    figure: str | None = None,
    version: str = "",
) -> str:
    """The README of a data set.

    Args:
        name (`str`): Title.
        statistics (`Mapping[str, SplitStatistics]`): By split.
        reports (`Mapping[str, BuildReport]`): By split.
        license (`str`, *optional*): A Hub identifier such as `"cc-by-4.0"`, or the text of a licence, which then
            stands in `LICENSE`. Without it the licences of the sources are stated as far as they are known.
        origins (`Sequence[str]`): What it was built from, without folders.
        figure (`str`, *optional*): Name of the sample figure in the same folder.
        version (`str`): Of this package.

    Returns:
        `str`: Markdown with a YAML header.
    """
    from huggingface_hub import DatasetCard

    sources = sum((split.sources for split in statistics.values()), Counter())
    num_rows = sum(split.num_rows for split in statistics.values())
    num_images = len(set().union(*(split.images for split in statistics.values())))
    card = DatasetCard.from_template(
        _header(name, statistics, sources, license),
        template_path=str(TEMPLATE),
        name=_cell(name),
        totals=f"{_plural(num_rows, 'sample')} on {_plural(num_images, 'image')}",
        figure=figure,
        first_split=next(iter(statistics)),
        contents=_contents(statistics),
        objects=_objects(statistics),
        kinds=_by_split(statistics, "kinds", "kind"),
        sources=_by_split(statistics, "sources", "source"),
        shared=_shared(statistics),
        columns=_columns(),
        problems=_problems(reports),
        licence=_licence(sources, license),
        version=version,
        origins=f" from {', '.join(origins)}" if origins else "",
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def is_license_id(license: str) -> bool:
    """Whether this is a licence's identifier rather than its text."""
    return re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license) is not None


def _header(name: str, statistics: Mapping[str, SplitStatistics], sources: Counter, license: str | None) -> Any:
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    num_rows = sum(split.num_rows for split in statistics.values())
    data = DatasetCardData(
        pretty_name=name,
        language="en" if set(sources) <= set(KNOWN_LICENCES) else None,
        task_categories=["image-segmentation"],
        size_categories=[next((word for limit, word in SIZE_CATEGORIES if num_rows < limit), "1M<n<10M")],
        tags=list(TAGS),
        **_license_fields(sources, license),
    )
    splits = SplitDict()
    for split, counted in statistics.items():
        splits.add(SplitInfo(split, num_bytes=counted.bytes_in_memory, num_examples=counted.num_rows))
    info = DatasetInfo(
        features=row_features(),
        splits=splits,
        download_size=sum(split.bytes_on_disk for split in statistics.values()),
        dataset_size=sum(split.bytes_in_memory for split in statistics.values()),
    )
    files = [{"split": split, "path": f"data/{split}-*"} for split in statistics]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(data)
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def _license_fields(sources: Counter, license: str | None) -> dict[str, str]:
    if license is not None:
        if is_license_id(license):
            return {"license": license}
        return {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    known = {KNOWN_LICENCES.get(source, (None, ""))[0] for source in sources}
    if len(known) == 1 and None not in known:
        return {"license": known.pop()}
    return {"license": "other" if set(sources) <= set(KNOWN_LICENCES) else "unknown"}


def _licence(sources: Counter, license: str | None) -> str:
    lines = []
    if license is not None and is_license_id(license):
        lines = [f"Stated by who built it: `{license}`. What is known of its sources:", ""]
    elif license is not None:
        lines = ["Stated by who built it, in [LICENSE](LICENSE). What is known of its sources:", ""]
    for source in sources:
        lines.append(f"- {_cell(source)}: {KNOWN_LICENCES.get(source, (None, _NOT_KNOWN))[1]}.")
    return "\n".join(lines)


def _contents(statistics: Mapping[str, SplitStatistics]) -> str:
    lines = []
    for split, counted in statistics.items():
        smallest, largest = (f"{height} x {width}" for height, width in counted.image_sizes)
        sizes = smallest if smallest == largest else f"{smallest} to {largest}"
        share = f"{counted.objects[0]:,} ({counted.no_target_share:.1%})"
        cells = [split, counted.num_rows, len(counted.images), sizes, share, counted.num_reasoning]
        cells += [counted.num_with_reasoning, counted.num_with_distractors, counted.num_with_ignore]
        lines.append([*cells, f"{counted.bytes_on_disk / 1e6:,.1f}"])
    head = ["split", "samples", "images", "height x width", "no target", "need reasoning", "with reference reasoning"]
    return _table([*head, "other objects known", "with ignored pixels", "MB"], lines)


def _objects(statistics: Mapping[str, SplitStatistics]) -> str:
    lines = []
    for split, counted in statistics.items():
        cells = [counted.objects[number] for number in range(MOST_OBJECTS)]
        lines.append([split, *cells, sum(counted.objects.values()) - sum(cells)])
    return _table(["split", *range(MOST_OBJECTS), f"{MOST_OBJECTS} or more"], lines)


def _by_split(statistics: Mapping[str, SplitStatistics], counted: str, title: str) -> str:
    """Counts by kind or source; nothing where no row has one."""
    columns = [getattr(split, counted) for split in statistics.values()]
    totals = sum(columns, Counter())
    if set(totals) == {None}:
        return ""
    names = [name for name, _ in totals.most_common(MOST_KINDS)]
    lines = [[_cell(name), *(column[name] for column in columns)] for name in names]
    if len(totals) > len(names):
        others = [sum(column.values()) - sum(column[name] for name in names) for column in columns]
        lines.append([f"{len(totals) - len(names)} others", *others])
    return _table([title, *statistics], lines)


def _shared(statistics: Mapping[str, SplitStatistics]) -> str:
    pairs = shared_images(dict(statistics))
    if not pairs:
        return "No two splits share an image." if len(statistics) > 1 else ""
    listed = ", ".join(f"{one} and {other} {count:,}" for (one, other), count in pairs.items())
    return f"**Images that two splits share:** {listed}. What is trained on one must not be evaluated on the other."


def _columns() -> str:
    lines = []
    for name, feature in row_features().items():
        kind = type(feature).__name__ if not hasattr(feature, "dtype") else feature.dtype
        if name in ("masks", "distractor_masks"):
            kind = "list of RLE"
        elif name in ("instance_ids", "ignore"):
            kind = {"instance_ids": "list of int64", "ignore": "RLE"}[name]
        kind = "image" if name == "image" else kind
        lines.append([f"`{name}`", kind, COLUMNS[name]])
    return _table(["column", "type", "meaning"], lines)


def _problems(reports: Mapping[str, BuildReport]) -> str:
    lines = []
    for split, report in reports.items():
        parts = [f"{number:,} left out on purpose ({why})" for why, number in report.left_out.items()]
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in report.counts.items())
        parts += [f"{report.num_lost:,} lost; problems: {kinds}"] if report.problems else ["no problems"]
        lines.append(f"- {split}: {report.num_rows:,} kept, {', '.join(parts)}.")
    return "\n".join([*lines, "", "Each problem with its sample is listed in `build_report.json`."])


def _table(head: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, lines)])


def _cell(text: str | None) -> str:
    """A name of the user's own, as a cell of a table."""
    if text is None:
        return "(none)"
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split())) or "(empty)"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)
