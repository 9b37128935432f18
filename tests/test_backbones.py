# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Every VLM family goes through the same code: forward, segment, batches, left padding, saving, training."""

import pytest
import tiny
import torch
from model_inputs import inputs_of
from transformers import AutoModel

import segcompass_hf  # noqa: F401  registers the Auto classes
from segcompass_hf.text_stack_segcompass import HiddenStateCapture

FIELDS = ("reference_states", "slots", "heatmap_logits", "slot_logits", "pred_masks")
NOT_THE_VLMS = ("sam_pixel_values", "original_sizes", "reshaped_input_sizes", "mask_labels", "num_objects")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny.tiny_model(family)


def text_inputs(inputs) -> dict:
    return {k: v for k, v in inputs.items() if k not in (*NOT_THE_VLMS, "completion_mask", "labels")}


def test_batch_equals_singles_in_segment(family, model):
    batch = inputs_of(family)
    assert (batch["attention_mask"][:, 0] == 0).any()  # one row is padded, on the left
    together = model.segment(**batch, max_new_tokens=14)
    assert together.pred_masks.std() > 0.01 and together.heatmap_logits.std() > 0.01
    for row in (0, 1):
        alone = model.segment(**inputs_of(family, rows=(row,)), max_new_tokens=14)
        for name in FIELDS:
            torch.testing.assert_close(
                alone[name][0], together[name][row], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
        written = together.completion_mask[row].bool()
        assert torch.equal(alone.sequences[alone.completion_mask.bool()], together.sequences[row, written])


def test_batch_equals_singles_in_forward(family, model):
    batch = inputs_of(family, training=True)
    with torch.no_grad():
        together = model(**batch)
        for row in (0, 1):
            alone = model(**inputs_of(family, rows=(row,), training=True))
            for name in FIELDS:
                torch.testing.assert_close(
                    alone[name][0], together[name][row], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_segment_equals_reading_its_own_answer(family, model):
    inputs = inputs_of(family)
    output = model.segment(**inputs, max_new_tokens=14)
    inputs.update(
        input_ids=output.sequences, attention_mask=output.attention_mask, completion_mask=output.completion_mask
    )
    with torch.no_grad():
        read = model(**inputs)
    for name in FIELDS:
        torch.testing.assert_close(output[name], read[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_captured_states_are_transformers_hidden_states(family, model):
    inputs = text_inputs(inputs_of(family))
    with torch.no_grad(), HiddenStateCapture(model.base_model, model.config.sae_layer) as capture:
        output = model.vlm(**inputs, output_hidden_states=True)
    layer_states, last_states = capture.states()
    assert torch.equal(layer_states, output.hidden_states[model.config.sae_layer])
    assert torch.equal(last_states, output.hidden_states[-1])


def test_one_pass(family, model):
    lengths = []

    def count(module, args, kwargs):
        ids = kwargs.get("input_ids")
        lengths.append((ids if ids is not None else kwargs["inputs_embeds"]).shape[1])

    inputs = inputs_of(family)
    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    output = model.segment(**inputs, max_new_tokens=10)
    handle.remove()
    assert lengths[0] == inputs["input_ids"].shape[1] and set(lengths[1:-1]) == {1}
    assert lengths[-1] > 1, "what the format forces passes at once"
    assert sum(lengths) == output.sequences.shape[1]


def test_gradients_reach_the_upper_layers_only(family):
    model = tiny.tiny_model(family).freeze_for_training()
    output = model.train()(**inputs_of(family, training=True))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    layers = model.base_model.language_model.layers
    assert [any(p.grad is not None for p in layer.parameters()) for layer in layers] == [False, False, True, True]


def test_save_and_load(family, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    inputs = inputs_of(family)
    expected, output = (each.segment(**inputs, max_new_tokens=10) for each in (model, loaded))
    assert torch.equal(output.sequences, expected.sequences)
    for name in FIELDS:
        assert torch.equal(output[name], expected[name]), name
