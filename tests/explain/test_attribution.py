"""Attribution and `explain`: shares add up, a linear model is explained exactly, padding changes nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import follow_concepts, tiny_image, tiny_model, tiny_processor

from segcompass_hf import (
    SegCompassForReasoningSegmentation,
    SegCompassProcessor,
    SparseConcepts,
    bundled_checkpoint,
)
from segcompass_hf.data import decode_mask, scenes
from segcompass_hf.explain import attribute, explain, mask_to_rle
from segcompass_hf.explain.attribution import FAINT, _levels
from segcompass_hf.explain.faithfulness import (
    faithfulness_curves,
    feature_orders,
    mask_readings,
)
from segcompass_hf.explain.paths import FIRST
from segcompass_hf.explain.replay import Replay, capture
from segcompass_hf.explain.scalars import Scalars
from segcompass_hf.explain.sufficient import minimal_sufficient_set


class LinearReplay(Replay):
    """Slot logits are a linear reading of the concept embeddings: 2 for the first channel, -1 for the second."""

    def __init__(self):
        concepts = SparseConcepts(
            features=torch.tensor([3, 8, 3]),
            values=torch.tensor([1.0, 2.0, 4.0]),
            token_index=torch.tensor([0, 0, 2]),
            batch_size=1,
            sequence_length=3,
        )
        self.captured = SimpleNamespace(concepts=concepts, pred_masks=torch.ones(1, 1, 2, 2))
        self.model = SimpleNamespace(config=SimpleNamespace(mask_logit_threshold=0.0))
        self.codes = torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 0.0]])  # feature 3: (1, 0), feature 8: (0, 3)
        self.valid_area = None

    def maps(self, embeddings):
        reading = (embeddings * torch.tensor([2.0, -1.0])).sum((1, 2))
        return SimpleNamespace(slot_logits=0.5 + reading[:, None], heatmap_logits=None)


def test_a_linear_model_is_explained_exactly():
    (found,) = attribute(LinearReplay(), [0], "slot_logit")
    # v * code . reading: 1 * 2 = 2; 2 * 3 * -1 = -6; 4 * 2 = 8
    torch.testing.assert_close(found.contributions, torch.tensor([2.0, -6.0, 8.0]))
    assert found.value == pytest.approx(4.5) and found.baseline_value == pytest.approx(0.5)
    assert found.quadrature_error < 1e-5 and found.completeness_error < 1e-5

    (found,) = attribute(LinearReplay(), [0], "slot_logit", "paths")
    torch.testing.assert_close(found.contributions, torch.tensor([2.0, -6.0, 8.0]))

    (found,) = attribute(LinearReplay(), [0], "slot_logit", "straight")
    # what is left of each token at FAINT goes in a jump of FAINT * 4; half of it per token, a token's concepts alike
    jump = FAINT * 4 * torch.tensor([0.25, 0.25, 0.5])
    torch.testing.assert_close(found.contributions, (1 - FAINT) * torch.tensor([2.0, -6.0, 8.0]) + jump)
    assert found.completeness_error < 1e-5


class ProductReplay(LinearReplay):
    """Slot logit: the two features' levels multiplied, an "and"."""

    def maps(self, embeddings):
        first, second = embeddings.sum(1).unbind(-1)  # 5 and 6 where both features are whole
        return SimpleNamespace(slot_logits=(first * second)[:, None] / 30, heatmap_logits=None)


def test_an_and_is_shared_by_halves():
    """x y at whole levels 1: each brings 1 if the other is there, 0 if not; the other's mean level is a half.

    Taken away from the whole, each costs 1: the means of both, 3/4 each, are half a change too much.
    """
    (found,) = attribute(ProductReplay(), [0], "slot_logit", "levels", num_points=256)
    features, index = torch.tensor([3, 8, 3]).unique(return_inverse=True)
    torch.testing.assert_close(found.per_feature(features, index), torch.tensor([0.5, 0.5]), rtol=0, atol=0.05)
    # feature 3 stands on two tokens, with activations 1 and 4 of the 5
    torch.testing.assert_close(found.contributions[2], 4 * found.contributions[0])
    assert found.quadrature_error == pytest.approx(0.5, abs=0.1) and found.completeness_error < 1e-5
    (again,) = attribute(ProductReplay(), [0], "slot_logit", "levels", num_points=256)
    assert torch.equal(found.contributions, again.contributions), "nothing is random but by seed"
    (few,) = attribute(ProductReplay(), [0], "slot_logit", "levels", num_points=2)
    assert torch.isfinite(few.contributions).all() and few.completeness_error < 1e-5


def test_paths_measure_and_spread_nothing():
    """Of "x and y" the last to come brings everything, and the first to go takes everything: half of it is each's."""
    (found,) = attribute(ProductReplay(), [0], "slot_logit")  # the default
    features, index = torch.tensor([3, 8, 3]).unique(return_inverse=True)
    torch.testing.assert_close(found.per_feature(features, index), torch.tensor([0.5, 0.5]), rtol=0, atol=1e-5)
    assert found.quadrature_error < 1e-5 and found.completeness_error < 1e-5 and found.measured.all()


class SquareReplay(LinearReplay):
    """Slot logit: the first feature's level squared, and the second's."""

    def maps(self, embeddings):
        first, second = embeddings.sum(1).unbind(-1)
        return SimpleNamespace(slot_logits=((first / 5) ** 2 + second / 6)[:, None], heatmap_logits=None)


def test_a_curve_is_walked_up_and_not_judged_at_its_end():
    """x x + y rises by 1 for each of them, though the gradient of x x at its end is 2."""
    scalars = Scalars(SquareReplay(), [0], "slot_logit")
    found = _levels(scalars, 64, seed=0)[0]
    torch.testing.assert_close(torch.stack([found[[0, 2]].sum(), found[1]]), torch.ones(2), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "guess"}, "method must be one of"),
        ({"target": "loss"}, "target must be one of"),
        ({"num_points": 1}, "num_points=1"),
    ],
)
def test_wrong_arguments_of_attribute(arguments, words):
    with pytest.raises(ValueError, match=words):
        attribute(LinearReplay(), [0], **({"target": "slot_logit"} | arguments))


@pytest.fixture(scope="module")
def bundled():
    path = bundled_checkpoint()
    model = SegCompassForReasoningSegmentation.from_pretrained(path).eval()
    return model, SegCompassProcessor.from_pretrained(path), list(scenes.iterate("val", 2))


@pytest.fixture(scope="module")
def first(bundled):
    model, processor, rows = bundled
    replay = Replay(model, capture(model, processor(images=rows[0]["image"], instruction=rows[0]["instruction"]))[0])
    return replay, attribute(replay, replay.captured.kept_slots)


def test_contributions_add_up_on_the_bundled_checkpoint(first):
    replay, attributions = first
    assert [a.slot for a in attributions] == replay.captured.kept_slots and attributions
    for attribution in attributions:
        # the scalar by its definition: the mean logit where the mask is (these images fill SAM's canvas)
        logits = replay.captured.pred_masks[0, attribution.slot]
        assert attribution.value == pytest.approx(logits[logits > 0].mean().item(), rel=1e-4)
        assert len(attribution.contributions) == len(replay.captured.concepts.values)
        change = attribution.value - attribution.baseline_value
        assert attribution.contributions.sum().item() == pytest.approx(change, rel=0.01)
        assert attribution.completeness_error < 0.01
    (contrast,) = attribute(replay, [attributions[0].slot], "mask_contrast", num_points=4)
    logits = replay.captured.pred_masks[0, contrast.slot]
    outside = logits[logits <= 0].mean().item()
    assert contrast.value == pytest.approx(attributions[0].value - outside, rel=1e-4)
    assert contrast.completeness_error < 0.01
    (paths,) = attribute(replay, [attributions[0].slot], method="paths")
    others = paths.per_feature(*replay.captured.concepts.features.unique(return_inverse=True))[~paths.measured]
    change = abs(paths.value - paths.baseline_value)
    assert paths.quadrature_error == pytest.approx(others.abs().sum().item() / change, abs=1e-4)
    assert paths.measured.sum() == FIRST
    (straight,) = attribute(replay, [attributions[0].slot], method="straight")
    assert straight.completeness_error < 0.01 and straight.quadrature_error < 0.05


def test_neighbours_in_a_batch_change_nothing(bundled, first):
    model, processor, rows = bundled
    replay, attributions = first
    inputs = processor(
        images=[rows[0]["image"]] * 2, instruction=[rows[0]["instruction"], rows[0]["instruction"] + " please " * 9]
    )
    batched = capture(model, inputs)[0]  # padded on the left by 9 tokens
    assert batched.sequences.equal(replay.captured.sequences)
    assert batched.concepts.token_index.equal(replay.captured.concepts.token_index)
    again = attribute(Replay(model, batched), batched.kept_slots)
    for one, other in zip(attributions, again, strict=True):
        scale = one.contributions.abs().max().item()
        torch.testing.assert_close(one.contributions, other.contributions, rtol=0, atol=1e-2 * scale)


def test_attribution_orders_better_than_chance_and_its_sufficient_set_suffices(first):
    replay, attributions = first
    attribution = attributions[0]
    orders = feature_orders(replay, attribution)
    curves = faithfulness_curves(replay, attribution, {n: orders[n] for n in ("attribution", "random")}, (0.1, 0.5))
    for curve in curves.values():
        assert curve.deletion_iou[0] == curve.insertion_iou[-1] == 1.0
        assert curve.deletion_iou[-1] == pytest.approx(curve.insertion_iou[0])
    assert curves["attribution"].deletion_area < curves["random"].deletion_area
    # areas by hand: trapezia of width 0.1, 0.4 and 0.5
    a, b, c, d = curves["random"].deletion_iou
    assert curves["random"].deletion_area == pytest.approx(0.05 * (a + b) + 0.2 * (b + c) + 0.25 * (c + d))

    found = minimal_sufficient_set(replay, attribution, min_iou=0.9, max_evaluations=60)
    assert 0 < len(found.features) <= found.prefix_size <= found.num_features
    kept = torch.isin(replay.captured.concepts.features, torch.tensor(found.features))
    assert mask_readings(replay, attribution, kept[None])[0][0] == pytest.approx(found.iou) and found.iou >= 0.9
    with pytest.raises(ValueError, match="min_iou"):
        minimal_sufficient_set(replay, attribution, min_iou=0.0)


def test_explain_the_bundled_checkpoint(bundled):
    model, processor, rows = bundled
    image, truth = rows[0]["image"], np.zeros((1, 112, 112), dtype=bool)
    explanation = explain(
        model, processor, image, rows[0]["instruction"], num_ablations=2, max_concepts=7, true_masks=truth
    )
    assert explanation.model_name == "scenes-tiny" and explanation.masks
    for mask in explanation.masks:
        assert mask.kept and mask.mask.shape == (112, 112) and mask.iou_to_truth == 0.0  # truth is an empty mask
        assert len(mask.concepts) == 7 < mask.num_concepts
        sizes = [abs(concept.contribution) for concept in mask.concepts]
        assert sizes == sorted(sizes, reverse=True)
        assert [concept.ablation is not None for concept in mask.concepts] == [True] * 2 + [False] * 5
        for concept in mask.concepts:
            assert concept.share == pytest.approx(concept.contribution / (mask.value - mask.baseline_value), rel=1e-3)
            assert sum(t.contribution for t in concept.tokens) == pytest.approx(concept.contribution, abs=1e-3)
            assert all(0 <= t.position < len(explanation.tokens) and t.activation > 0 for t in concept.tokens)
    kinds = {token.kind for token in explanation.tokens}
    assert kinds == {"special", "question", "image", "reasoning", "reference"}
    plain = json.loads(json.dumps(explanation.to_dict()))
    assert plain["masks"][0]["mask"] == mask_to_rle(explanation.masks[0].mask)
    for written, mask in zip(plain["masks"], explanation.masks, strict=True):  # the package reads what it writes
        assert np.array_equal(decode_mask(written["mask"]), mask.mask)
        for concept, meant in zip(written["concepts"][:2], mask.concepts, strict=False):
            changed = [decode_mask(rle) for rle in concept["ablation"]["masks"]]
            assert np.array_equal(changed, meant.ablation.masks)


def test_odd_answers_are_explained_too():
    model, processor, image = follow_concepts(tiny_model("llava")), tiny_processor("llava"), tiny_image()

    def run(**arguments):
        return explain(model, processor, image, "the red thing", max_new_tokens=8, num_ablations=1, **arguments)

    model.config.slot_logit_threshold = 100.0  # nothing is kept: the strongest slot says why
    (mask,) = run().masks
    assert not mask.kept and mask.target == "slot_logit" and mask.completeness_error < 0.01
    model.config.slot_logit_threshold = -100.0  # every slot is kept
    masks = run(target="mask_contrast", max_concepts=0).masks
    assert len(masks) == model.config.num_slots and all(mask.concepts == [] for mask in masks)
    assert all(mask.target == "mask_contrast" and abs(mask.value - mask.baseline_value) > 1e-3 for mask in masks)
    assert len({round(mask.value, 4) for mask in masks}) == len(masks)  # of each slot its own
    with torch.inference_mode():
        again = run(target="mask_contrast", max_concepts=0).masks
    assert [mask.value for mask in again] == [mask.value for mask in masks]

    model.config.concept_threshold = 1e9  # no concept is active
    for mask in run().masks:
        assert mask.concepts == [] and mask.value == mask.baseline_value and mask.completeness_error == 0
    with pytest.raises(ValueError, match="num_ablations=-1"):
        explain(model, processor, image, "the red thing", num_ablations=-1)
    with pytest.raises(ValueError, match="one instruction"):
        explain(model, processor, image, ["the red thing", "the blue thing"])
    model.slot_mapper.query_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="slot_mapper"):
        run()
    with torch.inference_mode():
        model = tiny_model("llava")
    with pytest.raises(ValueError, match="load the model outside of it"):
        run()
