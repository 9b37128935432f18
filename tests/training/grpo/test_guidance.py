# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Help of a reference: what is given, when, and how a model is made to begin with it."""

import doctest

import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_processor

from segcompass_hf.training.grpo import guidance
from segcompass_hf.training.grpo.guidance import (
    BeginWith,
    beginning_of,
    begun_answers,
    first_sentences,
    guidance_strength,
    reference_answer,
)

WORDS = "a box is red. a cup stands on the table. the answer is one"


def test_docstring_examples():
    results = doctest.testmod(guidance)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("text", "strength", "given"),
    [
        ("One.  Two! Three? Four", 1.0, "One.  Two! Three?"),
        ("One.  Two! Three? Four", 0.5, "One.  Two!"),  # ceil(1.5) of 3
        ("One.  Two! Three? Four", 0.01, "One."),
        ("One.  Two! Three? Four", 0.0, ""),
        ("only one sentence.", 1.0, ""),
        ("", 1.0, ""),
        ("v1.5 is 2.5 m. yes", 1.0, "v1.5 is 2.5 m."),  # a point inside of a word ends nothing
        ("一。二！三", 1.0, "一。二！"),
        ("first line\nsecond", 1.0, "first line\n"),
    ],
)
def test_first_sentences(text, strength, given):
    assert first_sentences(text, strength).strip() == given.strip()


def test_strength_is_of_the_share_asked_for():
    assert guidance_strength(0, 10, 1.0) == 1.0 and guidance_strength(5, 10, 1.0) == 0.5
    assert guidance_strength(10, 10, 1.0) == 0.0 and guidance_strength(1, 10, 0.1) == 0.0


def test_a_beginning_is_the_start_of_the_whole_answer():
    processor = tiny_processor()
    row = {"reasoning": WORDS}
    answer = reference_answer(row, processor)
    text = processor.tokenizer.decode(answer)
    assert text.startswith(f"<think>{WORDS}</think>") and text.endswith(processor.end_of_turn_token)
    given = beginning_of(row, processor, 1.0)
    assert given == answer[: len(given)] and 0 < len(given) < len(answer)
    begun = processor.tokenizer.decode(given)
    assert begun.startswith("<think>a box is red. a cup stands on the table.") and "answer" not in begun
    short = beginning_of(row, processor, 0.2)
    assert len(short) < len(given) and given[: len(short)] == short
    for row in ({"reasoning": None}, {"reasoning": " "}, {}):
        assert reference_answer(row, processor) is None and beginning_of(row, processor, 1.0) is None
    assert beginning_of({"reasoning": "only one."}, processor, 1.0) is None


def test_begin_with_forces_only_what_is_given():
    processor = BeginWith(2, [[5, 6], [], [7]])
    scores = torch.randn(3, 10)
    first = processor(torch.zeros(3, 2, dtype=torch.long), scores)
    assert first.argmax(1)[[0, 2]].tolist() == [5, 7] and first[[0, 2]].isfinite().sum() == 2
    assert torch.equal(first[1], scores[1])
    second = processor(torch.zeros(3, 3, dtype=torch.long), scores)
    assert second[0].argmax() == 6 and torch.equal(second[1:], scores[1:])
    assert processor(torch.zeros(3, 4, dtype=torch.long), scores) is scores


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_begun_answer_goes_on_as_the_model_would(family):
    model, processor = tiny_model(family), tiny_processor(family)
    inputs = processor(images=[tiny_image()] * 2, instruction=["the red box", "the cup"], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    given = processor._ids_of("<think>a box is red.")
    with begun_answers(model, [given, []]):
        begun = model.generate(**inputs, max_new_tokens=len(given) + 4, do_sample=False)
    plain = model.generate(**inputs, max_new_tokens=len(given) + 4, do_sample=False)
    assert begun[0, length : length + len(given)].tolist() == given != plain[0, length : length + len(given)].tolist()
    assert torch.equal(begun[1, : plain.shape[1]], plain[1])
    # What follows is what a forward over prompt and beginning says comes next.
    names = [name for name in inputs if name.endswith("token_type_ids")]
    longer = {name: torch.cat([inputs[name], inputs[name].new_zeros(2, len(given))], 1) for name in names}
    ids, mask = begun[:, : length + len(given)], torch.ones(2, len(given), dtype=torch.long)
    whole = {**inputs, **longer, "input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], mask], 1)}
    logits = model(**whole).logits[0, -1]
    logits[model.vision_token_ids] = float("-inf")
    assert int(logits.argmax()) == int(begun[0, length + len(given)])
    assert "generate" not in vars(model)  # as it was


def test_what_wrapped_generate_before_wraps_it_afterwards():
    """FSDP2 puts a `generate` of its own on the model, which gathers the weights."""
    model, processor = tiny_model(), tiny_processor()
    inputs = processor(images=tiny_image(), instruction="the red box", return_tensors="pt")
    calls, plain = [], model.generate

    def wrapped(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    model.generate = wrapped
    with begun_answers(model, [[5]]):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert calls == [1] and model.generate is wrapped
