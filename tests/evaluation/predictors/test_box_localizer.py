"""A VLM that writes boxes and SAM that segments them: answers read, coordinates mapped by hand, real generation."""

import json
import time

import numpy as np
import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_processor
from transformers import LogitsProcessor, LogitsProcessorList

from segcompass_hf.evaluation.predictors.box_answers import Location, parse_answer
from segcompass_hf.evaluation.predictors.box_localizer import BoxLocalizerPredictor, is_malformed
from segcompass_hf.evaluation.predictors.sam_prompts import PromptedSam, SamPrompt

BOX = Location((1.0, 2.0, 3.0, 4.0))


def named(*numbers, **fields):
    return Location(tuple(map(float, numbers)), **fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4]}]', [BOX]),
        ('```json\n[\n  {"bbox_2d": [1, 2, 3, 4]}\n]\n```', [BOX]),
        ('<think>not [9, 9, 9, 9]</think><answer>[{"bbox_2d": [1,2,3,4]}]</answer><|im_end|>', [BOX]),
        ('<answer>{"bbox": [1, 2, 3, 4]}', [BOX]),
        ('Sure! [{"bbox_2d": [1, 2, 3, 4]}] This is [1] the {red} one.', [BOX]),
        ("[{'bbox_2d': [1, 2, 3, 4],},]", [BOX]),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6,', [BOX]),
        ('First [{"bbox_2d": [9, 9, 10, 10]}], but rather [{"bbox_2d": [1, 2, 3, 4]}]', [BOX]),
        ('{"box": [1, 2, 3, 4]}\n{"box": [5, 6, 7, 8.5]}', [BOX, named(5, 6, 7, 8.5)]),
        ('{"objects": [{"bbox_2d": [[1, 2], [3, 4]]}]}', [BOX]),
        ('{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "cups"}', "two cups"),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [BOX, named(5, 6, 7, 8)]),
        ("The box is [1, 2, 3, 4], see [0.5].", [BOX]),
        ('[{"point_2d": [5, 6], "label": "ant"}]', [Location(None, ((5.0, 6.0),), "ant")]),
        ('{"points": [[5, 6], [7, 8]]}', [Location(None, ((5.0, 6.0), (7.0, 8.0)))]),
        ("[[5, 6], [7, 8]]", [Location(None, ((5.0, 6.0),)), Location(None, ((7.0, 8.0),))]),
        ('{"bbox": [1,2,3,4], "points_1": [2, 2], "points_2": [3, 3]}', [named(1, 2, 3, 4, points=((2, 2), (3, 3)))]),
        ("[]", []),
        ('<answer>{"objects": []}</answer>', []),
        ("There is none.", None),
        ("", None),
        ("[1]", None),
        ('[{"label": "dog"}]', None),
        ('[{"bbox_2d": [1, 2, 3]}]', None),
        ('[{"bbox_2d": [1, 2, 3, true]}]', None),
        ('[{"bbox_2d": [1, 2, 3, NaN]}, {"bbox_2d": [1, 2, 3, 1e999]}]', None),
        ('[{"bbox_2d": [1, 2, 3, 1' + "0" * 400 + "]}]", None),
    ],
)
def test_answers_are_read_whatever_stands_around_them(text, expected):
    if expected == "two cups":
        expected = [named(1, 2, 3, 4, label="cups"), named(5, 6, 7, 8, label="cups")]
    assert parse_answer(text) == expected
    assert is_malformed(text) == (expected is None)


def test_looping_answers_do_not_hang():
    start = time.perf_counter()
    for text in (
        "[" * 50_000,
        "[[1]," * 15_000,
        '{"a": ' * 10_000,
        "]" * 50_000,
        "[1, 2, 3, 4] " * 5_000,
        "9" * 200_000,
    ):
        parse_answer(text)
    assert time.perf_counter() - start < 20
    assert parse_answer("[" * 50_000) is None


def test_places_are_mapped_ordered_and_cut_off():
    size = (30, 40)  # height, width
    assert Location((500, 100, 250, 900)).to_prompt((0.04, 0.03), size) == SamPrompt((10.0, 3.0, 20.0, 27.0))
    assert Location((-5, 10, 99, 20)).to_prompt((1, 1), size) == SamPrompt((0.0, 10.0, 40.0, 20.0))
    assert Location((50, 10, 99, 20)).to_prompt((1, 1), size) is None  # right of the image
    assert Location((7, 8, 7, 20)).to_prompt((1, 1), size) is None  # no width
    both = Location((50, 10, 99, 20), ((3, 4), (41, 4), (3, -1)))
    assert both.to_prompt((1, 1), size) == SamPrompt(None, ((3, 4),))


class Steered(LogitsProcessor):
    """Makes greedy generation write one text per row, then end."""

    def __init__(self, tokenizer, *texts):
        end = tokenizer.eos_token_id
        self.rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
        self.step = 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.rows):
            forced[row, ids[min(self.step, len(ids) - 1)]] = 0
        self.step += 1
        return forced


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def parts(request):
    model, processor = tiny_model(request.param), tiny_processor(request.param)
    return {"vlm": model.vlm, "vlm_processor": processor, "sam": model.sam, "sam_processor": processor}


@pytest.fixture(scope="module")
def qwen():
    model, processor = tiny_model("qwen2_5_vl"), tiny_processor("qwen2_5_vl")
    return {"vlm": model.vlm, "vlm_processor": processor, "sam": model.sam, "sam_processor": processor}


def localizer(parts, *texts, **kwargs):
    steering = LogitsProcessorList([Steered(parts["vlm_processor"].tokenizer, *texts)])
    return BoxLocalizerPredictor(**parts, logits_processor=steering, **kwargs)


def rows(*sizes, instruction="the red circle"):
    return [{"image": tiny_image(size=size), "instruction": instruction} for size in sizes]


def asked(predictor, monkeypatch):
    """The prompts that SAM gets, per image."""
    calls, segment = [], predictor._sam.segment
    monkeypatch.setattr(
        predictor._sam, "segment", lambda images, prompts: calls.append(prompts) or segment(images, prompts)
    )
    return calls


# In each kind of coordinates the same box and point on a picture of 40 x 30 (width x height), and on one of 80 x 60.
ANSWERS = {
    "absolute": [([10, 6, 30, 24], [20, 15]), ([20, 12, 60, 48], [40, 30])],
    "thousand": [([250, 200, 750, 800], [500, 500])] * 2,
    "unit": [([0.25, 0.2, 0.75, 0.8], [0.5, 0.5])] * 2,
}


@pytest.mark.parametrize("coordinates", ANSWERS)
def test_box_and_point_reach_sam_in_pixels(parts, monkeypatch, coordinates):
    answers = [json.dumps([{"bbox_2d": box, "point_2d": point}]) for box, point in ANSWERS[coordinates]]
    predictor = localizer(parts, "<think>the left one</think>" + answers[0], answers[1], coordinates=coordinates)
    calls = asked(predictor, monkeypatch)
    predictions = predictor.predict(rows((40, 30), (80, 60)))
    assert calls == [[[SamPrompt((10, 6, 30, 24), ((20, 15),))], [SamPrompt((20, 12, 60, 48), ((40, 30),))]]]
    assert [prediction.masks.shape for prediction in predictions] == [(1, 30, 40), (1, 60, 80)]
    assert [prediction.text for prediction in predictions] == ["<think>the left one</think>" + answers[0], answers[1]]
    assert [prediction.reasoning for prediction in predictions] == ["the left one", None]
    assert predictor.num_malformed == 0
    direct = PromptedSam(parts["sam"], parts["sam_processor"]).segment([tiny_image()], [calls[0][0]])
    assert np.mean(predictions[0].masks != direct[0][0]) < 1e-3
    assert predictions[0].scores == pytest.approx(direct[0][1], abs=1e-4)


def test_coordinates_of_the_resized_image(qwen, monkeypatch):
    # Sides become multiples of 14 (patches of 7, merged by two): 40 x 30 -> 42 x 28. The box [21, 7, 42, 28] there is
    # [21 * 40 / 42, 7 * 30 / 28, 40, 30]. 80 x 60 has more than 56 * 56 pixels, beta = sqrt(4800 / 3136) = 1.237:
    # floor(80 / beta / 14) = 4 and floor(60 / beta / 14) = 3, so 56 x 42, and [14, 14, 28, 21] is [20, 20, 40, 30].
    predictor = localizer(
        qwen, '[{"bbox_2d": [21, 7, 42, 28]}]', '[{"bbox_2d": [14, 14, 28, 21]}]', coordinates="resized"
    )
    calls = asked(predictor, monkeypatch)
    predictor.predict(rows((40, 30), (80, 60)))
    (((first,), (second,)),) = calls
    assert first.box == pytest.approx((20, 7.5, 40, 30)) and second.box == pytest.approx((20, 20, 40, 30))


def test_resized_without_patch_grid_is_the_size_of_pixel_values():
    model, processor = tiny_model("gemma3"), tiny_processor("gemma3")  # every image becomes 28 x 28
    parts = {"vlm": model.vlm, "vlm_processor": processor, "sam": model.sam, "sam_processor": processor}
    predictor = BoxLocalizerPredictor(**parts, coordinates="resized")
    inputs = predictor._inputs([tiny_image()], ["the circle"])
    assert predictor._sizes_seen(inputs, [tiny_image()]) == [(28, 28)]


def test_crops_cannot_be_traced_back():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    parts = {"vlm": model.vlm, "vlm_processor": processor, "sam": model.sam, "sam_processor": processor}
    with pytest.raises(ValueError, match="CLIPImageProcessorPil does more than resize the image .*do_center_crop"):
        localizer(parts, "[]", coordinates="resized").predict(rows((40, 30)))


def test_image_size_is_what_absolute_pixels_refer_to(qwen, monkeypatch):
    predictor = localizer(qwen, '[{"bbox_2d": [0, 10, 50, 50]}]', image_size=(50, 100))
    calls = asked(predictor, monkeypatch)
    (prediction,) = predictor.predict(rows((40, 30)))
    assert calls == [[[SamPrompt((0, 6, 20, 30))]]]  # x * 40 / 100, y * 30 / 50
    assert prediction.masks.shape == (1, 30, 40)


def test_malformed_answers_are_empty_and_counted(parts):
    texts = [
        "I see nothing.",
        "[]",
        '[{"bbox_2d": [900, 900, 950, 950]}]',  # outside the image
        '[{"bbox_2d": [1, 2, 20, 20]}, {"point_2d": [5, 5]}, {"bbox_2d": [90, 90, 95, 95]}]',
    ]
    predictor = localizer(parts, *texts)
    predictions = predictor.predict(rows(*[(40, 30)] * 4))
    assert [len(prediction.masks) for prediction in predictions] == [0, 0, 0, 2]
    assert [len(prediction.scores) for prediction in predictions] == [0, 0, 0, 2]
    assert predictor.num_malformed == 2
    assert [is_malformed(prediction.text) for prediction in predictions] == [True, False, False, False]


def test_prompt_names_units_and_keeps_words_inert(parts):
    predictor = localizer(parts, "[]", coordinates="thousand")
    assert "thousandths" in predictor.prompt and '"bbox_2d": [100, 200, 350, 600]' in predictor.prompt
    image_id = parts["vlm_processor"].image_token_id
    token = parts["vlm_processor"].image_token
    counts = []
    for words in ("the red circle", f"the {token} circle {{units}}"):
        inputs = predictor._inputs([tiny_image()], [words])
        counts.append(int((inputs["input_ids"] == image_id).sum()))
    assert counts[0] == counts[1] > 0  # an image token in somebody's words is no image
    text = parts["vlm_processor"].tokenizer.decode(inputs["input_ids"][0])
    assert "circle {units}" in text and f"{token[0]} {token[1:]}" in text
    bos = parts["vlm_processor"].tokenizer.bos_token_id
    assert bos is None or int((inputs["input_ids"] == bos).sum()) == 1


def test_settings_tell_runs_apart(qwen):
    settings = BoxLocalizerPredictor(**qwen, coordinates="resized", max_new_tokens=7).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["coordinates"] == "resized" and settings["max_new_tokens"] == 7 and not settings["do_sample"]
    assert settings["vlm_weights"] != settings["sam_weights"]
    assert BoxLocalizerPredictor(**qwen).settings["prompt"] == settings["prompt"]


def test_wrong_arguments_are_refused(qwen):
    for kwargs, message in (
        ({"coordinates": "pixels"}, "coordinates is 'pixels'"),
        ({"prompt_template": "find it"}, "has no {instruction}"),
        ({"do_sample": True}, "decodes greedily"),
    ):
        with pytest.raises(ValueError, match=message):
            BoxLocalizerPredictor(**qwen, **kwargs)


def test_from_pretrained_folders(qwen, tmp_path):
    qwen["vlm"].save_pretrained(tmp_path / "vlm")
    processor = qwen["vlm_processor"]
    processor.tokenizer.save_pretrained(tmp_path / "vlm")
    processor.image_processor.save_pretrained(tmp_path / "vlm")
    qwen["sam"].save_pretrained(tmp_path / "sam")
    predictor = BoxLocalizerPredictor.from_pretrained(
        tmp_path / "vlm",
        tmp_path / "sam",
        logits_processor=LogitsProcessorList([Steered(processor.tokenizer, '[{"bbox_2d": [1, 2, 30, 20]}]')]),
    )
    (loaded,) = predictor.predict(rows((40, 30)))
    (direct,) = localizer(qwen, '[{"bbox_2d": [1, 2, 30, 20]}]').predict(rows((40, 30)))
    assert loaded.text == direct.text and np.array_equal(loaded.masks, direct.masks)
