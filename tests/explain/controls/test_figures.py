"""Figures and table of the controls, from records made by hand."""

import copy
import math

import pytest
import torch

from segcompass_hf.explain.controls.figures import compared_figures, controls_figures, seed_figures
from segcompass_hf.explain.controls.report import controls_markdown
from segcompass_hf.explain.controls.seeds import FeatureMatches


def mask(first: float, matched: float, interference: float, inside: float) -> dict:
    return {
        "slot": 0,
        "shared_out": 0.1,
        "deletion": 0.2,
        "insertion": 0.9,
        "random_deletion": 0.6,
        "random_insertion": 0.6,
        "specificity": {"own": 0.5, "others": 0.1},
        "matched": {"first": first, "matched": matched, "random": 0.0, "norm_ratio": 1.0},
        "unions": [{"alone": [0.1, 0.2], "together": 0.3 + interference, "interference": interference}],
        "patches": {
            "feature": 3,
            "blocks": 64,
            "firing": 8,
            "effect_inside": inside,
            "without_firing": 0.1,
            "without_causal": 0.1,
            "without_random": 0.9,
        },
    }


def reasoning(followed: bool | None, named: list[bool]) -> dict:
    ious = {"none": 0.2, "reordered": 0.8}
    former = None if followed is None else not followed
    return {
        "iou_to_answer": ious if followed is None else ious | {"error": 0.1},
        "iou_to_truth": {"as_written": 0.9, **ious},
        "shows_named": followed,
        "shows_former": former,
        "named": named,
    }


@pytest.fixture
def records():
    """Three images: with two masks, with one, and with none and no reasoning."""
    two = [mask(0.8, 0.2, 0.5, 0.9), mask(0.6, 0.2, 0.0, 0.7)]
    one = mask(0.4, 0.2, -0.5, 0.8) | {"specificity": None, "matched": None, "patches": None}
    return [
        {"sample_id": "a", "iou": 1.0, "num_features": 9, "masks": two, "reasoning": reasoning(True, [True, False])},
        {"sample_id": "b", "iou": 0.5, "num_features": 9, "masks": [one], "reasoning": reasoning(None, [True])},
        {"sample_id": "c", "iou": 0.0, "num_features": 9, "masks": [], "reasoning": None},
    ]


def test_means_are_over_what_was_measured(records):
    figures = controls_figures(records)
    assert (figures["samples"], figures["masks"]) == (3, 3)
    assert figures["pipeline"]["gIoU"][0] == pytest.approx(0.5)
    assert figures["matched"]["first"][0] == pytest.approx(0.7)  # of 0.8 and 0.6; the third mask has none
    assert figures["matched"]["difference"][0] == pytest.approx(0.5)
    unions = figures["unions"]  # interference 0.5, 0 and -0.5; none without effect
    kinds = ("stand_ins", "additive", "overlap", "idle")
    assert [unions[name][0] for name in kinds] == pytest.approx([1 / 3] * 3 + [0])
    records[1]["masks"][0]["unions"] = [{"alone": [0.05, -0.02], "together": 0.1, "interference": 0.07}]
    assert controls_figures(records)["unions"]["idle"][0] == pytest.approx(1 / 3)
    assert figures["patches"]["effect_inside"][0] == pytest.approx(0.8)
    assert figures["patches"]["area"][0] == pytest.approx(1 / 8)
    words = figures["reasoning"]
    assert words["iou_to_answer"]["none"][0] == pytest.approx(0.2)
    assert words["error_followed"][0] == 1.0 and words["error_ignored"][0] == 0.0  # of the one image with an error
    assert words["shows_what_is_named"][0] == pytest.approx(2 / 3)


def test_pipelines_are_compared_on_the_same_samples(records):
    others = copy.deepcopy(records)
    others[0]["iou"] = 0.4
    for one in others[0]["masks"]:
        one["deletion"] = 0.5
    compared = compared_figures(records, others)
    assert compared["gIoU"]["difference"][0] == pytest.approx(0.2)  # 0.6 on one image of three
    assert compared["deletion (small is good)"]["difference"][0] == pytest.approx(-0.15)  # of two images with masks
    others[1]["sample_id"] = "z"
    with pytest.raises(ValueError, match="different samples"):
        compared_figures(records, others)


def test_how_many_features_come_again():
    matches = FeatureMatches(torch.arange(4), torch.tensor([1.0, 0.8, 0.5, 0.0]), torch.tensor([0.95, 0.95, 0.7, 0.1]))
    figures = seed_figures(matches)
    assert figures["features"] == 4
    assert figures["cosine_0.7"][0] == 0.5 and figures["cosine_0.9"][0] == 0.25
    assert figures["correlation_0.7"][0] == 0.75 and figures["correlation_0.9"][0] == 0.5


def test_the_table_says_what_follows(records):
    figures = controls_figures(records)
    others = copy.deepcopy(records)
    for record in others:
        record["iou"] -= 0.3
    figures["random_sae"] = compared_figures(records, others)
    figures["random_features"] = seed_figures(FeatureMatches(torch.arange(2), torch.ones(2), torch.ones(2)))
    table = controls_markdown(figures, "made by hand", "segcompass explain --controls")
    assert "The first concepts count beyond their norm, by 0.500" in table
    assert "The trained SAE is better in gIoU." in table and "A random one does as well in deletion" in table
    assert "The mask follows the words." in table and "2 concepts that fire, 100 %" in table
    assert "Without the words masks keep IoU 0.20" in table
    first = table.split("The same pipeline")[0]
    assert {line.count("|") for line in first.splitlines() if line.startswith("|")} == {4}


def test_without_masks_there_is_nothing_to_measure():
    empty = [{"sample_id": "a", "iou": 1.0, "num_features": 0, "masks": [], "reasoning": None}]
    figures = controls_figures(empty)
    assert math.isnan(figures["matched"]["first"][0])
    assert controls_markdown(figures, "nothing", "").count("nothing to measure") == 6
