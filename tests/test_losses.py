# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Matching and losses: values by hand, brute force, and invariance to how the batch is cut."""

import itertools
import math
import sys

import pytest
import torch

from segcompass_hf.losses_segcompass import SlotAssignments, match_slots, pairwise_soft_iou, segmentation_loss

LN2 = math.log(2)


def batch(batch_size=4, num_slots=3, side=6, counts=(2, 0, 3, 1)):
    return {
        "heatmap_logits": torch.randn(batch_size, num_slots, side, side),
        "pred_masks": torch.randn(batch_size, num_slots, side, side),
        "slot_logits": torch.randn(batch_size, num_slots),
        "mask_labels": torch.rand(batch_size, num_slots, side, side).round(),
        "num_objects": torch.tensor(counts),
    }


def rows(inputs, selection):
    return {name: tensor[selection] for name, tensor in inputs.items()}


def quadrants():
    """Four one-hot 2x2 objects: object j is pixel j."""
    return torch.eye(4).view(1, 4, 2, 2)


def logits_of(mask, high=20.0):
    return (mask * 2 - 1) * high


# ---- soft IoU and matching


def test_soft_iou_by_hand():
    # p = .5 everywhere on 4 pixels, g = two ones: 1 / (2 + 2 - 1) = 1/3; against an empty object: 0 / 2 = 0.
    labels = torch.stack([torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.zeros(2, 2)])[None]
    half = torch.full((1, 1, 2, 2), 0.5)
    torch.testing.assert_close(pairwise_soft_iou(half, labels), torch.tensor([[[1 / 3, 0.0]]]))
    # Only the upper row counts: 1 / (1 + 2 - 1) = 1/2.
    area = torch.tensor([[True, True], [False, False]])[None, None]
    torch.testing.assert_close(pairwise_soft_iou(half, labels, area)[0, 0, 0], torch.tensor(0.5))


def test_nothing_against_nothing_is_zero_not_nan():
    assert pairwise_soft_iou(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == 0.0


def test_matching_finds_a_permutation():
    order = [2, 0, 3, 1]
    assignments = match_slots(logits_of(quadrants()[:, order]), quadrants(), torch.tensor([4]))
    slots, objects = assignments[0]
    assert slots.tolist() == [0, 1, 2, 3] and objects.tolist() == order


def test_filling_masks_are_never_matched():
    # Slot 1 shows mask 3, but only the first object counts: slot 0, which shows it, is taken.
    heatmaps = logits_of(quadrants()[:, [0, 3]])
    (slots, objects), *rest = match_slots(heatmaps, quadrants(), torch.tensor([1]))
    assert (slots.tolist(), objects.tolist(), rest) == ([0], [0], [])


def test_matching_is_optimal_against_brute_force():
    inputs = batch(batch_size=8, num_slots=4, counts=(1, 2, 3, 4, 4, 3, 2, 1))
    assignments = match_slots(
        inputs["heatmap_logits"], inputs["mask_labels"], inputs["num_objects"], inputs["slot_logits"], 0.3
    )
    iou = pairwise_soft_iou(inputs["heatmap_logits"].sigmoid(), inputs["mask_labels"])
    cost = 1 - iou - 0.3 * inputs["slot_logits"].sigmoid()[..., None]
    for sample, (slots, objects) in enumerate(assignments):
        count = int(inputs["num_objects"][sample])
        assert sorted(objects.tolist()) == list(range(count)) and len(set(slots.tolist())) == count
        best = min(
            sum(cost[sample, slot, column].item() for column, slot in enumerate(chosen))
            for chosen in itertools.permutations(range(4), count)
        )
        assert cost[sample, slots, objects].sum().item() == pytest.approx(best, abs=1e-5)


def test_confidence_breaks_ties():
    heatmaps = torch.zeros(1, 3, 2, 2)  # all alike
    confidence = torch.tensor([[-2.0, -1.0, 3.0]])
    (slots, _), *_ = match_slots(heatmaps, quadrants(), torch.tensor([1]), confidence, confidence_weight=0.3)
    assert slots.tolist() == [2]
    (slots, _), *_ = match_slots(heatmaps, quadrants(), torch.tensor([1]), confidence, confidence_weight=0.0)
    assert slots.tolist() == [0]  # the solver's first


def left_column_or_everything():
    """Object: the left column; the right column is padding. Slot 0 covers everything, slot 1 the object at p = 3/4.

    Over the canvas slot 0 has IoU 2/4 and slot 1 (2 * 3/4) / 2 = 3/4; over the left column 1 and 3/4.
    """
    label = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    partial = torch.tensor([[math.log(3), -20.0], [math.log(3), -20.0]])
    heatmaps = torch.stack([torch.full((2, 2), 20.0), partial])[None]
    return heatmaps, label, torch.tensor([[[[True, False], [True, False]]]])


def test_valid_area_decides_the_matching():
    heatmaps, label, area = left_column_or_everything()
    one = torch.tensor([1])
    assert match_slots(heatmaps, label, one)[0][0].tolist() == [1]
    assert match_slots(heatmaps, label, one, valid_area=area)[0][0].tolist() == [0]


def test_assignments_iterate_per_sample():
    inputs = batch()
    assignments = match_slots(inputs["heatmap_logits"], inputs["mask_labels"], inputs["num_objects"])
    assert assignments.pairs_per_sample == [2, 0, 3, 1] and len(assignments) == 4
    assert [len(slots) for slots, _ in assignments] == [2, 0, 3, 1]
    assert assignments.sample_index.tolist() == [0, 0, 2, 2, 2, 3]


def test_nan_logits_give_a_nan_loss():
    inputs = batch()
    inputs["heatmap_logits"] = inputs["heatmap_logits"].index_fill(0, torch.tensor([2]), float("nan"))
    assignments = match_slots(
        inputs["heatmap_logits"], inputs["mask_labels"], inputs["num_objects"], on_nonfinite="match"
    )
    assert assignments.pairs_per_sample == [2, 0, 3, 1]
    assert segmentation_loss(**inputs).loss.isnan()


def test_bad_input_is_named(monkeypatch):
    inputs = batch()
    arguments = (inputs["heatmap_logits"], inputs["mask_labels"], inputs["num_objects"])
    with pytest.raises(ValueError, match=r"sample 2 has NaN"):
        match_slots(arguments[0].index_fill(0, torch.tensor([2]), float("nan")), *arguments[1:])
    with pytest.raises(ValueError, match="sample 1 has num_objects=5, but mask_labels holds 3"):
        match_slots(*arguments[:2], torch.tensor([1, 5, 0, 0]))
    with pytest.raises(ValueError, match=r"mask_labels has shape \(4, 3, 5, 6\), expected \(4, num_masks, 6, 6\)"):
        match_slots(arguments[0], arguments[1][:, :, :5], arguments[2])
    with pytest.raises(ValueError, match=r"num_objects has shape \(3,\), expected \(4,\)"):
        match_slots(*arguments[:2], arguments[2][:3])
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        match_slots(*arguments)


# ---- losses


def single_pair(**overrides):
    """One sample, one slot, four pixels: logits 0 (p = 1/2) against two ones."""
    arguments = {
        "heatmap_logits": torch.zeros(1, 1, 2, 2),
        "pred_masks": torch.zeros(1, 1, 2, 2),
        "slot_logits": torch.zeros(1, 1),
        "mask_labels": torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]]),
        "num_objects": torch.tensor([1]),
    }
    return segmentation_loss(**{**arguments, **overrides})


def test_every_term_by_hand():
    output = single_pair(
        heatmap_bce_weight=2.0,
        heatmap_dice_weight=3.0,
        mask_dice_weight=5.0,
        mask_focal_weight=7.0,
        seg_loss_weight=0.5,
        conf_loss_weight=0.25,
    )
    # BCE ln 2; Dice 1 - 2 * 1 / (2 + 2) = 1/2; focal (1/4 + 3/4) / 2 * (1/2)^2 * ln 2 = ln 2 / 8; L_conf ln 2.
    assert output.heatmap_bce.item() == pytest.approx(LN2, abs=1e-6)
    assert output.heatmap_dice.item() == pytest.approx(0.5, abs=1e-6)
    assert output.mask_dice.item() == pytest.approx(0.5, abs=1e-6)
    assert output.mask_focal.item() == pytest.approx(LN2 / 8, abs=1e-6)
    assert output.confidence_loss.item() == pytest.approx(LN2, abs=1e-6)
    expected = 2 * LN2 + 3 * 0.5 + 5 * 0.5 + 7 * LN2 / 8
    assert output.segmentation_loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.loss.item() == pytest.approx(0.5 * expected + 0.25 * LN2, abs=1e-5)


def test_heatmap_and_mask_terms_read_their_own_maps():
    perfect = logits_of(torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]]))
    output = single_pair(heatmap_logits=perfect)
    assert output.heatmap_bce.item() < 1e-6 and output.heatmap_dice.item() < 1e-6
    assert output.mask_dice.item() == pytest.approx(0.5, abs=1e-6)
    output = single_pair(pred_masks=perfect)
    assert output.mask_dice.item() < 1e-6 and output.mask_focal.item() < 1e-6
    assert output.heatmap_bce.item() == pytest.approx(LN2, abs=1e-6)


def test_padding_has_no_say():
    # Upper row only: BCE ln 2, Dice 1 - 2 * 1 / (1 + 2) = 1/3, focal 1/4 * 1/4 * ln 2 (both pixels positive).
    area = torch.tensor([[[[True, True], [False, False]]]])
    heatmaps = torch.tensor([[[[0.0, 0.0], [9.0, -9.0]]]], requires_grad=True)
    masks = torch.tensor([[[[0.0, 0.0], [5.0, 7.0]]]], requires_grad=True)
    output = single_pair(heatmap_logits=heatmaps, pred_masks=masks, valid_area=area, mask_focal_weight=1.0)
    assert output.heatmap_bce.item() == pytest.approx(LN2, abs=1e-6)
    assert output.mask_dice.item() == pytest.approx(1 / 3, abs=1e-6)
    assert output.mask_focal.item() == pytest.approx(LN2 / 16, abs=1e-6)
    output.loss.backward()
    for gradient in (heatmaps.grad, masks.grad):
        assert gradient[..., 1, :].eq(0).all() and gradient[..., 0, :].ne(0).all()


def test_confidence_targets_are_the_matched_slots():
    # Slot 1 of 2 is matched: logits (0, 2) cost ln 2 and ln(1 + e^-2), averaged; an empty sample wants both low.
    heatmaps = logits_of(quadrants()[:, [3, 0]]).expand(2, -1, -1, -1)
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    labels = quadrants().expand(2, -1, -1, -1)
    output = segmentation_loss(heatmaps, heatmaps, logits, labels, torch.tensor([1, 0]))
    first = (LN2 + math.log1p(math.exp(-2))) / 2
    second = (LN2 + math.log1p(math.exp(2))) / 2
    assert output.confidence_loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert segmentation_loss(heatmaps, heatmaps, None, labels, torch.tensor([1, 0])).confidence_loss.item() == 0.0


def test_empty_samples_excluded_or_zero():
    inputs = batch()
    alone = segmentation_loss(**rows(inputs, torch.tensor([0, 2, 3])), empty_samples="exclude")
    exclude = segmentation_loss(**inputs, empty_samples="exclude")
    zero = segmentation_loss(**inputs, empty_samples="zero")
    torch.testing.assert_close(exclude.segmentation_loss, alone.segmentation_loss)
    torch.testing.assert_close(zero.segmentation_loss, alone.segmentation_loss * 3 / 4)
    torch.testing.assert_close(zero.confidence_loss, exclude.confidence_loss)
    assert exclude.confidence_loss != alone.confidence_loss  # empty samples count there


def test_samples_weigh_alike_whatever_their_number_of_objects():
    inputs = batch()
    singles = [segmentation_loss(**rows(inputs, slice(row, row + 1))).segmentation_loss for row in (0, 2, 3)]
    torch.testing.assert_close(segmentation_loss(**inputs).segmentation_loss, torch.stack(singles).mean())


def test_a_batch_without_objects_trains_confidence_alone():
    inputs = batch(counts=(0, 0, 0, 0))
    leaves = {name: inputs[name].requires_grad_() for name in ("heatmap_logits", "pred_masks", "slot_logits")}
    output = segmentation_loss(**inputs)
    assert output.segmentation_loss.item() == 0.0 and output.loss.isfinite()
    output.loss.backward()
    assert leaves["heatmap_logits"].grad.eq(0).all() and leaves["pred_masks"].grad.eq(0).all()
    assert leaves["slot_logits"].grad.ne(0).all()


@pytest.mark.parametrize("pixel_reduction", ["map", "batch"])
def test_a_sample_of_weight_zero_is_not_there(pixel_reduction):
    inputs = batch()
    chosen = torch.tensor([True, True, False, True])
    weighted = segmentation_loss(**inputs, sample_weights=chosen.float(), pixel_reduction=pixel_reduction)
    without = segmentation_loss(**rows(inputs, chosen), pixel_reduction=pixel_reduction)
    terms = ("heatmap_bce", "heatmap_dice", "mask_dice", "mask_focal")
    for name in ("loss", "segmentation_loss", "confidence_loss", *terms):
        torch.testing.assert_close(weighted[name], without[name])
    assert not torch.isclose(weighted.loss, segmentation_loss(**inputs).loss)
    assert segmentation_loss(**inputs, sample_weights=torch.zeros(4)).loss == 0


def test_weights_of_samples_are_relative():
    inputs = batch(counts=(2, 1, 3, 1))
    alike = segmentation_loss(**inputs, sample_weights=torch.full((4,), 0.25))
    torch.testing.assert_close(alike.loss, segmentation_loss(**inputs).loss)
    with pytest.raises(ValueError, match=r"sample_weights has shape \(3,\), expected \(4,\)"):
        segmentation_loss(**inputs, sample_weights=torch.ones(3))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up_to_the_batch(as_tensor):
    inputs = batch()
    leaf = inputs["heatmap_logits"].clone().requires_grad_()
    whole = segmentation_loss(**{**inputs, "heatmap_logits": leaf})
    (expected,) = torch.autograd.grad(whole.loss, leaf)
    counts = {"num_items": 3, "num_samples": 4}
    if as_tensor:
        counts = {name: torch.tensor(count) for name, count in counts.items()}
    parts = [
        segmentation_loss(**rows({**inputs, "heatmap_logits": leaf}, cut), **counts)
        for cut in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    (gradient,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(gradient, expected)


def test_masks_of_all_slots_of_matched_slots_or_on_demand():
    inputs = batch()
    masks = inputs.pop("pred_masks").requires_grad_()
    whole = segmentation_loss(**inputs, pred_masks=masks)
    (expected,) = torch.autograd.grad(whole.loss, masks)
    calls: list[SlotAssignments] = []

    def decode(assignments):
        calls.append(assignments)
        return masks[assignments.pairs]

    on_demand = segmentation_loss(**inputs, pred_masks=decode)
    assert len(calls) == 1 and calls[0].pairs_per_sample == [2, 0, 3, 1]
    matched = segmentation_loss(**inputs, pred_masks=masks[whole.assignments.pairs], assignments=whole.assignments)
    for other in (on_demand, matched):
        assert torch.equal(other.loss, whole.loss)
    (gradient,) = torch.autograd.grad(on_demand.loss, masks)
    assert torch.equal(gradient, expected)
    with pytest.raises(ValueError, match="pred_masks has 2 maps, but 6 slots are matched"):
        segmentation_loss(**inputs, pred_masks=masks[0, :2])


def test_unmatched_slots_get_no_segmentation_gradient():
    inputs = batch()
    leaf = inputs["pred_masks"].requires_grad_()
    output = segmentation_loss(**inputs)
    output.loss.backward()
    touched = leaf.grad.abs().sum((-1, -2)) > 0
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[output.assignments.pairs] = True
    assert torch.equal(touched, expected)


def test_one_slot_counts_every_sample_as_one_object():
    inputs = batch(num_slots=1, counts=(1, 1, 1, 1))
    without = segmentation_loss(**{**inputs, "num_objects": None})
    torch.testing.assert_close(without.loss, segmentation_loss(**inputs).loss)
    assert without.assignments.slot_index.tolist() == [0, 0, 0, 0]


def test_pixels_pooled_over_the_batch_weigh_large_images_more():
    # Sample 0 has 1 valid pixel with BCE ln(1 + e^2), sample 1 has 3 with BCE ln 2.
    heatmaps = torch.zeros(2, 1, 2, 2)
    heatmaps[0, 0, 0, 0] = 2.0
    area = torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])[:, None]
    arguments = (heatmaps, heatmaps, None, torch.zeros(2, 1, 2, 2), None, area)
    first, second = math.log1p(math.exp(2)), LN2
    pooled = segmentation_loss(*arguments, pixel_reduction="batch").heatmap_bce.item()
    assert pooled == pytest.approx((first + 3 * second) / 4, abs=1e-6)
    assert segmentation_loss(*arguments).heatmap_bce.item() == pytest.approx((first + second) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="leave one of the two out"):
        segmentation_loss(*arguments, pixel_reduction="batch", num_items=2)


def test_matching_area_is_a_choice():
    heatmaps, label, area = left_column_or_everything()
    for valid_only, slot in ((True, 0), (False, 1)):
        output = segmentation_loss(
            heatmaps, heatmaps, None, label, torch.tensor([1]), area, match_valid_area_only=valid_only
        )
        assert output.assignments.slot_index.tolist() == [slot]


def test_bf16_inputs_are_summed_in_float32():
    inputs = batch(side=64)
    reference = segmentation_loss(**inputs)
    half = {name: value if name == "num_objects" else value.to(torch.bfloat16) for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = segmentation_loss(**half)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, reference.loss, rtol=0.01, atol=0)
