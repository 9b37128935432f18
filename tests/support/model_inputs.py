# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Inputs of one or two rows for the tiny models."""

import tiny

IMAGES = [(0, (40, 30)), (1, (50, 44))]
INSTRUCTIONS = ["the largest red circle", "all the blue squares but not the small ring"]
REASONING = ["there is one", "I see two of them, maybe"]


def inputs_of(family: str = "llava", rows=(0, 1), training: bool = False, **kwargs):
    processor = tiny.tiny_processor(family)
    images = [tiny.tiny_image(*IMAGES[row]) for row in rows]
    if training:
        kwargs["reasoning"] = [REASONING[row] for row in rows]
        kwargs["masks"] = [tiny.tiny_mask(row + 1, IMAGES[row][1]) for row in rows]
    return processor(images=images, instruction=[INSTRUCTIONS[row] for row in rows], return_tensors="pt", **kwargs)
