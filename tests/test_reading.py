# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`read_masks`, the one path from states to masks: what it shares with forward and segment, gradients, padding."""

import ast
import inspect

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from segcompass_hf.delegation_segcompass import VlmDelegationMixin
from segcompass_hf.freezing_segcompass import TokenRowsMixin
from segcompass_hf.loading_segcompass import LoadingMixin
from segcompass_hf.reading_segcompass import MaskTargets, ReadingMixin, SequenceStates
from segcompass_hf.segmenting_segcompass import SegmentingMixin

FIELDS = ("heatmap_logits", "slot_logits", "pred_masks", "slots", "reference_states")


def inputs_of(training: bool = True):
    """Two rows of different length, so that the first is padded on the left."""
    images, words = [tiny.tiny_image(0, (40, 30)), tiny.tiny_image(1, (50, 44))], ["the largest circle", "squares"]
    answers = {
        "reasoning": ["there is one", "I see two"],
        "masks": [tiny.tiny_mask(1, (40, 30)), tiny.tiny_mask(2, (50, 44))],
    }
    return tiny.tiny_processor()(
        images=images, instruction=words, return_tensors="pt", **(answers if training else {})
    )


def states_of(model, inputs, interventions=None):
    """What one pass of the VLM leaves, and SAM's features."""
    names = ("input_ids", "attention_mask", "pixel_values")
    ids, mask, pixels = (inputs[name] for name in names)
    with torch.no_grad(), model.capture_states(ids, mask, interventions) as capture:
        model.vlm(**model.vlm_inputs(ids, attention_mask=mask, pixel_values=pixels))
    states = SequenceStates(*capture.states(), ids, mask, inputs.get("completion_mask"))
    return states, model.encode_image(inputs["sam_pixel_values"])


def targets_of(inputs, **kwargs):
    return MaskTargets(inputs["mask_labels"], inputs["num_objects"], **kwargs)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_what_forward_does(training):
    model, inputs = tiny.tiny_model().train(training), inputs_of()
    states, embeddings = states_of(model, inputs)
    expected = model(**inputs, output_concepts=True, output_slot_attentions=True)
    sizes, targets = inputs["reshaped_input_sizes"], targets_of(inputs)
    read = model.read_masks(states, embeddings, sizes, targets, output_concepts=True, output_slot_attentions=True)
    assert (read.pred_masks is None) == training  # matched slots only
    for name in (*FIELDS, "segmentation_loss", "confidence_loss"):
        mine, theirs = getattr(read, name), getattr(expected, name)
        assert mine is theirs is None or torch.equal(mine, theirs), name
    assert torch.equal(read.concepts.values, expected.concepts.values)
    for mine, theirs in zip(read.slot_attentions, expected.slot_attentions, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(read.loss + model.config.lm_loss_weight * expected.language_loss, expected.loss)
    assert read.logits is None and read.image_embeddings is None and read.language_loss is None


def test_it_is_what_segment_does():
    model, inputs = tiny.tiny_model(), inputs_of(training=False)
    change = {3: 2.0}
    expected = model.segment(**inputs, max_new_tokens=16, interventions=change, output_concepts=True)
    inputs.update(
        input_ids=expected.sequences,
        attention_mask=expected.attention_mask,
        completion_mask=expected.completion_mask,
    )
    states, embeddings = states_of(model, inputs)
    read = model.read_masks(
        states, embeddings, inputs["reshaped_input_sizes"], interventions=change, output_concepts=True
    )
    for name in FIELDS:  # one pass over the sequence, instead of one per token
        torch.testing.assert_close(read[name], expected[name], atol=1e-4, rtol=0)
    torch.testing.assert_close(read.concepts.dense(64), expected.concepts.dense(64), atol=1e-4, rtol=0)
    assert expected.pred_masks.std() > 0.05
    plain = model.read_masks(states, embeddings, inputs["reshaped_input_sizes"])
    assert (plain.heatmap_logits - read.heatmap_logits).abs().max() > 1e-3 and plain.concepts is None


def test_gradients_reach_the_heads_and_the_last_states():
    model, inputs = tiny.tiny_model().freeze_for_training().train(), inputs_of()
    states, embeddings = states_of(model, inputs)
    states.layer_states.requires_grad_()
    states.last_states.requires_grad_()
    model.read_masks(states, embeddings, inputs["reshaped_input_sizes"], targets_of(inputs)).loss.backward()
    for part in ("codebook", "slot_encoder", "slot_mapper", "sam.mask_decoder"):
        for name, parameter in model.get_submodule(part).named_parameters():
            assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, f"{part}.{name}"
    assert all(p.grad is None for part in (model.vlm, model.sae, model.sam.vision_encoder) for p in part.parameters())
    assert states.layer_states.grad is None  # concepts are constants
    # Of the last states only those at the four <REF_POS> of the answer count.
    where = (inputs["input_ids"] == model.config.ref_token_id) & inputs["completion_mask"].bool()
    assert torch.equal(states.last_states.grad.abs().sum(-1) > 0, where) and where.sum(1).tolist() == [4, 4]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, inputs = tiny.tiny_model(), inputs_of()
    states, embeddings = states_of(model, inputs)
    expected = model.read_masks(states, embeddings, inputs["reshaped_input_sizes"])

    def padded(tensor, filling):
        padding = torch.full((2, 3, *tensor.shape[2:]), filling, dtype=tensor.dtype)
        return torch.cat([padding, tensor] if side == "left" else [tensor, padding], dim=1)

    wide = SequenceStates(
        padded(states.layer_states, 9.0),
        padded(states.last_states, 9.0),
        padded(states.input_ids, model.config.ref_token_id),
        padded(states.attention_mask, 0),
        padded(states.completion_mask, 0),
    )
    read = model.read_masks(wide, embeddings, inputs["reshaped_input_sizes"])
    for name in FIELDS:
        torch.testing.assert_close(read[name], expected[name], atol=1e-5, rtol=0)


def test_a_row_alone_is_the_row_of_the_batch():
    model, inputs = tiny.tiny_model(), inputs_of()
    states, embeddings = states_of(model, inputs)
    sizes = inputs["reshaped_input_sizes"]
    expected = model.read_masks(states, embeddings, sizes)
    one = slice(1, 2)
    read = model.read_masks(states[one], embeddings[one], sizes[one])
    for name in FIELDS:
        torch.testing.assert_close(read[name], expected[name][one], atol=1e-5, rtol=0)


def test_targets_say_weights_counts_and_what_is_decoded():
    model, inputs = tiny.tiny_model(), inputs_of()
    states, embeddings = states_of(model, inputs)

    def losses(**kwargs):
        return model.read_masks(states, embeddings, inputs["reshaped_input_sizes"], targets_of(inputs, **kwargs))

    plain = losses()
    config = model.config
    weighted = config.seg_loss_weight * plain.segmentation_loss + config.conf_loss_weight * plain.confidence_loss
    torch.testing.assert_close(plain.loss, weighted)
    # Two samples, both with objects: as part of a batch of eight they bear a fourth, of four L_conf's half.
    part = losses(num_items=8, num_samples=4)
    torch.testing.assert_close(part.segmentation_loss, plain.segmentation_loss / 4)
    torch.testing.assert_close(part.confidence_loss, plain.confidence_loss / 2)
    only = losses(loss_weights={"seg_loss_weight": 0.0, "conf_loss_weight": 3.0})
    torch.testing.assert_close(only.loss, 3.0 * plain.confidence_loss)
    first = losses(sample_weights=torch.tensor([1.0, 0.0]))
    alone = model.read_masks(
        states[:1],
        embeddings[:1],
        inputs["reshaped_input_sizes"][:1],
        MaskTargets(inputs["mask_labels"][:1], inputs["num_objects"][:1]),
    )
    torch.testing.assert_close(first.loss, alone.loss)
    assert plain.pred_masks is not None and losses(decode="matched").pred_masks is None
    torch.testing.assert_close(losses(decode="matched").loss, plain.loss)
    model.train()
    assert losses().pred_masks is None and losses(decode="all").pred_masks.shape == (2, 4, 32, 32)


def test_forward_takes_targets_in_place_of_labels():
    model, inputs = tiny.tiny_model(lm_loss_weight=0.0), inputs_of()
    expected = model(**inputs).loss
    targets = targets_of(inputs, num_items=4, num_samples=4)
    for name in ("mask_labels", "num_objects"):
        del inputs[name]
    torch.testing.assert_close(model(**inputs, targets=targets).loss, expected / 2)
    del inputs["sam_pixel_values"]
    with pytest.raises(ValueError, match="mask_labels need an image for SAM"):
        model(**inputs, targets=targets)


def test_masks_of_some_slots():
    model, inputs = tiny.tiny_model(), inputs_of()
    whole = model(**inputs)
    arguments = (whole.reference_states, whole.slots, model.encode_image(inputs["sam_pixel_values"]))
    some = model.predict_masks(*arguments, inputs["reshaped_input_sizes"], decode_slots=[3, 1])
    assert torch.equal(some.heatmap_logits, whole.heatmap_logits)
    torch.testing.assert_close(some.pred_masks, whole.pred_masks[:, [3, 1]], atol=1e-5, rtol=0)
    none = model.predict_masks(*arguments, decode_slots=[])
    assert none.pred_masks is None and torch.equal(none.heatmap_logits, whole.heatmap_logits)


def test_masks_of_slots_above_a_confidence():
    model, inputs = tiny.tiny_model(), inputs_of()
    with torch.no_grad():
        whole = model(**inputs)
        features = model.encode_image(inputs["sam_pixel_values"])
    threshold = float(whole.slot_logits.flatten().sort().values[[2, 3]].mean())  # 3 of the 8 are below
    kept = whole.slot_logits > threshold
    decoded = []
    handle = model.sam.mask_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: decoded.append(len(kwargs["image_embeddings"])), with_kwargs=True
    )

    def masks_above(logit):
        arguments = (whole.reference_states, whole.slots, features, inputs["reshaped_input_sizes"])
        return model.predict_masks(*arguments, decode_above=logit).pred_masks

    some = masks_above(threshold)
    assert decoded == [5]
    torch.testing.assert_close(some[kept], whole.pred_masks[kept], atol=1e-5, rtol=0)
    assert (some[~kept] == -50).all()
    assert (masks_above(torch.inf) == -50).all()
    handle.remove()
    prompts = inputs_of(training=False)
    seen = model.segment(**prompts, max_new_tokens=12)
    threshold = float(seen.slot_logits.flatten().sort().values[[2, 3]].mean())
    shown = model.segment(**prompts, max_new_tokens=12, decode_above=threshold)
    assert torch.equal(shown.sequences, seen.sequences) and torch.equal(shown.slot_logits, seen.slot_logits)
    above = seen.slot_logits > threshold
    torch.testing.assert_close(shown.pred_masks[above], seen.pred_masks[above], atol=1e-5, rtol=0)
    assert (shown.pred_masks[~above] == -50).all()


def test_states_of_answers():
    # Two prompts of 2 and 3 tokens, answers of 2 and 1.
    layer, last = torch.zeros(2, 5, 1), torch.ones(2, 5, 1)
    ids = torch.tensor([[0, 5, 6, 7, 8], [4, 5, 6, 7, 0]])
    prompt, written = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[True, True], [True, False]])
    states = SequenceStates.of_answers((layer, last), ids, prompt, written)
    assert states.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert states.completion_mask.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    assert states.concept_ids is ids and states.concept_mask is states.attention_mask
    second = states[1:]
    assert second.input_ids.tolist() == second.concept_ids.tolist() == [[4, 5, 6, 7, 0]]
    assert SequenceStates(layer, last, ids, states.attention_mask)[:1].completion_mask is None


def test_the_original_input_has_ids_of_its_own():
    once, model, inputs = tiny.tiny_model(), tiny.tiny_model(concept_input="duplicated"), inputs_of()
    states, _ = states_of(model, inputs)
    assert once.with_concept_states(states) is states
    twice = model.with_concept_states(states, pixel_values=inputs["pixel_values"])
    assert twice.layer_states.shape == states.layer_states.shape and twice.last_states is states.last_states
    assert not torch.equal(twice.concept_ids, twice.input_ids) and twice.input_ids is states.input_ids
    states.completion_mask = None
    with pytest.raises(ValueError, match="needs a completion_mask, got None"):
        model.with_concept_states(states, pixel_values=inputs["pixel_values"])


def test_broken_weights_are_named_where_masks_are_looked_at():
    model, inputs = tiny.tiny_model(), inputs_of()
    states, embeddings = states_of(model, inputs)
    model.slot_mapper.query_proj.weight.data[0, 0] = float("nan")
    assert model.read_masks(states, embeddings).heatmap_logits.isnan().any()  # a trainer skips such a step
    with pytest.raises(ValueError, match="slot_mapper.query_proj.weight"):
        model.read_finite_masks(states, embeddings)


@pytest.mark.parametrize("mixin", [ReadingMixin, SegmentingMixin, LoadingMixin, VlmDelegationMixin, TokenRowsMixin])
def test_a_mixin_names_what_it_needs_of_its_heir(mixin):
    """Whatever it reads of `self` it defines, inherits, annotates, or has from every `PreTrainedModel`."""
    known = set(dir(PreTrainedModel)) | {"training", "_modules"}
    for base in mixin.__mro__:
        known |= set(vars(base)) | set(base.__dict__.get("__annotations__", {}))
    tree = ast.parse(inspect.getsource(mixin))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "model")
    }
    assert read <= known, sorted(read - known)
