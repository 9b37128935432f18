# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows with the same prompt: what is computed of it once reaches all of them."""

import torch
from model_inputs import inputs_of
from tiny import tiny_model

from segcompass_hf.prompt_copies_segcompass import PromptCopies
from segcompass_hf.reading_segcompass import SequenceStates

# Rows 1 and 3 begin with the two tokens of row 0, row 4 with those of row 2.
COPIES = PromptCopies(torch.tensor([7, 7, 2, 7, 2]), length=2)


def test_originals():
    assert COPIES.originals.tolist() == [0, 0, 2, 0, 2]
    assert COPIES[slice(3, 5)].originals.tolist() == [0, 1]  # of another batch


def test_prompts_of_copies_are_masked_and_filled():
    mask = torch.ones(5, 3, dtype=torch.long)
    mask[2, 0] = 0  # padding
    assert COPIES.without_copies(mask).tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    values = torch.arange(15.0).view(5, 3, 1).requires_grad_()
    filled = COPIES.fill(values)
    assert filled[..., 0].tolist() == [[0, 1, 2], [0, 1, 5], [6, 7, 8], [0, 1, 11], [6, 7, 14]]
    filled.sum().backward()
    assert values.grad[..., 0].tolist() == [[3, 3, 1], [0, 0, 1], [2, 2, 1], [0, 0, 1], [0, 0, 1]]


def test_concepts_of_a_shared_prompt_are_read_once():
    model, inputs = tiny_model(), inputs_of(rows=(0, 0, 1, 1), training=True)
    with torch.no_grad(), model.capture_states(inputs["input_ids"], inputs["attention_mask"]) as capture:
        model.vlm(
            **model.vlm_inputs(inputs["input_ids"], **{k: inputs[k] for k in ("attention_mask", "pixel_values")})
        )
    states = (*capture.states(), inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    length = int(inputs["completion_mask"].any(0).int().argmax())
    shared = SequenceStates(*states, prompt_copies=PromptCopies(torch.tensor([0, 0, 1, 1]), length))
    plain, encoded = SequenceStates(*states), []
    encode = model.sae.encode
    model.sae.encode = lambda given, *rest: encoded.append(len(given)) or encode(given, *rest)
    expected = model.embed_concepts(plain)
    torch.testing.assert_close(model.embed_concepts(shared), expected)
    prompts = int(inputs["attention_mask"][::2, :length].sum())
    assert encoded == [int(inputs["attention_mask"].sum()), int(inputs["attention_mask"].sum()) - prompts]
    part = shared[2:]
    torch.testing.assert_close(model.embed_concepts(part), expected[2:])
