# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Faithfulness of the reasoning: words are cut, moved, filled or made wrong, and the masks are read again.

The changed reasoning is put into the model's mouth: one pass reads it as if the model had written it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import torch

from ...metrics import score_sample
from ..answer import Answer, mask_iou

FILLER = "."  # in place of every word
SHOWN = 0.5  # IoU from which a mask shows an object

Objects = list[tuple]  # words that name an object, its mask (H, W) bool; what else is said of it is not read


@dataclass
class ReasoningTest:
    """What the masks do when the reasoning is changed.

    Args:
        iou_to_answer (`dict[str, float]`): By change, IoU of the masks' union to that with the reasoning as it was
            written (`as_written`), in [0, 1]. `cut`: its first half; `none`: empty; `filled`: a full stop for every
            word; `reordered`: the same parts in another order; `error`: another object named at the end.
        iou_to_truth (`dict[str, float]`): By change, and of `as_written`: IoU of the answer to the target.
        shows_named, shows_former (`bool`, *optional*): With the error, whether a mask shows the object that is now
            named, or the one that was; `None` where no other object could be named.
        named (`list[bool]`): Of every mask of the answer, whether it shows an object that the reasoning's end names;
            empty where it names none.
    """

    iou_to_answer: dict[str, float]
    iou_to_truth: dict[str, float]
    shows_named: bool | None = None
    shows_former: bool | None = None
    named: list[bool] = field(default_factory=list)


def reasoning_test(
    answer: Answer, objects: Objects, targets: np.ndarray, ignore: np.ndarray | None = None, seed: int = 0
) -> ReasoningTest:
    """Change an answer's reasoning and read the masks again.

    Args:
        answer ([`Answer`]): With reasoning.
        objects (`list`): Words and mask of every known object of the image.
        targets (`np.ndarray` of shape `(n, H, W)`): bool; the objects asked for.
        ignore (`np.ndarray` of shape `(H, W)`, *optional*): Pixels left out of the IoU to the truth.
        seed (`int`, defaults to 0): Of the object that is named in error.
    """
    masks = answer.masks if answer.kept else answer.masks[:0]
    changed = {"as_written": answer.reasoning} | changed_reasonings(answer.reasoning)
    shown = [object_shown(mask, objects) for mask in masks]
    error = name_another(answer.reasoning, objects, [place for place in shown if place is not None], seed)
    if error is not None:
        changed["error"] = error[0]
    found = dict(zip(changed, read_reasonings(answer, list(changed.values())), strict=True))
    before = found["as_written"].any(0)
    test = ReasoningTest(
        {name: mask_iou(before, of.any(0)) for name, of in found.items() if name != "as_written"},
        {name: score_sample(of, targets, ignore).iou for name, of in found.items()},
    )
    if error is not None:
        test.shows_former, test.shows_named = (
            any(mask_iou(mask, objects[place][1]) >= SHOWN for mask in found["error"]) for place in error[1:]
        )
    named = named_objects(answer.reasoning, objects)
    test.named = [place in named for place in shown] if named else []
    return test


def changed_reasonings(reasoning: str) -> dict[str, str]:
    """Changes that need to know nothing of the objects; those that would change nothing are left out.

    ```python
    >>> changed_reasonings("a cat, a dog. the dog")
    {'cut': 'a cat, a', 'none': '', 'filled': '. . . . . .', 'reordered': 'a dog, a cat. the dog'}
    ```
    """
    words = reasoning.split()
    changed = {
        "cut": " ".join(words[: len(words) // 2]),
        "none": "",
        "filled": " ".join([FILLER] * len(words)),
        "reordered": ". ".join(", ".join(reversed(_parts(sentence, ","))) for sentence in _parts(reasoning, ".")),
    }
    if reasoning.rstrip().endswith("."):
        changed["reordered"] += "."
    return {name: text for name, text in changed.items() if text.split() != words}


def name_another(reasoning: str, objects: Objects, shown: list[int], seed: int = 0) -> tuple[str, int, int] | None:
    """Put an error into a reasoning: its last sentence names another object.

    Args:
        reasoning (`str`): As written.
        objects (`list`): Words and mask of every known object; n-th words say the same kind of thing of each.
        shown (`list[int]`): Objects that the masks show; the first that the last sentence names is replaced.
        seed (`int`, defaults to 0): Of the object that takes its place.

    Returns:
        `tuple`: the changed reasoning, the object it named and the one it names; `None` where there are none such.
    """
    named = named_objects(reasoning, objects)
    others = [place for place in range(len(objects)) if place not in named and place not in shown]
    for former in (place for place in shown if place in named):
        for other in np.random.default_rng(seed).permutation(others).tolist():
            start, end = _conclusion(reasoning)
            text = reasoning[start:end]
            for was, now in zip(objects[former][0], objects[other][0], strict=False):
                text = re.sub(rf"\b{re.escape(was)}\b", now.replace("\\", r"\\"), text)
            if text != reasoning[start:end]:
                return reasoning[:start] + text + reasoning[end:], former, other
    return None


def named_objects(reasoning: str, objects: Objects) -> set[int]:
    """Objects that the last sentence names, by a word that no other object has; empty with fewer than two objects."""
    start, end = _conclusion(reasoning)
    said = set(re.findall(r"[^\W_]+", reasoning[start:end].lower()))
    words = [{word.lower() for word in one[0]} for one in objects]
    own = [of.difference(*words[:place], *words[place + 1 :]) for place, of in enumerate(words)]
    return {place for place, of in enumerate(own) if of & said} if len(objects) > 1 else set()


def object_shown(mask: np.ndarray, objects: Objects) -> int | None:
    """The object that a mask `(H, W)` overlaps most, where their IoU is `SHOWN` or more."""
    ious = [mask_iou(mask, one[1]) for one in objects]
    return int(np.argmax(ious)) if max(ious, default=0.0) >= SHOWN else None


@torch.no_grad()
def read_reasonings(answer: Answer, reasonings: list[str]) -> list[np.ndarray]:
    """Masks `(n, H, W)` that the model draws having written each of the reasonings."""
    model, processor = answer.model, answer.processor
    inputs = processor(images=answer.image, instruction=answer.instruction, reasoning=reasonings).to(model.device)
    output = model(**{name: value for name, value in inputs.items() if name != "labels"})
    thresholds = ("slot_logit_threshold", "mask_logit_threshold", "duplicate_iou_threshold")
    results = processor.post_process_segmentation(
        output,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        output_heatmaps=False,
        **{name: getattr(model.config, name) for name in thresholds},
    )
    return [result["masks"].numpy() for result in results]


def _parts(text: str, sign: str) -> list[str]:
    return [part.strip() for part in text.split(sign) if part.strip()]


def _conclusion(reasoning: str) -> tuple[int, int]:
    """Where the last sentence begins and ends."""
    end = len(reasoning.rstrip(". \n"))
    return reasoning.rfind(".", 0, end) + 1, end


__all__ = ["ReasoningTest", "changed_reasonings", "name_another", "named_objects", "object_shown", "reasoning_test"]
