# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`heatmap_concepts`: slots look at the concepts of image tokens beside the segmenter's embedding."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import follow_concepts, tiny_config, tiny_image, tiny_mask, tiny_model, tiny_processor

from segcompass_hf import SegCompassForReasoningSegmentation, bundled_checkpoint
from segcompass_hf.explain import Answer
from segcompass_hf.explain.attribution import attribute
from segcompass_hf.token_grids_segcompass import EDGE_UNITS, UnknownPlacesError

NEW = "slot_mapper.concept_proj.weight"
FAMILIES = ("llava", "qwen2_5_vl")


def batch_of(family, rows=(0, 1), answered=True):
    """Rows of images of different sizes, with prompts and answers of different lengths."""
    processor = tiny_processor(family, image_token_grids=True)
    sizes, words = [(40, 30), (60, 84)], ["the largest circle", "all the blue squares but not the small ring"]
    answers = {}
    if answered:
        answers["reasoning"] = [["there is one", "I see two candidates"][row] for row in rows]
        answers["masks"] = [tiny_mask(row + 1, sizes[row]) for row in rows]
    images = [tiny_image(row, sizes[row]) for row in rows]
    return processor(images=images, instruction=[words[row] for row in rows], return_tensors="pt", **answers)


def seeing(family="llava", **fields):
    """A model whose heatmaps depend on concepts, through slots and through image tokens."""
    return follow_concepts(tiny_model(family, heatmap_concepts=True, **fields))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return seeing(family)


def without(model):
    """The same weights in a model that has no such projection."""
    other = tiny_model(model.config.vlm_config.model_type)
    other.load_state_dict({name: weight for name, weight in model.state_dict().items() if name != NEW})
    return other


def test_it_starts_at_zero_and_leaves_answers_as_they_are(family, model):
    fresh = SegCompassForReasoningSegmentation(tiny_config(family, heatmap_concepts=True)).eval()
    assert not fresh.slot_mapper.concept_proj.weight.any()
    plain = without(model)
    fresh.load_state_dict(plain.state_dict() | {NEW: fresh.slot_mapper.concept_proj.weight})
    inputs = batch_of(family)
    with torch.no_grad():
        expected, got, other = plain(**inputs), fresh(**inputs), model(**inputs)
    for name in ("loss", "heatmap_logits", "pred_masks", "slot_logits"):
        assert torch.equal(got[name], expected[name]), name
    assert (other.heatmap_logits - expected.heatmap_logits).abs().max() > 0.1
    assert torch.equal(other.slot_logits, expected.slot_logits)  # confidences read slots and references alone


def test_scores_add_what_the_concepts_of_each_place_say(family, model):
    """By hand: `q . W_k (v + W_m m)` with `m` from the codebook's rows of each token, interpolated by torch."""
    inputs = batch_of(family, rows=(0,), answered=False)
    grid = inputs["image_token_grids"][0]
    grid[2:] = torch.tensor([0, EDGE_UNITS, 0, EDGE_UNITS])  # as if nothing were cropped, so that torch can resize it
    inputs["reshaped_input_sizes"] = torch.tensor([[64, 64]])
    with torch.no_grad():
        output = model(**inputs, output_concepts=True, output_image_embeddings=True)
        is_image = inputs["input_ids"][0] == model.config.image_token_id
        dense = output.concepts.dense(model.config.sae_config.d_sae)[0, is_image]  # (tokens, d_sae)
        tokens = (dense @ model.codebook.weight).view(1, int(grid[0]), int(grid[1]), -1).permute(0, 3, 1, 2)
        placed = torch.nn.functional.interpolate(tokens, (8, 8), mode="bilinear", antialias=True)
        seen = torch.einsum("sd,bdij->bsij", model.slot_mapper.concept_proj.weight, placed)
        plain = without(model).slot_mapper(output.reference_states, output.slots, output.image_embeddings + seen)
    torch.testing.assert_close(output.heatmap_logits, plain.heatmap_logits, rtol=0, atol=1e-4)


def test_a_batch_is_its_rows_alone(family, model):
    both = batch_of(family)
    with torch.no_grad():
        output = model(**both)
        for row in (0, 1):
            alone = model(**batch_of(family, rows=(row,)))
            torch.testing.assert_close(alone.heatmap_logits[0], output.heatmap_logits[row], rtol=0, atol=2e-4)
    assert (both["attention_mask"] == 0).any()


def test_segment_is_forward_over_what_it_wrote(family, model):
    inputs = batch_of(family, answered=False)
    written = model.segment(**inputs, max_new_tokens=14)
    whole = {**inputs, "input_ids": written.sequences, "attention_mask": written.attention_mask}
    with torch.no_grad():
        output = model(**whole, completion_mask=written.completion_mask)
    torch.testing.assert_close(output.heatmap_logits, written.heatmap_logits, rtol=0, atol=2e-4)
    two = model.segment(**inputs, max_new_tokens=14, num_return_sequences=2, do_sample=True)
    assert len(two.heatmap_logits) == 4
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2  # text needs no places


def test_gradients_reach_the_projection_and_through_it_the_codebook(family):
    model = seeing(family).freeze_for_training().train()
    inputs = batch_of(family)
    model(**inputs).loss.backward()
    gradient = model.codebook.weight.grad.clone()
    assert model.slot_mapper.concept_proj.weight.grad.abs().max() > 1e-4
    assert all(parameter.grad is None for parameter in model.sae.parameters())
    model.zero_grad()
    torch.nn.init.zeros_(model.slot_mapper.concept_proj.weight)
    model(**inputs).loss.backward()
    assert model.slot_mapper.concept_proj.weight.grad.abs().max() > 1e-4  # it can leave zero
    assert (model.codebook.weight.grad - gradient).abs().max() > 1e-4


def test_saved_and_loaded_with_its_processor(tmp_path, family, model):
    inputs = batch_of(family)
    model.save_pretrained(tmp_path)
    tiny_processor(family, image_token_grids=True).save_pretrained(tmp_path)
    loaded = SegCompassForReasoningSegmentation.from_pretrained(tmp_path)
    assert loaded.config.heatmap_concepts is True
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).pred_masks, model(**inputs).pred_masks)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[NEW]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of this model .{NEW}"):
        SegCompassForReasoningSegmentation.from_pretrained(tmp_path)


def test_it_is_switched_on_in_a_checkpoint_that_was_without():
    from segcompass_hf import SegCompassProcessor
    from segcompass_hf.data import scenes

    image = next(iter(scenes.iterate("val", 1)))["image"]
    answers = []
    for fields in ({}, {"heatmap_concepts": True}):
        processor = SegCompassProcessor.from_pretrained(bundled_checkpoint())
        processor.use_image_token_grids(bool(fields))
        model = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint(), **fields)
        answers.append(model.segment(**processor(images=image, instruction="the largest ring"), reasoning="none"))
    assert NEW in model.state_dict()
    assert torch.equal(answers[0].pred_masks, answers[1].pred_masks)


def test_composing_tells_the_processor(tmp_path):
    parts, processor = tiny_model(), tiny_processor()
    fields = {"num_slots": 4, "sae_layer": 2, "d_slot": 32, "slot_encoder_heads": 4, "processor": processor}
    compose = SegCompassForReasoningSegmentation.from_pretrained_parts
    model = compose(parts.vlm, parts.sam, parts.sae, heatmap_concepts=True, **fields)
    assert processor.image_token_grids is True and not model.slot_mapper.concept_proj.weight.any()
    compose(parts.vlm, parts.sam, parts.sae, **fields)
    assert processor.image_token_grids is False


def test_families_without_places_are_refused_before_anything_is_made(monkeypatch):
    def no_places(self, height, width):
        raise UnknownPlacesError("tiles")

    monkeypatch.setattr(type(tiny_processor()), "token_grid", no_places)
    parts = tiny_model()
    with pytest.raises(UnknownPlacesError, match="tiles"):
        SegCompassForReasoningSegmentation.from_pretrained_parts(
            parts.vlm, parts.sam, parts.sae, heatmap_concepts=True, d_slot=32, processor=tiny_processor()
        )


def test_what_is_missing_is_named(model, family):
    inputs = batch_of(family)
    grids = inputs.pop("image_token_grids")
    with pytest.raises(ValueError, match="no image_token_grids.*processor.image_token_grids = True"):
        model(**inputs)
    with pytest.raises(ValueError, match="image tokens, but their image_token_grids have"):
        model(**inputs, image_token_grids=grids + torch.tensor([1, 0, 0, 0, 0, 0]))
    with torch.no_grad():
        output = model(**inputs, image_token_grids=grids, output_image_embeddings=True)
    with pytest.raises(ValueError, match="need a concept_grid"):
        model.predict_masks(output.reference_states, output.slots, output.image_embeddings)
    read = {"slots": output.slots, "reference_states": output.reference_states}
    with pytest.raises(ValueError, match="needs the image_concept_embeddings"):
        model(**read, image_embeddings=output.image_embeddings, image_token_grids=grids)
    assert model(**read).slot_logits.shape == (2, 4)  # confidences alone need no image
    with torch.no_grad():
        assert without(model)(**batch_of(family)).pred_masks is not None  # grids that nobody reads do no harm
    config = tiny_config(family)
    with pytest.raises(Exception, match="image_token_id is None"):
        config.heatmap_concepts, config.image_token_id = True, None
        config.validate()


def test_states_read_before_give_the_same_masks(model, family):
    inputs = batch_of(family)
    with torch.no_grad():
        whole = model(**inputs, output_concept_embeddings=True, output_image_embeddings=True)
        is_image = inputs["input_ids"] == model.config.image_token_id
        patches = [row[where] for row, where in zip(whole.concept_embeddings, is_image, strict=True)]
        patches = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True, padding_value=9.0)
        again = model(
            slots=whole.slots,
            reference_states=whole.reference_states,
            image_concept_embeddings=patches,
            image_embeddings=whole.image_embeddings,
            **{name: inputs[name] for name in ("image_token_grids", "reshaped_input_sizes")},
        )
    torch.testing.assert_close(again.pred_masks, whole.pred_masks, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def answer(family, model):
    model.config.slot_logit_threshold = -100.0  # every slot is kept
    processor = tiny_processor(family, image_token_grids=True)
    return Answer(model, processor, tiny_image(), "the red thing", max_new_tokens=12)


def test_replayed_interventions_are_those_of_segment(answer):
    ids = answer.captured.features.tolist()
    from segcompass_hf import ConceptIntervention

    for change in ({ids[0]: 0.0}, [ConceptIntervention(i, scale=0.0, tokens="image") for i in ids]):
        expected = answer.model.segment(**answer.inputs, **answer.segment_kwargs, interventions=change)
        replayed = answer.replay.run(answer.replay.embed_interventions(change), answer.slots)
        torch.testing.assert_close(replayed.heatmap_logits, expected.heatmap_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(replayed.pred_masks, expected.pred_masks, rtol=0, atol=1e-4)
    assert (expected.heatmap_logits - answer.captured.heatmap_logits).abs().max() > 0.1


def test_attribution_counts_the_path_through_image_tokens(answer, monkeypatch):
    """Slots are held: all that a mask then loses with its concepts goes through the image tokens."""
    replay, encoder = answer.replay, answer.model.slot_encoder
    weight = answer.model.slot_mapper.concept_proj.weight
    monkeypatch.setattr(weight, "data", 50 * weight)  # SAM's decoder of random weights hardly follows its prompts
    with torch.no_grad():
        held = encoder(replay.embed(replay.captured.concepts.values[None]))
    constant = lambda embeddings: type(held)(slots=held.slots.expand(len(embeddings), -1, -1))  # noqa: E731
    monkeypatch.setattr(encoder, "forward", constant)
    found = attribute(replay, answer.slots[:1], "mask_logit")[0]
    assert abs(found.value - found.baseline_value) > 1e-3 and found.completeness_error < 1e-3
    is_image = answer.model.modality_ids(replay.captured.sequences)[0, replay.captured.concepts.token_index] == 1
    assert is_image.any() and (~is_image).any()
    share = found.contributions[is_image].abs().sum() / found.contributions.abs().sum()
    assert share > 0.95  # within a feature, its text tokens share by gradients of zero
