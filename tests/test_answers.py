# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Several answers to a prompt: one pass over the prompt, and what `generate` would have sampled."""

import copy

import pytest
import torch
from model_inputs import inputs_of
from tiny import tiny_model
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import Cache, QuantizedLayer

from segcompass_hf import answers_segcompass, generation_segcompass
from segcompass_hf.answers_segcompass import answers_to_sample
from segcompass_hf.text_stack_segcompass import decoder_layers

SAMPLED = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 24, "temperature": 3.0, "top_k": 0}
FIELDS = ("reference_states", "slots", "heatmap_logits", "slot_logits", "pred_masks")


LENGTHS = (6, 15, 7, 9, 18, 8)  # of the answers: some words, 4 <REF_POS>, the end


class EndAt(LogitsProcessor):
    """Lets rows end after so many tokens."""

    def __init__(self, model, prompt_length):
        end = model.generation_config.eos_token_id
        self.start, self.ref, self.ends = (
            prompt_length,
            model.config.ref_token_id,
            end if isinstance(end, list) else [end],
        )

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.start
        scores[:, self.ends] = -torch.inf
        for row, length in enumerate(LENGTHS):
            if place >= length - 5:
                scores[row] = -torch.inf
                scores[row, self.ends[0] if place == length - 1 else self.ref] = 0.0
        return scores


def segment(model, inputs, seed=0, **sampled):
    """The answers, and the rows of every pass through the decoder."""
    rows = []
    handle = decoder_layers(model.vlm)[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    torch.manual_seed(seed)
    output = model.segment(**inputs, **sampled)
    handle.remove()
    return output, rows


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_prompt_passes_once_an_ended_answer_no_more_and_forward_reads_the_same(family):
    model, inputs = tiny_model(family), inputs_of(family)
    assert not inputs["attention_mask"].all()
    end = EndAt(model, inputs["input_ids"].shape[1])
    output, rows = segment(model, inputs, **SAMPLED, constrain_format=False, logits_processor=[end])
    assert rows[0] == 2 and rows[1] == 6 and sorted(rows[1:], reverse=True) == rows[1:]
    lengths = output.completion_mask.sum(1)
    assert lengths.tolist() == list(LENGTHS) and output.reference_states.any(-1).all()
    # A pass is of the last answers that were rearranged: more than 3/4 of them have a token for it, or all.
    passed = [int((lengths >= number).sum()) for number in range(1, len(rows))]
    assert rows[-1] < 6 and all(now >= left > 0 for now, left in zip(rows[1:], passed, strict=True))
    assert all(now == left or left > 0.75 * now for now, left in zip(rows[1:], passed, strict=True))
    assert len({tuple(row) for row in output.sequences.tolist()}) > 2
    read = inputs_of(family, rows=(0, 0, 0, 1, 1, 1))
    read.update(
        input_ids=output.sequences, attention_mask=output.attention_mask, completion_mask=output.completion_mask
    )
    with torch.no_grad():
        again = model(**read)
    for name in FIELDS:
        torch.testing.assert_close(again[name], output[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_answers_are_those_of_generate(family, monkeypatch):
    model, inputs = tiny_model(family), inputs_of(family)
    settings = {**SAMPLED, "constrain_format": False, "logits_processor": [EndAt(model, inputs["input_ids"].shape[1])]}
    output, _ = segment(model, inputs, **settings)
    monkeypatch.setattr(generation_segcompass, "answers_to_sample", lambda vlm, kwargs: (1, kwargs))
    monkeypatch.setattr(answers_segcompass, "LEFT_TO_REARRANGE", 0)
    plain, rows = segment(model, inputs, **settings)
    assert set(rows) == {6}
    assert torch.equal(output.sequences, plain.sequences)
    torch.testing.assert_close(output.pred_masks, plain.pred_masks, atol=1e-4, rtol=1e-4)


def test_settings_by_a_configuration_are_left_as_they_are():
    model, inputs = tiny_model(), inputs_of()
    config = GenerationConfig(**SAMPLED)
    before = copy.deepcopy(config)
    output, rows = segment(model, inputs, generation_config=config)
    assert rows[0] == 2 and len(output.sequences) == 6 and config == before
    assert torch.equal(output.sequences, segment(model, inputs, **SAMPLED)[0].sequences)


def test_what_is_asked_for():
    vlm = tiny_model().vlm
    assert answers_to_sample(vlm, {"do_sample": True}) == (1, {"do_sample": True})
    greedy = {"num_return_sequences": 2}  # left to `generate`, which says why not
    assert answers_to_sample(vlm, greedy) == (1, greedy)
    assert answers_to_sample(vlm, greedy | {"do_sample": True}) == (2, {"num_return_sequences": 1, "do_sample": True})
    number, kwargs = answers_to_sample(vlm, {"generation_config": GenerationConfig(**SAMPLED)})
    assert number == 3 and kwargs["generation_config"].num_return_sequences == 1


class Lossless(QuantizedLayer):
    """Quantized to what it was, so that only the order of rows can go wrong."""

    def __init__(self):
        super().__init__(residual_length=4)

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def test_quantized_caches_are_rearranged_where_they_can_be(monkeypatch):
    model, inputs = tiny_model(), inputs_of()
    end = EndAt(model, inputs["input_ids"].shape[1])
    settings = {**SAMPLED, "constrain_format": False, "logits_processor": [end]}
    expected, _ = segment(model, inputs, **settings)
    prepare = type(model.vlm)._prepare_cache_for_generation

    def prepare_quantized(self, generation_config, model_kwargs, *args, **kwargs):
        prepare(self, generation_config, model_kwargs, *args, **kwargs)
        layers = [Lossless() for _ in decoder_layers(model.vlm)]
        model_kwargs[generation_segcompass.CACHE] = Cache(layers=layers)

    monkeypatch.setattr(type(model.vlm), "_prepare_cache_for_generation", prepare_quantized)
    output, rows = segment(model, inputs, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    learned = "reorder_cache" in vars(QuantizedLayer)  # after 5.17
    assert rows[0] == (2 if learned else 6) and (rows[-1] < 6) == learned


def test_without_a_cache_to_rearrange_every_answer_has_its_own_prompt(monkeypatch):
    model, inputs = tiny_model(), inputs_of()
    expected, _ = segment(model, inputs, **SAMPLED)
    whole = model.vlm._prefill

    class Plain:
        """A cache of another kind: it grows, but its rows stay."""

        def __init__(self, cache):
            self.cache = cache

        def __getattr__(self, name):
            if name == "reorder_cache":
                raise AttributeError(name)
            return getattr(self.cache, name)

    prepare = type(model.vlm)._prepare_cache_for_generation

    def prepare_plain(self, generation_config, model_kwargs, *args, **kwargs):
        prepare(self, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs[generation_segcompass.CACHE] = Plain(model_kwargs[generation_segcompass.CACHE])

    monkeypatch.setattr(type(model.vlm), "_prepare_cache_for_generation", prepare_plain)
    output, rows = segment(model, inputs, **SAMPLED)
    assert set(rows) == {6} and model.vlm._prefill == whole
    assert torch.equal(output.sequences, expected.sequences)
