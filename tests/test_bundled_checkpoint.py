"""The bundled checkpoint does its job: loads in one line, segments held-out scenes, through its concepts."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.metrics import segmentation_metrics

NUM_SCENES = 48


@pytest.fixture(scope="module")
def path():
    return segcompass_hf.bundled_checkpoint()


@pytest.fixture(scope="module")
def model(path):
    return AutoModel.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def processor(path):
    return AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def rows():
    return list(scenes.iterate("val", NUM_SCENES, seed=11))


@pytest.fixture(scope="module")
def inputs(processor, rows):
    return processor(
        images=[row["image"] for row in rows], instruction=[row["instruction"] for row in rows], return_tensors="pt"
    )


@pytest.fixture(scope="module")
def segmented(model, inputs):
    return model.segment(**inputs, output_image_embeddings=True)


def _metrics(processor, output, inputs, rows):
    results = processor.post_process_segmentation(
        output, original_sizes=inputs["original_sizes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
    )
    truth = [decode_masks(row["masks"], row["image"].size[::-1]) for row in rows]
    return results, segmentation_metrics([np.asarray(r["masks"]) for r in results], truth)


def test_loads_by_the_auto_classes(path, model):
    assert type(model) is segcompass_hf.SegCompassForReasoningSegmentation
    assert type(AutoModelForImageTextToText.from_pretrained(path)) is type(model)
    assert model.dtype == torch.float32, "fp16 on disk, float32 in memory"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_no_trace_of_the_machine_that_made_it(path):
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < 12e6
    assert not list(path.rglob("*.py")), "the code is the package's"
    for file in path.glob("*.json"):
        assert "_name_or_path" not in json.dumps(json.loads(file.read_text()))


def test_segments_held_out_scenes(processor, segmented, inputs, rows):
    """Far above the trivial answers (every object: about 0.25); the exact figures are in benchmarks/results."""
    results, metrics = _metrics(processor, segmented, inputs, rows)
    assert metrics["gIoU"] > 0.5, metrics
    assert metrics["T-acc"] > 0.85, metrics
    assert all("answer" in r["reasoning"] for r in results)


def test_the_concepts_carry_the_answer(model, processor, segmented, inputs, rows):
    """With another sample's slots the masks are those of another answer."""
    _, own = _metrics(processor, segmented, inputs, rows)
    changed = model.predict_masks(
        segmented.reference_states,
        segmented.slots.roll(NUM_SCENES // 2, dims=0),
        segmented.image_embeddings,
        inputs["reshaped_input_sizes"],
    )
    segmented_otherwise = type(segmented)(
        **dict(segmented) | {name: changed[name] for name in ("heatmap_logits", "slot_logits", "pred_masks")}
    )
    _, shuffled = _metrics(processor, segmented_otherwise, inputs, rows)
    assert shuffled["gIoU"] < own["gIoU"] / 2, (shuffled, own)


def test_nothing_is_found_where_nothing_fits(model, processor):
    row = next(r for r in scenes.iterate("val", 200, seed=11) if r["kind"] == "no-target")
    assert row["masks"] == [] and "answer none" in row["reasoning"]
    inputs = processor(
        images=row["image"], instruction=row["instruction"], reasoning=row["reasoning"], return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**inputs)
    assert (output.slot_logits < model.config.slot_logit_threshold).all()


def test_pipeline_in_one_line(path, rows):
    answer = pipeline("reasoning-segmentation", model=path)(rows[0]["image"], instruction=rows[0]["instruction"])
    assert answer["reasoning"] and all(s["mask"].size == rows[0]["image"].size for s in answer["segments"])
