# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether an answer chose the right objects, and how often several samples of a prompt do.

An answer is a set of objects, whatever its masks look like: a fact without noise, which rewards, pass rates and
guidance share.
"""

from __future__ import annotations

from collections.abc import Collection
from math import comb

import numpy as np

from .selection import shown_objects


def chosen_objects(
    masks: np.ndarray, targets: np.ndarray, others: np.ndarray | None = None, ignore: np.ndarray | None = None
) -> frozenset[int]:
    """The objects that an answer chose.

    Where the other objects of the image are known, each mask chose the objects whose union fits it best
    ([`shown_objects`]). Where they are not, it chose the targets that fit it best if more than half of it lies on
    targets. A mask that chose no known object chose something else; a mask without a pixel chose nothing.

    Args:
        masks (`np.ndarray` of shape `(num_masks, height, width)`): bool, the answer.
        targets (`np.ndarray` of shape `(num_targets, height, width)`): bool, the objects asked for.
        others (`np.ndarray` of shape `(num_others, height, width)`, *optional*): bool, all other known objects.
        ignore (`np.ndarray` of shape `(height, width)`, *optional*): bool, pixels left out.

    Returns:
        `frozenset[int]`: Numbers of targets, then of others; something else is -1, -2, and so on, one for each mask.

    Example:
        >>> targets = np.array([[[1, 1, 0, 0, 0, 0]]], dtype=bool)
        >>> masks = np.array([[[1, 0, 0, 0, 0, 0]], [[0, 1, 1, 1, 0, 0]]], dtype=bool)
        >>> sorted(chosen_objects(masks, targets))  # a third of the second mask lies on the target
        [-1, 0]
        >>> sorted(chosen_objects(masks, targets, others=np.array([[[0, 0, 0, 1, 1, 1]]], dtype=bool)))
        [0, 1]
    """
    if ignore is not None:
        masks, targets = masks & ~ignore, targets & ~ignore
        others = None if others is None else others & ~ignore
    objects = targets if others is None else np.concatenate([targets, others])
    chosen: set[int] = set()
    for mask in masks:
        size = np.count_nonzero(mask)
        if not size:
            continue
        if others is None and 2 * np.count_nonzero(mask & targets.any(axis=0)) <= size:
            shown = []
        else:
            shown = shown_objects(mask, objects)
        chosen.update(shown or [min([0, *chosen]) - 1])
    return frozenset(chosen)


def is_right_choice(chosen: Collection[int], num_targets: int) -> bool:
    """Whether an answer chose all targets and nothing else; of no target: nothing at all."""
    return set(chosen) == set(range(num_targets))


def choice_f1(chosen: Collection[int], num_targets: int) -> float:
    """F1 of the chosen objects and the targets: `2 * both / (chosen + targets)`, 1 without either.

    Example:
        >>> choice_f1({0, 2}, num_targets=2)  # one of two, and one that was not asked for
        0.5
    """
    right = sum(0 <= number < num_targets for number in chosen)
    return 2 * right / (len(chosen) + num_targets) if chosen or num_targets else 1.0


def pass_at_k(num_right: int, num_samples: int, k: int) -> float:
    """Chance that at least one of `k` samples is right, without bias from `num_samples` of them.

    `1 - C(n - c, k) / C(n, k)` (Chen et al. 2021, arXiv 2107.03374): the share of the ways to draw k of n samples that
    hold one of the c right ones.

    Args:
        num_right (`int`): c, of the samples.
        num_samples (`int`): n, `k` or more.
        k (`int`): 1 or more.

    Raises:
        ValueError: The numbers do not fit each other.

    Example:
        >>> pass_at_k(1, 4, 1), pass_at_k(1, 4, 2)
        (0.25, 0.5)
    """
    _check_counts(num_right, num_samples, k)
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def mixed_at_k(num_right: int, num_samples: int, k: int) -> float:
    """Chance that `k` samples hold right and wrong ones: where rewards tell answers of one group apart.

    Arguments and errors as of [`pass_at_k`].

    Example:
        >>> mixed_at_k(1, 4, 1), mixed_at_k(1, 4, 2)
        (0.0, 0.5)
    """
    _check_counts(num_right, num_samples, k)
    alike = comb(num_samples - num_right, k) + comb(num_right, k)
    return 1 - alike / comb(num_samples, k)


def _check_counts(num_right: int, num_samples: int, k: int) -> None:
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"got {num_right} right of {num_samples} samples and k={k}; expected 0 <= right <= samples and "
            "1 <= k <= samples: draw at least k samples of every prompt."
        )


__all__ = ["choice_f1", "chosen_objects", "is_right_choice", "mixed_at_k", "pass_at_k"]
