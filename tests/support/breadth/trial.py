# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One VLM family on its way through the steps: what they share, and what came of each."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tiny
import torch
from model_inputs import IMAGES, INSTRUCTIONS, REASONING
from transformers import BatchFeature

from segcompass_hf import SegCompassProcessor
from segcompass_hf.data.schema import encode_mask

from .building import Family, Parts, processor_name

FIELDS = ("reference_states", "slots", "heatmap_logits", "slot_logits", "pred_masks")
OURS = ("sam_pixel_values", "original_sizes", "reshaped_input_sizes", "mask_labels", "num_objects", "completion_mask")
TOLERANCE, NOISE = 1e-4, 5e-4  # largest difference that counts as equal, and as rounding of transformers' own
NEW_TOKENS = 12  # of an answer: 4 <REF_POS>, 3 other tokens of the format, 5 of reasoning
SAE_LAYER = 2

Kind = Literal["passed", "noise", "failed", "not reached", "not comparable"]


class Outcome(NamedTuple):
    """How a step went, and why it did not pass."""

    kind: Kind
    reason: str = ""


class Noise(AssertionError):
    """Equal but for rounding that is not ours."""


class NotComparable(Exception):
    """The family gives nothing to compare with."""


@dataclass(frozen=True)
class Step:
    """One column of the table.

    Args:
        run (`Callable`): Raises where the family does not pass.
        after (`tuple[str, ...]`): Steps that must have passed, else this one is not reached.
        meaning (`str`): The column's explanation, the first line of the function's docstring.
    """

    run: Callable
    after: tuple[str, ...]
    meaning: str


STEPS: dict[str, Step] = {}


def step(*after: str) -> Callable:
    def note(function: Callable) -> Callable:
        STEPS[function.__name__] = Step(function, after, function.__doc__.splitlines()[0])
        return function

    return note


class Trial:
    """One family on its way through the steps: what one step makes and the next one uses."""

    def __init__(self, name: str, family: Family, folder: Path):
        self.folder, self.parts = folder, Parts.build(name, family)
        self.processor: Any = None
        self.model: Any = None
        self._made: dict[tuple, BatchFeature] = {}

    def new_processor(self, tokenizer: Any = None) -> SegCompassProcessor:
        parts = copy.deepcopy(self.parts)
        return SegCompassProcessor(
            parts.image_processor,
            tokenizer or parts.tokenizer,
            tiny.tiny_sam_image_processor(),
            tiny.NUM_SLOTS,
            vlm_processor_class=processor_name(parts.name, parts.family),
            vlm_processor_kwargs=dict(parts.family.arguments),
        )

    def inputs(self, rows: tuple[int, ...] = (0, 1), training: bool = False, seed: int = 0) -> BatchFeature:
        """The processor's output for one or two pictures of different sizes; made once for the same arguments."""
        key = (rows, training, seed)
        if key not in self._made:
            self._made[key] = self.inputs_by(self.processor, rows, training, seed)
        return BatchFeature(dict(self._made[key]))

    def inputs_by(self, processor: SegCompassProcessor, rows=(0, 1), training: bool = False, seed: int = 0):
        """The same by another processor."""
        kwargs = {}
        if training:
            kwargs["reasoning"] = [REASONING[row] for row in rows]
            kwargs["masks"] = [tiny.tiny_mask(row + 1, IMAGES[row][1]) for row in rows]
        images = [tiny.tiny_image(IMAGES[row][0] + seed, IMAGES[row][1]) for row in rows]
        instructions = [INSTRUCTIONS[row] for row in rows]
        return processor(images=images, instruction=instructions, return_tensors="pt", **kwargs)

    def rows(self) -> list[dict]:
        """The same pictures, instructions and answers as rows of a data set."""
        return [
            {
                "sample_id": f"row-{row}",
                "image": tiny.tiny_image(*IMAGES[row]),
                "instruction": INSTRUCTIONS[row],
                "reasoning": REASONING[row],
                "masks": [encode_mask(mask) for mask in tiny.tiny_mask(row + 1, IMAGES[row][1])],
            }
            for row in (0, 1)
        ]

    def check_comparable(self) -> None:
        """Raise where transformers' own logits of a row without padding are others in a batch than alone."""
        made = self.inputs()
        row = int(made["attention_mask"].sum(1).argmax())
        with torch.no_grad():
            together = self.model.vlm(**vlm_inputs(made)).logits[row]
            alone = self.model.vlm(**vlm_inputs(self.inputs((row,)))).logits[0]
        difference = float((together[-len(alone) :] - alone).abs().max())
        if difference > NOISE:
            raise NotComparable(f"the VLM alone differs by {difference:.1e} between a batch and its row")

    @functools.cached_property
    def segmented(self):
        return self.model.segment(**self.inputs(), max_new_tokens=NEW_TOKENS)


def vlm_inputs(inputs: Any) -> dict[str, torch.Tensor]:
    """The VLM's own inputs among ours."""
    return {name: value for name, value in inputs.items() if name not in (*OURS, "labels")}


def check_equal(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Every pair agrees to 1e-4; up to 5e-4 is noted as noise."""
    differences = {}
    for name, (one, other) in pairs.items():
        assert one.shape == other.shape, f"{name}: shapes {tuple(one.shape)} and {tuple(other.shape)}"
        differences[name] = float((one.float() - other.float()).abs().max())
    largest = max(differences.values())
    told = ", ".join(f"{name} {value:.1e}" for name, value in differences.items() if not value <= TOLERANCE)
    if not largest <= NOISE:
        raise AssertionError(f"differs: {told}")
    if largest > TOLERANCE:
        raise Noise(f"differs: {told}")


def pairs_of(one: Any, other: Any, row: int | None = None) -> dict:
    """Fields of two outputs; of the second only a row."""
    return {name: (one[name], other[name] if row is None else other[name][row : row + 1]) for name in FIELDS}


def same_inputs(one: Any, other: Any) -> None:
    assert sorted(one) == sorted(other), f"inputs {sorted(one)} and {sorted(other)}"
    for name in one:
        assert torch.equal(one[name], other[name]), f"{name} differs"
