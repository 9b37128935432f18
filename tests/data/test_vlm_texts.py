"""Texts that a model cannot read: empty, missing, no text, or longer than its tokenizer allows."""

import pickle

import pytest
from tiny import FAMILIES, tiny_image, tiny_processor

from segcompass_hf.data.vlm_texts import RowTextCheck, TextsWithImages, reasoning_of

IMAGE = tiny_image(0)


def row(instruction="the red ring", **columns):
    return {"image": IMAGE, "instruction": instruction, "sample_id": "s", **columns}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reasoning", [None, "it is red, and round"])
def test_the_limit_is_that_of_the_whole_sequence_to_the_token(family, reasoning):
    # As the processor lays it out: prompt with the image's tokens, then, where it is asked for, the reference answer.
    given = row(reasoning=reasoning)
    length = tiny_processor(family)(images=[IMAGE], instruction=["the red ring"], reasoning=[reasoning or ""])
    length = length["input_ids"].shape[1]
    RowTextCheck(tiny_processor(family, model_max_length=length))(given)
    short = tiny_processor(family, model_max_length=length - 1)
    with pytest.raises(ValueError, match=rf"model_max_length is {length - 1}; shorten its text by 1 tokens"):
        RowTextCheck(short)(given)
    RowTextCheck(short, with_reasoning=False)(given)  # only its prompt is read


@pytest.mark.parametrize("instruction", [None, "", " \n", 5])
def test_an_instruction_without_words_is_refused(instruction):
    with pytest.raises(ValueError, match="the instruction is"):
        RowTextCheck(tiny_processor())(row(instruction))


def test_reasoning_is_a_text_or_none():
    assert reasoning_of({}) == reasoning_of({"reasoning": None}) == reasoning_of({"reasoning": " "}) == ""
    with pytest.raises(ValueError, match="the reasoning is a int; expected a text, or None"):
        RowTextCheck(tiny_processor())(row(reasoning=7))


def test_a_prompt_of_ones_own_counts_with_its_image():
    prompt = [{"role": "user", "content": "the red ring"}]
    processor = tiny_processor()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the red ring"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    length = processor(images=[[IMAGE]], text=[text], return_tensors="pt")["input_ids"].shape[1]
    RowTextCheck(tiny_processor(model_max_length=length), with_reasoning=False)(row(None, prompt=prompt))
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens, image included, but"):
        RowTextCheck(tiny_processor(model_max_length=length - 1), with_reasoning=False)(row(None, prompt=prompt))
    for nothing in ([], [{"role": "user", "content": " "}], "text"):
        with pytest.raises(ValueError, match="expected a conversation whose messages have words"):
            RowTextCheck(processor, with_reasoning=False)(row(prompt=nothing))


def test_a_tokenizer_without_a_limit_refuses_nothing():
    processor = tiny_processor(model_max_length=int(1e30))  # what transformers writes where none is known
    assert TextsWithImages(processor).max_tokens is None
    RowTextCheck(processor)(row("ring " * 5000))


def test_it_reaches_data_loader_workers():
    with pytest.raises(ValueError, match="is empty"):
        pickle.loads(pickle.dumps(RowTextCheck(tiny_processor())))(row(""))
