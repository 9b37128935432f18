# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""All objects of a row that its data set knows, as low-resolution masks beside those that a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...data.schema import decode_masks

HALF = 0.5 + 1e-6  # of a cell, and a little: more than half


def known_objects(rows: Sequence[dict[str, Any]], processor: Any, device: torch.device) -> list[dict[str, Any]]:
    """What `object_reward` reads of rows; rows with the same masks share their tensors.

    Args:
        rows (`Sequence[dict]`): In the row schema; `distractor_masks` may be missing or null.
        processor ([`SegCompassProcessor`]): Whose geometry the masks follow.
        device (`torch.device`): Where the tensors go.

    Returns:
        `list[dict]`: Per row `object_masks` `(num_objects, map_size, map_size)` bool, all targets (also those beyond
        the number of slots) and then the others; `num_targets`; `others_known`.
    """
    seen: dict[tuple, dict[str, Any]] = {}
    columns = []
    for row in rows:
        others = row.get("distractor_masks")
        rles = [*row["masks"], *(others or [])]
        key = (repr(rles), len(row["masks"]), others is None)
        if key not in seen:
            masks = decode_masks(rles, tuple(rles[0]["size"]) if rles else (1, 1))
            shares = processor.geometry.soft_mask_targets(torch.from_numpy(masks))
            fullest = shares.flatten(1).amax(1) if len(shares) else shares.new_zeros(0)
            # An object that fills half of no cell is in those that it fills most.
            least = fullest.clamp(min=1e-6, max=HALF)[:, None, None]
            seen[key] = {
                "object_masks": (shares >= least).to(device),
                "num_targets": len(row["masks"]),
                "others_known": others is not None,
            }
        columns.append(seen[key])
    return columns


__all__ = ["known_objects"]
