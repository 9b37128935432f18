"""Baselines: what they answer, derived by hand, and where SAM is told to look."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_image, tiny_mask, tiny_model, tiny_processor, tiny_sam_image_processor
from transformers import SamProcessor

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation.predictors.baselines import (
    BASELINES,
    SAM_BASELINES,
    AllObjectsPredictor,
    IdealMasksPredictor,
    LargestObjectPredictor,
    RandomObjectPredictor,
    SamBoxCentrePredictor,
    make_baseline,
    mask_box,
)
from segcompass_hf.evaluation.predictors.sam_prompts import PromptedSam, SamPrompt
from segcompass_hf.metrics import segmentation_metrics


def row(targets, others=(), sample_id="sample", image=None):
    """A row on a 40 x 30 picture; `others=None`: not known."""
    return {
        "image": image or tiny_image(),
        "instruction": "the red circle",
        "masks": [encode_mask(mask) for mask in targets],
        "distractor_masks": None if others is None else [encode_mask(mask) for mask in others],
        "sample_id": sample_id,
    }


def rectangle(x1, y1, x2, y2, size=(40, 30)):
    """Columns x1 to x2 and rows y1 to y2, both included."""
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


@pytest.fixture(scope="module")
def sam():
    return tiny_model().sam


@pytest.fixture
def prompts_seen(sam):
    """What SAM's prompt encoder is given, call by call."""
    calls = []
    hook = sam.prompt_encoder.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    hook.remove()


def test_everything_and_nothing_by_hand():
    stripes = tiny_mask(4)  # 10 columns of 40 each
    rows = [row(stripes[:1]), row([])]
    everything = [p.masks for p in make_baseline("everything").predict(rows)]
    nothing = [p.masks for p in make_baseline("nothing").predict(rows)]
    assert [masks.shape for masks in everything] == [(1, 30, 40)] * 2 and all(masks.all() for masks in everything)
    assert [masks.shape for masks in nothing] == [(0, 30, 40)] * 2
    references = [stripes[:1], np.zeros((30, 40), bool)]
    # everything: IoU 1/4 and 0; sums 300 / (1200 + 1200). nothing: IoU 0 and 1
    expected = {"gIoU": 0.125, "cIoU": 0.125, "N-acc": 0.0, "T-acc": 1.0}
    assert segmentation_metrics(everything, references) == pytest.approx(expected)
    expected = {"gIoU": 0.5, "cIoU": 0.0, "N-acc": 1.0, "T-acc": 0.0}
    assert segmentation_metrics(nothing, references) == pytest.approx(expected)


def test_all_objects_are_targets_and_distractors():
    stripes = tiny_mask(4)
    first, second = AllObjectsPredictor().predict([row(stripes[:1], stripes[1:3]), row([], [])])
    assert np.array_equal(first.masks, stripes[:3])
    assert second.masks.shape == (0, 30, 40)


def test_the_largest_object_be_it_meant_or_not():
    stripes = tiny_mask(4)
    large = stripes[1] | stripes[2]
    first, second = LargestObjectPredictor().predict([row(stripes[:1], np.stack([large, stripes[3]])), row([], [])])
    assert np.array_equal(first.masks, large[None])
    assert second.masks.shape == (0, 30, 40)


@pytest.mark.parametrize("kind", [AllObjectsPredictor, LargestObjectPredictor, RandomObjectPredictor])
def test_unknown_distractors_stop_or_are_counted(kind):
    rows = [row(tiny_mask(2), None, "half-known"), row(tiny_mask(1), [], "known")]
    with pytest.raises(ValueError, match='half-known.*targets only.*unknown="empty"'):
        kind().predict(rows)
    predictor = kind(unknown="empty")
    first, second = predictor.predict(rows)
    assert first.masks.shape == (0, 30, 40) and first.text == "[other objects unknown]"
    assert second.masks.shape == (1, 30, 40) and second.text is None
    assert predictor.num_unknown == 1
    with pytest.raises(ValueError, match="unknown is 'skip'"):
        kind(unknown="skip")


def test_random_object_depends_on_seed_and_sample_alone():
    stripes = tiny_mask(4)
    rows = [row(stripes[:1], stripes[1:], f"sample-{index}") for index in range(64)]

    def drawn(predictor, rows):
        masks = [prediction.masks for prediction in predictor.predict(rows)]
        assert all(mask.shape == (1, 30, 40) for mask in masks)
        return [int(np.flatnonzero(mask[0].any(0))[0]) // 10 for mask in masks]  # which stripe

    together = drawn(RandomObjectPredictor(seed=1), rows)
    predictor = RandomObjectPredictor(seed=1)
    assert [drawn(predictor, [one])[0] for one in reversed(rows)] == together[::-1]
    assert drawn(RandomObjectPredictor(seed=2), rows) != together
    counts = np.bincount(together, minlength=4)
    assert counts.min() >= 6  # 16 expected; fewer than 6 of 64 at a chance of 1/4 has a probability below 0.001
    assert RandomObjectPredictor().predict([row([], [])])[0].masks.shape == (0, 30, 40)
    nameless = [row(stripes[:1], stripes[1:], None), row(stripes[1:], stripes[:1], None)] * 2
    assert drawn(predictor, nameless)[:2] == drawn(predictor, nameless)[2:]


def test_box_of_a_mask_holds_first_and_last_pixel():
    assert mask_box(rectangle(10, 5, 19, 14)) == (10, 5, 19, 14)
    assert mask_box(rectangle(3, 29, 3, 29)) == (3, 29, 3, 29)


# 40 x 30 becomes 64 x 48 on the canvas: every coordinate times 1.6. Columns 10..19, rows 5..14: centre (14.5, 9.5).
CENTRE, BOX = [[23.2, 15.2]], [16.0, 8.0, 30.4, 22.4]


@pytest.mark.parametrize(
    ("prompt", "points", "boxes"), [("centre", True, False), ("box", False, True), ("both", 1, 1)]
)
def test_sam_is_shown_the_box_of_the_target(sam, prompts_seen, prompt, points, boxes):
    predictor = SamBoxCentrePredictor(sam, tiny_processor(), prompt)
    target, other = rectangle(10, 5, 19, 14), rectangle(0, 0, 39, 29)
    (prediction,) = predictor.predict([row([target], [other])])
    assert prediction.masks.shape == (1, 30, 40) and prediction.masks.dtype == bool
    assert len(prediction.scores) == 1 and 0 <= prediction.scores[0] <= 1
    (seen,) = prompts_seen
    assert (seen["input_points"] is not None) == bool(points) and (seen["input_boxes"] is not None) == bool(boxes)
    if points:
        torch.testing.assert_close(seen["input_points"], torch.tensor([[CENTRE]]))
        assert seen["input_labels"].tolist() == [[[1]]]
    if boxes:
        torch.testing.assert_close(seen["input_boxes"], torch.tensor([[BOX]]))


def test_masks_are_those_of_transformers_own_processor(sam):
    rows = [row([rectangle(10, 5, 19, 14), rectangle(0, 20, 30, 29)]), row([]), row([rectangle(2, 2, 9, 25)])]
    rows[2]["image"] = tiny_image(3)
    predictions = SamBoxCentrePredictor(sam, tiny_processor(), "both").predict(rows)
    processor = SamProcessor(tiny_sam_image_processor())
    expected = [
        ([[[14.5, 9.5]], [[15, 24.5]]], [[10, 5, 19, 14], [0, 20, 30, 29]]),
        ([[[5.5, 13.5]]], [[2, 2, 9, 25]]),
    ]
    for index, (points, boxes) in zip((0, 2), expected, strict=True):
        inputs = processor(rows[index]["image"], input_points=[points], input_boxes=[boxes], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = {name: value.float() for name, value in inputs.items()}
        with torch.no_grad():
            output = sam(**inputs, multimask_output=False)
        masks = processor.image_processor.post_process_masks([output.pred_masks[0]], *sizes)[0][:, 0].numpy()
        assert np.mean(predictions[index].masks != masks) < 1e-3  # alone or in a batch: the last bits of floats
        assert 0.02 < masks.mean() < 0.98
    assert predictions[1].masks.shape == (0, 30, 40) and predictions[1].scores == []


def test_targets_without_pixels_get_no_mask(sam):
    (prediction,) = SamBoxCentrePredictor(sam, tiny_processor()).predict(
        [row([np.zeros((30, 40), bool), rectangle(1, 1, 5, 5)])]
    )
    assert prediction.masks.shape == (1, 30, 40)


def test_prompts_of_all_forms_keep_their_order(sam, monkeypatch):
    monkeypatch.setattr("segcompass_hf.evaluation.predictors.sam_prompts.PROMPTS_AT_ONCE", 2)
    prompted = PromptedSam(sam, tiny_processor())
    prompts = [SamPrompt((4 * i, 2, 4 * i + 9, 20), ((4 * i + 3, 9),) * (i % 3)) for i in range(6)]
    prompts.append(SamPrompt(points=((20, 10),)))
    ((together, scores),) = prompted.segment([tiny_image()], [prompts])
    for index, prompt in enumerate(prompts):
        ((mask, score),) = prompted.segment([tiny_image()], [[prompt]])
        assert np.mean(together[index] != mask[0]) < 1e-3
        assert scores[index] == pytest.approx(score[0], abs=1e-4)
    assert len({mask.tobytes() for mask in together}) > 1  # the prompts do matter
    with pytest.raises(ValueError, match="empty"):
        SamPrompt()


def test_thin_images_and_other_dtypes(sam):
    thin = Image.new("RGB", (190, 1), (200, 10, 10))  # 64 x 0.34 on the canvas: one pixel high
    half = SamBoxCentrePredictor(copy.deepcopy(sam).bfloat16(), tiny_processor())
    (prediction,) = half.predict([row([rectangle(20, 0, 60, 0, (190, 1))], image=thin)])
    assert prediction.masks.shape == (1, 1, 190)
    assert next(sam.parameters()).dtype == torch.float32


def test_ideal_masks_lose_what_the_maps_cannot_hold():
    # Canvas 64, maps of 32 x 32: a picture of 64 x 32 has cells of 2 x 2 pixels.
    image = tiny_image(size=(64, 32))
    block, needle = rectangle(8, 8, 31, 23, (64, 32)), np.zeros((32, 64), bool)
    needle[16, 32] = True  # a quarter of its cell: its logit is below 0 everywhere
    whole, lost, none = IdealMasksPredictor(tiny_processor()).predict(
        [row([block], image=image), row([block, needle], image=image), row([], image=image)]
    )
    # A pixel takes (3/4)^2 = 9/16 of its logit from its own cell, so what fills cells comes back as it was.
    assert np.array_equal(whole.masks, [block])
    assert np.array_equal(lost.masks[0], block) and not lost.masks[1].any()
    assert none.masks.shape == (0, 32, 64)


def test_wrong_processors_and_names_are_refused(sam):
    with pytest.raises(ValueError, match="resizes images to 128 pixels but this segmenter takes 64"):
        SamBoxCentrePredictor(sam, tiny_sam_image_processor(canvas=128))
    with pytest.raises(ValueError, match="prompt is 'point'"):
        SamBoxCentrePredictor(sam, tiny_processor(), "point")
    with pytest.raises(ValueError, match="no baseline 'all'; choose one of all-objects, everything"):
        make_baseline("all")
    with pytest.raises(ValueError, match="'sam-box' needs `sam` and `processor`"):
        make_baseline("sam-box")


def test_every_baseline_is_made_under_its_name(sam):
    for name in BASELINES:
        needed = {"sam": sam, "processor": tiny_processor()} if name in SAM_BASELINES else {}
        assert make_baseline(name, seed=3, unknown="empty", **needed).name == name
    assert make_baseline("random-object", seed=3, unknown="empty").settings == {"unknown": "empty", "seed": 3}
    settings = make_baseline("sam-box", sam, tiny_processor()).settings
    assert settings["prompt"] == "box" and settings["sam_canvas"] == 64 and len(settings["sam_weights"]) == 64
