# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Completions of one prompt kept together, and prompts taken some at a time."""

import numpy as np
import pytest
from tiny import tiny_image, tiny_processor

pytest.importorskip("trl")

from segcompass_hf.training.grpo.groups import parts_of_prompts  # noqa: E402


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_prompts_are_taken_some_at_a_time_as_processors_leave_them(family):
    """TRL asks processors for lists, not tensors: arrays of pictures, lists of tokens, or all patches in one array."""
    sizes = [(40, 30), (30, 40), (60, 30)]
    content = [[{"type": "image", "image": tiny_image(0, size)}, {"type": "text", "text": "red"}] for size in sizes]
    messages = [[{"role": "user", "content": its}] for its in content]
    processor = tiny_processor(family)

    def made(messages):
        made = processor.apply_chat_template(
            conversation=messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return made.pop("input_ids"), {name: value for name, value in made.items() if name != "attention_mask"}

    ids, fields = made(messages)
    images = [[number] for number in range(3)]
    first, last = parts_of_prompts(ids, images, fields, 2)
    assert first[:2] == (ids[:2], images[:2]) and last[:2] == (ids[2:], images[2:])
    for part, its in ((first, messages[:2]), (last, messages[2:])):
        expected = made(its)[1]
        assert part[2].keys() == expected.keys()
        for name, value in part[2].items():
            assert np.array_equal(np.array(value), np.array(expected[name])), name
    (whole,) = parts_of_prompts(ids, images, fields, 3)
    assert whole == (ids, images, fields)
