"""Masks held to rules, by hand."""

from types import SimpleNamespace

import pytest
import torch

from segcompass_hf.judging_segcompass import SHOWN_SHARE, judge_masks


def rail(rule, name):
    return SimpleNamespace(rule=rule, concept=SimpleNamespace(name=name))


# Four image tokens. Masks: all of token 0 and half of token 1; token 2; nowhere.
COVERAGE = torch.tensor([[1.0, 0.5, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]])
RED, ROUND = [True, False, False, False], [False, True, True, False]  # red: 2/3 and 0 of them; round: 1/3 and 1


def test_forbidden_concepts_leave_masks_out():
    stays, log = judge_masks(COVERAGE, torch.tensor([RED]), [rail("forbid", "red")], [0, 2, 3])
    assert stays == [False, True, True]
    (entry,) = log
    assert entry["slot"] == 0 and entry["rule"] == "forbid" and entry["concept"] == "red"
    assert entry["share"] == pytest.approx(2 / 3)
    assert entry["reason"] == (
        "the mask of slot 0 shows 'red', which is forbidden: it fires on 67% of the mask's image tokens, and 30% show "
        "it."
    )


def test_required_concepts_leave_the_others_out():
    stays, log = judge_masks(COVERAGE, torch.tensor([RED]), [rail("require", "red")], [0, 2, 3])
    assert stays == [True, False, False]  # a mask on no image token shows nothing
    assert [(entry["slot"], entry["share"]) for entry in log] == [(2, 0.0), (3, 0.0)]
    assert "slot 2 does not show 'red', which is required" in log[0]["reason"]


def test_every_rule_counts_and_a_missing_concept_is_named():
    rules = [rail("forbid", "red"), rail("require", "round")]
    stays, log = judge_masks(COVERAGE[:2], torch.tensor([RED, ROUND]), rules, [0, 1])
    assert stays == [False, True] and [(entry["rule"], entry["slot"]) for entry in log] == [("forbid", 0)]
    rules = [rail("forbid", "round"), rail("require", "red")]
    stays, log = judge_masks(COVERAGE[:2], torch.tensor([ROUND, RED]), rules, [0, 1])
    assert stays == [False, False]
    assert [(entry["rule"], entry["slot"]) for entry in log] == [
        ("forbid", 0),  # a third of it: 30 % show a concept
        ("forbid", 1),
        ("require", 1),
        ("require", None),
    ]
    assert log[-1]["reason"] == "'red' is required, and no mask is left that shows it." and log[-1]["share"] is None


def test_the_limit_itself_shows_a_concept():
    coverage, firing = torch.tensor([[SHOWN_SHARE, 1 - SHOWN_SHARE]]).double(), torch.tensor([[True, False]])
    assert judge_masks(coverage, firing, [rail("forbid", "red")], [0])[0] == [False]
    assert judge_masks(coverage - torch.tensor([[1e-6, 0]]), firing, [rail("forbid", "red")], [0])[0] == [True]


def test_an_answer_without_masks_lacks_what_is_required():
    empty = torch.zeros(0, 4)
    rules = [rail("forbid", "red"), rail("require", "round")]
    stays, log = judge_masks(empty, torch.tensor([RED, ROUND]), rules, [])
    assert stays == [] and [(entry["concept"], entry["slot"]) for entry in log] == [("round", None)]
