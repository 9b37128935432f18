# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks held to guardrails: which of them show a forbidden concept, or lack a required one."""

from collections.abc import Sequence
from typing import Any

import torch

# Share of a mask's image tokens on which a concept has to fire so that the mask shows it. Measured on Scenes: masks of
# objects that have a colour reach 0.5 and more, masks of others 0.2 at most (their neighbours' edges).
SHOWN_SHARE = 0.3


def judge_masks(
    coverage: torch.Tensor, firing: torch.Tensor, rules: Sequence[Any], slots: Sequence[int]
) -> tuple[list[bool], list[dict[str, Any]]]:
    """Which masks the rules let pass, and what was done about the others.

    A mask shows a concept where it fires on at least `SHOWN_SHARE` of the mask's image tokens, each counted by how
    much of it the mask covers. A mask on no image token shows nothing.

    Args:
        coverage (`torch.Tensor` of shape `(num_masks, num_patches)`): See [`PatchCoverage`].
        firing (`torch.Tensor` of shape `(R, num_patches)`): Where the concept of each rule fires.
        rules (`Sequence[Guardrail]`): R of them, of the segmentation output.
        slots (`Sequence[int]`): Of the masks.

    Returns:
        `tuple`: per mask whether it stays; and the log, one entry per mask and rule that it broke and one per required
        concept that no mask is left of: `rule`, `concept`, `slot` (`None` in the latter), `share` of the mask that
        shows the concept, in [0, 1] (`None` likewise), and the `reason`, a sentence.
    """
    shares = coverage @ firing.to(coverage.dtype).T / coverage.sum(1, keepdim=True).clamp(min=1e-6)  # (num_masks, R)
    stays, log = [True] * len(slots), []
    for place, (slot, row) in enumerate(zip(slots, shares.tolist(), strict=True)):
        for rail, share in zip(rules, row, strict=True):
            if (share >= SHOWN_SHARE) == (rail.rule == "forbid"):
                stays[place] = False
                log.append(_entry(rail, slot, share))
    if not any(stays):
        log += [_entry(rail, None, None) for rail in rules if rail.rule == "require"]
    return stays, log


def _entry(rail: Any, slot: int | None, share: float | None) -> dict[str, Any]:
    name = rail.concept.name
    if slot is None:
        reason = f"{name!r} is required, and no mask is left that shows it."
    else:
        held = "shows {}, which is forbidden" if rail.rule == "forbid" else "does not show {}, which is required"
        reason = (
            f"the mask of slot {slot} {held.format(repr(name))}: it fires on {share:.0%} of the mask's image tokens, "
            f"and {SHOWN_SHARE:.0%} show it."
        )
    return {"rule": rail.rule, "concept": name, "slot": slot, "share": share, "reason": reason}


__all__ = ["judge_masks"]
