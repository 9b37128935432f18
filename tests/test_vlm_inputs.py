# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Families with inputs, positions or passes of their own: written and read alike, batch as singles, no look ahead."""

import odd_vlms
import pytest
import tiny
import torch
from model_inputs import inputs_of
from transformers import Gemma3ForConditionalGeneration, GenerationMixin, PaliGemmaForConditionalGeneration

from segcompass_hf.text_stack_segcompass import HiddenStateCapture, decoder_layers
from segcompass_hf.vlm_inputs_segcompass import every_state, sequence_inputs

FIELDS = ("reference_states", "slots", "heatmap_logits", "slot_logits", "pred_masks")


@pytest.fixture(scope="module", params=odd_vlms.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return odd_vlms.odd_model(family)


@pytest.fixture(scope="module")
def written(family, model):
    return model.segment(**odd_vlms.odd_inputs(family), max_new_tokens=14)


def of_the_vlm(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "sam_pixel_values"}


class TestOddFamilies:
    def test_batch_equals_singles(self, family, model, written):
        assert written.pred_masks.std() > 0.01 and written.heatmap_logits.std() > 0.01
        for row in (0, 1):
            alone = model.segment(**odd_vlms.odd_inputs(family, (row,)), max_new_tokens=14)
            for name in FIELDS:
                torch.testing.assert_close(alone[name][0], written[name][row], atol=2e-5, rtol=0)
            both = alone.completion_mask[0].bool(), written.completion_mask[row].bool()
            assert torch.equal(alone.sequences[0, both[0]], written.sequences[row, both[1]])

    def test_writing_equals_reading(self, family, model, written):
        sequences = {"input_ids": written.sequences, "attention_mask": written.attention_mask}
        with torch.no_grad():
            read = model(**{**odd_vlms.odd_inputs(family), **sequences}, completion_mask=written.completion_mask)
        for name in FIELDS:
            torch.testing.assert_close(written[name], read[name], atol=2e-5, rtol=0)

    def test_nothing_sees_a_later_token(self, family, model, written):
        """Logits before a changed token of the answer stay as they were, to the last bit."""
        inputs = of_the_vlm(odd_vlms.odd_inputs(family))
        changed = written.sequences.clone()
        late = changed.shape[1] - 3
        changed[:, late] = (changed[:, late] + 1) % odd_vlms.VOCAB
        assert not torch.isin(changed[:, late], torch.tensor([odd_vlms.IMAGE])).any()
        with torch.no_grad():
            before, after = (
                model(**{**inputs, "input_ids": ids, "attention_mask": written.attention_mask}).logits
                for ids in (written.sequences, changed)
            )
        mask = written.attention_mask.bool()[:, :late]
        assert (before[:, :late][mask] - after[:, :late][mask]).abs().max() == 0
        assert (before[:, late:] - after[:, late:]).abs().max() > 0

    def test_captured_states_are_transformers_hidden_states(self, family, model):
        inputs = of_the_vlm(odd_vlms.odd_inputs(family))
        with torch.no_grad(), HiddenStateCapture(model.vlm, 2) as capture:
            output = model.vlm(**sequence_inputs(model.vlm, inputs), output_hidden_states=True)
        layer_states, last_states = capture.states()
        states = getattr(output, "language_model_outputs", output).hidden_states  # BLIP-2 keeps them apart
        assert torch.equal(layer_states, states[2])
        assert torch.equal(last_states, states[-1])

    def test_the_pass_may_end_at_the_saes_layer(self, family, model):
        inputs = odd_vlms.odd_inputs(family)
        with torch.no_grad():
            whole, short = (model(**inputs, slots_alone=alone, output_concepts=True) for alone in (False, True))
        assert torch.equal(whole.concepts.values, short.concepts.values)

    def test_gradients_reach_the_upper_layers(self, family):
        model = odd_vlms.odd_model(family).freeze_for_training()
        inputs = of_the_vlm(odd_vlms.odd_inputs(family))
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == odd_vlms.IMAGE, -100)
        model(**inputs, labels=labels).loss.backward()
        layers = decoder_layers(model.vlm)
        assert [any(p.grad is not None for p in layer.parameters()) for layer in layers] == [False, False, True, True]


class TestGrowing:
    def test_paligemma_marks_what_is_written(self):
        vlm, inputs = odd_vlms.odd_vlm("paligemma"), of_the_vlm(odd_vlms.odd_inputs("paligemma"))
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=20)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        prepared = sequence_inputs(vlm, inputs)
        assert (prepared["token_type_ids"][:, :prompt] == 0).all() and (
            prepared["token_type_ids"][:, prompt:] == 1
        ).all()
        assert prepared["position_ids"][1, 0] == 1  # its positions begin there

    def test_paligemma_without_a_rule_of_its_own(self, monkeypatch):
        """As transformers 5.17 has it: the common rule repeats the prefix's type, which sees what comes."""
        rule = "_update_model_kwargs_for_generation"
        monkeypatch.setattr(PaliGemmaForConditionalGeneration, rule, getattr(GenerationMixin, rule))
        self.test_paligemma_marks_what_is_written()

    def test_gemma3_stays_text(self):
        vlm = tiny.tiny_model("gemma3").vlm
        assert isinstance(vlm, Gemma3ForConditionalGeneration)
        inputs = inputs_of("gemma3", training=True)
        prepared = sequence_inputs(
            vlm, {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        )
        prompt = inputs["token_type_ids"].shape[1]
        assert prepared["token_type_ids"].shape == inputs["input_ids"].shape
        assert torch.equal(prepared["token_type_ids"][:, :prompt], inputs["token_type_ids"])
        assert (prepared["token_type_ids"][:, prompt:] == 0).all()

    def test_masks_of_cross_attention_repeat_their_last_entry(self):
        vlm, inputs = odd_vlms.odd_vlm("mllama"), of_the_vlm(odd_vlms.odd_inputs("mllama"))
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=20)
        prepared = sequence_inputs(vlm, inputs)
        assert prepared["cross_attention_mask"].shape == (*inputs["input_ids"].shape, 1, 4)
        assert torch.equal(prepared["cross_attention_mask"][:, -1], inputs["cross_attention_mask"][:, -1])

    def test_whole_ones_are_left_as_they_are(self):
        vlm, inputs = odd_vlms.odd_vlm("paligemma"), of_the_vlm(odd_vlms.odd_inputs("paligemma"))
        given = torch.randint(0, 2, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(sequence_inputs(vlm, inputs | {"token_type_ids": given})["token_type_ids"], given)


def test_places_of_logits_as_a_tensor_where_layers_share_keys():
    vlm = tiny.tiny_model("llava").vlm
    assert every_state(vlm, 1) == 1
    vlm.config.text_config.num_kv_shared_layers = 2
    assert every_state(vlm, 3).tolist() == [-3, -2, -1] and every_state(vlm, 0) == 0
