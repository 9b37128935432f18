# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a data set's card says of a split, counted while its rows pass by."""

from __future__ import annotations

from collections import Counter
from typing import Any


class SplitStatistics:
    """Counts of one split.

    `images` maps the digest of every distinct image to its (height, width); `objects` counts samples by the number of
    objects meant; `kinds` and `sources` count samples by these columns; `bytes_in_memory` and `bytes_on_disk` are the
    rows' size as Arrow tables and as Parquet files.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.images: dict[bytes, tuple[int, int]] = {}
        self.objects: Counter[int] = Counter()
        self.kinds: Counter[str | None] = Counter()
        self.sources: Counter[str | None] = Counter()
        self.num_reasoning = 0  # instructions that need reasoning
        self.num_with_reasoning = 0  # rows with a reference chain of thought
        self.num_with_distractors = 0  # rows whose other objects are known
        self.num_with_ignore = 0
        self.num_shards = 0
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0

    def add(self, row: dict[str, Any], digest: bytes, size: tuple[int, int]) -> None:
        """Count a row whose image has this digest and (height, width)."""
        self.num_rows += 1
        self.images[digest] = size
        self.objects[len(row["masks"])] += 1
        self.kinds[row["kind"]] += 1
        self.sources[row["source"]] += 1
        self.num_reasoning += bool(row["is_reasoning"])
        self.num_with_reasoning += row["reasoning"] is not None
        self.num_with_distractors += row["distractor_masks"] is not None
        self.num_with_ignore += row["ignore"] is not None

    @property
    def no_target_share(self) -> float:
        """Share of the samples that mean no object, in [0, 1]."""
        return self.objects[0] / self.num_rows

    @property
    def image_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the image with the fewest and of the one with the most pixels."""
        ordered = sorted(self.images.values(), key=lambda size: (size[0] * size[1], size))
        return ordered[0], ordered[-1]

    def to_dict(self) -> dict[str, Any]:
        """Counts alone, for json."""
        return {
            "samples": self.num_rows,
            "images": len(self.images),
            "no_target": self.objects[0],
            "objects_per_sample": {str(number): count for number, count in sorted(self.objects.items())},
            "kinds": _named(self.kinds),
            "sources": _named(self.sources),
            "shards": self.num_shards,
            "bytes": self.bytes_on_disk,
        }


def shared_images(splits: dict[str, SplitStatistics]) -> dict[tuple[str, str], int]:
    """Number of images that two splits both have, for every pair that shares any: their train and test leak."""
    names = list(splits)
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    counts = {(one, other): len(splits[one].images.keys() & splits[other].images.keys()) for one, other in pairs}
    return {pair: count for pair, count in counts.items() if count}


def _named(counts: Counter[str | None]) -> dict[str, int]:
    return {name if name is not None else "(none)": count for name, count in counts.most_common()}
