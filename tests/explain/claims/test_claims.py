"""The paper's claims as measurements: values by hand on constructed outputs, all families, padding, odd samples."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_image, tiny_mask, tiny_model, tiny_processor

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.explain.claims.figures import claims_figures, correlation
from segcompass_hf.explain.claims.measure import (
    TOP_PERCENT,
    ClaimRecord,
    _Batch,
    measure_claims,
    squared_errors,
    top_coverage,
)
from segcompass_hf.explain.claims.report import claims_markdown, plot_claims
from segcompass_hf.modeling_concepts import SparseConcepts
from segcompass_hf.modeling_segcompass import SegCompassSegmentationOutput
from segcompass_hf.patch_coverage_segcompass import PatchCoverage

SIZE = (40, 30)  # width, height


def row(num_objects=1, instruction="the red one", others=0, name="a"):
    stripes = tiny_mask(max(1, num_objects + others), SIZE)
    return {
        "image": tiny_image(size=SIZE),
        "instruction": instruction,
        "masks": [encode_mask(mask) for mask in stripes[:num_objects]],
        "distractor_masks": [encode_mask(mask) for mask in stripes[num_objects:]] if others else None,
        "ignore": None,
        "sample_id": name,
        "kind": None,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_records_of_every_family_do_not_depend_on_the_batch(family):
    model, processor = tiny_model(family), tiny_processor(family)
    # slot 0 is always kept, the others never
    model.slot_mapper.confidence_bias = torch.tensor([9.0, -9.0, -9.0, -9.0])
    model.slot_mapper.register_forward_hook(_shift_confidence)
    rows = [row(2), row(0, "all the small blue squares but not the ring", name="b"), row(1, others=1, name="c")]
    together = list(measure_claims(model, processor, rows, batch_size=3, max_new_tokens=16))
    alone = list(measure_claims(model, processor, rows, batch_size=1, max_new_tokens=16))
    assert [record.sample_id for record in together] == ["a", "b", "c"]
    for first, second in zip(together, alone, strict=True):
        first, second = dataclasses.asdict(first), dataclasses.asdict(second)
        assert first["tokens"] == second["tokens"]
        assert np.allclose(_numbers(first), _numbers(second), atol=1e-3), (first, second)
    two, none, one = together
    # 16 new tokens: two tags, four <REF_POS>, the end, and at most nine tokens of reasoning
    assert two.tokens["reasoning"] == 9 and two.tokens["reference"] == 4
    images = sum(two.tokens[place] for place in ("instance", "others", "background", "boundary"))
    assert images == (6 if "qwen" in family else 4), "all image tokens are somewhere"
    assert 0 < sum(two.features.values()) <= 64 * sum(two.tokens.values())
    assert set(two.sae_error) == {"all", "image", "text"} and min(two.sae_error.values()) > 0
    # two stripes cover the image: no background; the one of two objects that is asked for leaves the other
    assert two.tokens["background"] == two.tokens["others"] == 0 and one.tokens["others"] > 0
    assert two.coverage["others"] is None and one.coverage["others"] is not None
    assert len(two.objects) == 2 and len(one.objects) == 1 and sum(o["kept"] for o in two.objects) <= 1
    assert two.coverage["random"][-1] == 1 and math.isclose(two.coverage["activation"][-1], 1)
    # no target: nothing to cover, no object, and a kept slot is wrong
    assert none.coverage is None and none.dice_loss is None and none.objects == [] and none.tokens["instance"] == 0


def _shift_confidence(mapper, inputs, output):
    output.slot_logits = output.slot_logits.clamp(-1, 1) + mapper.confidence_bias


def _numbers(value):
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


@torch.no_grad()
def test_a_record_by_hand():
    """LLaVA, 28 x 28 pixels in 2 x 2 patches; the target is the upper left quarter, and slot 1 finds it."""
    model, processor = tiny_model("llava"), tiny_processor("llava")
    image, quarter = tiny_image(size=(28, 28)), np.zeros((28, 28), bool)
    quarter[:14, :14] = True
    inputs = processor(
        images=image, instruction="the red one", reasoning="a ring", masks=[quarter[None]], return_tensors="pt"
    )
    ids, mask, written = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
    patches = (ids[0] == processor.image_token_id).nonzero()[:, 0].tolist()
    think = (ids[0] == processor.think_start_token_id).nonzero()[-1].item()
    # features: 2 on the first patch (sum 5), 1 each on the second (1) and third (2); 3 on the first word after <think>
    active = [(patches[0], 3.0), (patches[0], 2.0), (patches[1], 1.0), (patches[2], 2.0), *[(think + 1, 1.0)] * 3]
    tokens = torch.tensor([token for token, _ in active])
    concepts = SparseConcepts(
        torch.arange(len(active)), torch.tensor([value for _, value in active]), tokens, 1, ids.shape[1]
    )
    heatmaps = torch.full((1, 4, 32, 32), -9.0)
    heatmaps[:, 1, :16, :16] = 9.0  # exactly the target
    masks = torch.full((1, 4, 32, 32), -9.0)
    masks[:, 1, :16] = 9.0  # the upper half: IoU 1/2, and Dice loss 1 - 2 * 256 / (256 + 512) = 1/3
    output = SegCompassSegmentationOutput(
        sequences=ids,
        attention_mask=mask,
        completion_mask=written,
        slot_logit_threshold=0.0,
        heatmap_logits=heatmaps,
        slot_logits=torch.tensor([[-1.0, 2.0, -1.0, -1.0]]),
        pred_masks=masks,
        concepts=concepts,
    )
    states = torch.randn(1, ids.shape[1], 32)
    reference = {"masks": quarter[None], "ignore": None}
    example = {"instruction": "the red one", "distractor_masks": None, "sample_id": "x", "kind": "k"}
    record = _Batch(model, processor, inputs, output, states, PatchCoverage(processor)).record(0, example, reference)
    assert record.tokens | {"question": 0, "reasoning": 0, "special": 0} == {
        "instance": 1,
        "others": 0,
        "background": 3,
        "boundary": 0,
        "reference": 4,
        "question": 0,
        "reasoning": 0,
        "special": 0,
    }
    assert {place: number for place, number in record.features.items() if number} == {
        "instance": 2,
        "background": 2,
        "reasoning": 3,
    }
    assert record.coverage["activation"] == [1.0] * len(TOP_PERCENT) == record.coverage["features"]
    # the least choice is one patch of four
    assert record.coverage["random"][0] == 0.25 and record.coverage["random"][TOP_PERCENT.index(50)] == 0.5
    assert record.objects == [{"heatmap_iou": 1.0, "mask_iou": 0.5, "kept": True}] and record.iou == 0.5
    assert record.dice_loss == pytest.approx(1 / 3, abs=0.01)  # the edges of soft targets are soft
    # with a stricter threshold no slot is kept: the matched one is still looked at
    output.slot_logit_threshold = 3.0
    strict = _Batch(model, processor, inputs, output, states, PatchCoverage(processor)).record(0, example, reference)
    assert strict.iou == 0.0 and strict.objects == [{"heatmap_iou": 1.0, "mask_iou": 0.5, "kept": False}]


def test_top_coverage_by_hand():
    scores, coverage = np.array([3.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.25, 0.75, 0.0])
    # the best token covers nothing; the two next stand for each other: 0.75 / 2 each; the last has the rest
    assert top_coverage(scores, coverage, [1, 2, 3, 4]) == [0.0, 0.375, 0.75, 1.0]


def test_squared_errors_are_those_of_the_whole_sae():
    sae = tiny_model().sae
    states = torch.randn(5, 32)
    errors, norms = squared_errors(sae, states)
    expected = sae.decode(sae.encode(states)) - states
    torch.testing.assert_close(errors, expected.pow(2).sum(-1))
    torch.testing.assert_close(norms, states.pow(2).sum(-1))
    assert [len(part) for part in squared_errors(sae, states[:0])] == [0, 0]


def test_a_model_that_reads_twice_is_refused():
    model = tiny_model(concept_input="duplicated")
    with pytest.raises(ValueError, match='concept_input = "once"'):
        next(measure_claims(model, tiny_processor(), [row()]))


def record(instance=(1, 10), background=(3, 6), error=0.1, dice=0.2, objects=((0.5, 0.6, True),), gain=0.0):
    """Places as (tokens, features); question and reasoning: 2 tokens, 4 and 8 features."""
    places = {"instance": instance, "others": (0, 0), "background": background}
    places |= {"question": (2, 4), "reasoning": (2, 8)}
    random = [percent / 100 for percent in TOP_PERCENT]
    curve = [min(1.0, share + gain) for share in random]
    return ClaimRecord(
        sample_id=None,
        kind=None,
        iou=1 - dice,
        tokens={place: tokens for place, (tokens, _) in places.items()},
        features={place: features for place, (_, features) in places.items()},
        coverage={"activation": curve, "features": random, "random": random, "others": None} if objects else None,
        sae_error={"all": error, "image": error, "text": error},
        dice_loss=dice if objects else None,
        objects=[dict(zip(("heatmap_iou", "mask_iou", "kept"), values, strict=True)) for values in objects],
    )


def test_figures_by_hand():
    records = [
        record(instance=(1, 10), error=0.1, dice=0.2, objects=[(0.2, 0.3, True)], gain=0.2),
        record(instance=(3, 10), error=0.2, dice=0.4, objects=[(0.4, 0.5, True), (0.6, 0.7, False)], gain=0.2),
        record(instance=(0, 0), error=0.3, dice=0.6, objects=[]),
    ]
    figures = claims_figures(records, num_resamples=200)
    assert figures["samples"] == {"all": 3, "with_target": 2, "without_kept_slot": 0, "objects": 3}
    places = figures["features_per_token"]
    # 20 features on 4 tokens; 18 on 9; resampled, instance tokens have 10 / 1 at most and 10 / 3 at least
    assert places["instance"]["value"] == 5 and places["background"]["value"] == 2
    assert 10 / 3 <= places["instance"]["low"] < 5 < places["instance"]["high"] <= 10
    assert places["instance"]["num_tokens"] == 4 and places["instance"]["num_samples"] == 2
    assert places["others"]["value"] is None, "there are none"
    assert places["question"] == {"value": 2, "low": 2, "high": 2, "num_tokens": 6, "num_samples": 3}
    assert figures["more_features"]["reasoning - background"]["value"] == 2
    assert figures["more_features"]["instance - question"]["value"] == 3
    # 0.2 above random up to 80 %, then 0.1 at 90 % and 0 at 100 %
    area = (0.2 * (len(TOP_PERCENT) - 2) + 0.1) / len(TOP_PERCENT)
    assert figures["coverage"]["area"]["activation"]["value"] == pytest.approx(area)
    assert figures["coverage"]["area"]["features"]["value"] == 0 and "others" not in figures["coverage"]
    assert figures["coverage"]["activation - random"][0]["low"] == pytest.approx(0.2)
    # both points on a line that rises; over objects, mask IoU is heatmap IoU + 0.1
    assert figures["error_and_dice"]["all"]["pearson"]["value"] == pytest.approx(1)
    assert figures["heatmap_and_mask"]["all"]["num_pairs"] == 3
    assert figures["heatmap_and_mask"]["kept"]["num_pairs"] == 2
    assert figures["heatmap_and_mask"]["all"]["spearman"]["value"] == pytest.approx(1)
    assert "| instance | 5.00 [" in claims_markdown(figures)
    assert len(plot_claims(figures, records).axes) == 4


def test_figures_without_any_target():
    figures = claims_figures([record(objects=[]), record(objects=[])], num_resamples=20)
    assert figures["coverage"] is None and figures["error_and_dice"]["all"]["pearson"]["value"] is None
    text = claims_markdown(figures)
    assert "No sample has a target" in text and "undefined" in text
    assert len(plot_claims(figures, [record(objects=[])]).axes) == 4
    with pytest.raises(ValueError, match="0 records"):
        claims_figures([])


def test_correlation_by_hand():
    # deviations -1, 0, 1 and -1, 1, 0: 1 / 2
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0])) == pytest.approx(0.5)
    assert math.isnan(correlation(np.ones(3), np.arange(3.0)))
