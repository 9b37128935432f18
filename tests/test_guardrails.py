"""Guardrails on `segment`, post-processing, pipeline and explanations: by hand, and on the bundled checkpoint."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor
from vlm_families import tiled_model_and_processor

import segcompass_hf
from segcompass_hf.concept_names_segcompass import NamedConcept
from segcompass_hf.data import scenes
from segcompass_hf.explain import Answer, ConceptDictionary
from segcompass_hf.guardrails_segcompass import Guardrail, guardrail_firing, guardrails_of
from segcompass_hf.modeling_concepts import SparseConcepts
from segcompass_hf.pipeline_segcompass import ReasoningSegmentationPipeline

TOKENS = 12


def every_feature(model, threshold=-1e9):
    """A concept that every image token shows on which anything fires."""
    d_sae = model.config.sae_config.d_sae
    return NamedConcept("anything", tuple(range(d_sae)), (threshold,) * d_sae)


def nothing(model):
    return replace(every_feature(model, 1e9), name="nothing")


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    """Every slot and every pixel counts as present: an untrained model might answer with nothing at all."""
    thresholds = {"slot_logit_threshold": -100.0, "mask_logit_threshold": -1e4, "concept_threshold": 0.0}
    model = tiny_model(request.param, **thresholds)
    return model.eval(), tiny_processor(request.param)


@pytest.fixture(scope="module")
def bundled():
    path = segcompass_hf.bundled_checkpoint()
    return AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def red_rows():
    """Scenes where red objects are asked for, and others that say "red" of something else."""
    rows = [row for row in scenes.iterate("val", 120, seed=77) if "red" in row["instruction"].split()]
    return rows[:4]


def answer(model, processor, images, instructions, **kwargs):
    inputs = processor(images=images, instruction=instructions, return_tensors="pt")
    output = model.segment(**inputs, **kwargs)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    return output, processor.post_process_segmentation(output, *sizes, duplicate_iou_threshold=2.0)


def test_a_concept_fires_where_one_of_its_features_reaches_its_threshold():
    concepts = SparseConcepts(
        features=torch.tensor([1, 4, 1, 2]),
        values=torch.tensor([0.5, 2.0, 0.2, 1.0]),
        token_index=torch.tensor([0, 0, 2, 5]),  # of two rows of three tokens
        batch_size=2,
        sequence_length=3,
    )
    rules = [
        Guardrail("forbid", NamedConcept("one", (1,), (0.3,))),
        Guardrail("require", NamedConcept("several", (1, 2), (0.1, 1.0))),
    ]
    firing = guardrail_firing(concepts, rules)
    assert firing.tolist() == [
        [[True, False, False], [True, False, True]],
        [[False, False, False], [False, False, True]],
    ]


def test_masks_are_held_to_rules(tiny):
    model, processor = tiny
    images = [tiny_image(0), tiny_image(1, (64, 24))]  # of different numbers of image tokens in some families
    arguments = (model, processor, images, ["find it", "find the other one, please"])
    _, plain = answer(*arguments, max_new_tokens=TOKENS)
    assert all(len(result["slots"]) and "guardrails" not in result for result in plain)
    output, held = answer(*arguments, max_new_tokens=TOKENS, forbid=every_feature(model))
    assert output.guardrail_firing.shape == (2, 1, output.sequences.shape[1])
    for before, after in zip(plain, held, strict=True):
        assert len(after["slots"]) == 0 and after["text"] == before["text"]
        assert [entry["slot"] for entry in after["guardrails"]] == before["slots"].tolist()
        assert all(entry["share"] == pytest.approx(1, abs=1e-4) for entry in after["guardrails"])
    for rules in ({"forbid": [nothing(model)]}, {"require": [every_feature(model)]}):
        _, held = answer(*arguments, max_new_tokens=TOKENS, **rules)
        for before, after in zip(plain, held, strict=True):
            assert after["guardrails"] == [] and torch.equal(after["masks"], before["masks"])
    _, held = answer(*arguments, max_new_tokens=TOKENS, require=nothing(model))
    assert all(len(after["slots"]) == 0 and after["guardrails"][-1]["slot"] is None for after in held)


def test_what_an_intervention_hides_is_still_seen(tiny):
    model, processor = tiny
    taken = {feature: 0.0 for feature in range(model.config.sae_config.d_sae)}
    arguments = (model, processor, tiny_image(0), "find it")
    _, held = answer(*arguments, max_new_tokens=TOKENS, interventions=taken, forbid=every_feature(model))
    assert len(held[0]["slots"]) == 0 and held[0]["guardrails"]


def test_what_cannot_be_judged_does_not_pass():
    """Nobody knows where the image tokens of overlapping tiles lie."""
    model, processor = tiled_model_and_processor()
    model.config.slot_logit_threshold = -100.0
    inputs = processor(images=tiny_image(0), instruction="find it", return_tensors="pt")
    output = model.segment(**inputs, max_new_tokens=20, forbid=every_feature(model))
    with pytest.raises(ValueError, match="guardrails .* cannot judge the masks of this VLM"):
        processor.post_process_segmentation(output, inputs["original_sizes"], inputs["reshaped_input_sizes"])


def test_a_model_that_reads_its_completion_twice_is_refused():
    model = tiny_model(concept_input="duplicated")
    inputs = tiny_processor()(images=tiny_image(0), instruction="find it", return_tensors="pt")
    with pytest.raises(ValueError, match='concept_input = "once"'):
        model.segment(**inputs, max_new_tokens=TOKENS, forbid=every_feature(model))


def test_rules_that_make_no_sense(tiny):
    model, _ = tiny
    concept = NamedConcept("x", (0,), (0.0,))
    with pytest.raises(ValueError, match="x cannot be both forbidden and required"):
        guardrails_of(model, forbid=concept, require=[concept])
    with pytest.raises(ValueError, match="this SAE has features 0 to"):
        guardrails_of(model, forbid=NamedConcept("x", (10**6,), (0.0,)))
    with pytest.raises(ValueError, match="no concept dictionary beside the model"):
        guardrails_of(model, forbid="red")
    assert guardrails_of(model) == () and len(guardrails_of(model, forbid=[concept, concept])) == 1


def test_a_processor_with_known_places_can_be_copied_and_saved(tiny, tmp_path):
    model, processor = tiny
    answer(model, processor, tiny_image(0), "find it", max_new_tokens=TOKENS, forbid=every_feature(model))
    assert processor._coverage is not None
    for copied in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert copied._coverage is None
    processor.save_pretrained(tmp_path)
    assert "_coverage" not in (tmp_path / "processor_config.json").read_text()


def test_red_objects_are_left_out_by_name(bundled, red_rows):
    model, processor = bundled
    images, instructions = ([row[name] for row in red_rows] for name in ("image", "instruction"))
    _, plain = answer(model, processor, images, instructions)
    _, held = answer(model, processor, images, instructions, forbid=["Red"])
    left_out = 0
    for row, before, after in zip(red_rows, plain, held, strict=True):
        pixels = np.asarray(row["image"]).astype(int)
        for slot, mask in zip(before["slots"].tolist(), before["masks"].numpy(), strict=True):
            red, green, blue = pixels[mask].mean(0)
            is_red = red > 1.5 * max(green, blue)
            assert (slot in after["slots"].tolist()) != is_red
            left_out += is_red
        assert len(after["guardrails"]) == len(before["slots"]) - len(after["slots"])
    assert left_out and sum(len(after["slots"]) for after in held)  # some of each
    with pytest.raises(ValueError, match="named 'rde'. Near: red"):
        answer(model, processor, images[0], instructions[0], forbid=["rde"])


def test_names_are_those_of_the_dictionary(bundled):
    model, _ = bundled
    names = ConceptDictionary.find(model).names()
    (rail,) = guardrails_of(model, forbid="red")
    assert rail.concept.features == names["red"].features
    assert rail.concept.thresholds == pytest.approx(names["red"].thresholds, abs=1e-6)
    assert {"red", "blue", "circle", "large"} <= set(names) and "left" not in names  # a relation is on words alone


def test_the_pipeline_says_what_it_left_out(bundled, red_rows):
    model, processor = bundled
    pipe = ReasoningSegmentationPipeline(model=model, processor=processor)
    samples = [{"image": row["image"], "instruction": row["instruction"]} for row in red_rows[:3]]
    alone = [pipe(sample, forbid="red") for sample in samples]
    together = pipe(samples, forbid=["red"], batch_size=2)
    for one, other, plain in zip(alone, together, pipe(samples), strict=True):
        assert "guardrails" not in plain
        assert [entry["slot"] for entry in one["guardrails"]] == [entry["slot"] for entry in other["guardrails"]]
        assert len(plain["segments"]) == len(one["segments"]) + len(one["guardrails"])
    assert any(one["guardrails"] for one in alone)
    assert pipe(samples[0], require=["red"])["guardrails"] is not None


def test_an_explanation_keeps_to_the_rules(bundled, red_rows):
    model, processor = bundled
    kept = {}
    for name, rules in (("plain", {}), ("held", {"forbid": ["red", "blue", "green", "yellow", "purple", "white"]})):
        kept[name] = Answer(model, processor, red_rows[0]["image"], red_rows[0]["instruction"], **rules).kept
    assert kept == {"plain": True, "held": False}
