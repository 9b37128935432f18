"""Ablation controls: planted concepts whose effects are known are found, with others of equal norm doing nothing."""

from types import SimpleNamespace

import pytest
import torch

from segcompass_hf import SparseConcepts
from segcompass_hf.explain.attribution import Attribution
from segcompass_hf.explain.controls.ablations import TOP, feature_norms, matched_ablation, union_tests
from segcompass_hf.explain.replay import Replay

NUM_FEATURES = 20


class PixelReplay(Replay):
    """Features 0 to 4 hold up one pixel each of a mask of six (logit `2 x - 1`); the sixth needs none (logit 1)."""

    def __init__(self, norms: list[float], together: bool = False):
        ids = torch.arange(NUM_FEATURES)
        concepts = SparseConcepts(ids, torch.ones(NUM_FEATURES), torch.zeros_like(ids), 1, 1)
        self.norms, self.together, self.valid_area = torch.tensor(norms), together, None
        self.codes = torch.diag(self.norms)
        self.model = SimpleNamespace(config=SimpleNamespace(mask_logit_threshold=0.0))
        self.captured = SimpleNamespace(concepts=concepts, pred_masks=torch.ones(1, 1, 2, 3))

    def run(self, embeddings, slots):
        level = embeddings.sum(1) / self.norms  # (rows, features): 1 where there
        held = level[:, :5].clone()
        if self.together:  # the first two stand in for each other
            held[:, 0] = held[:, 1] = level[:, :2].amax(1)
        logits = torch.cat([2 * held - 1, torch.ones(len(level), 1)], dim=1)
        return SimpleNamespace(pred_masks=logits.view(-1, 1, 2, 3), slot_logits=torch.zeros(len(level), 1))


def attribution(replay: PixelReplay) -> Attribution:
    """Ranks the five that hold pixels first. Whole: mean logit 1; none: (5 * -1 + 1) / 6 = -2/3."""
    contributions = torch.zeros(NUM_FEATURES)
    contributions[:5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    return Attribution(0, "mask_logit", contributions, 1.0, -2 / 3, 0.0, 0.0, torch.ones(NUM_FEATURES).bool(), 0)


def test_first_concepts_take_their_pixels_and_others_of_equal_norm_take_none():
    replay = PixelReplay([1.0] * NUM_FEATURES)
    found = matched_ablation(replay, attribution(replay))
    # without the five, one of six pixels is left
    assert found.first == pytest.approx(5 / 6) and found.matched == found.random == 0.0
    assert found.norm_ratio == pytest.approx(1.0)


def test_controls_have_the_norms_of_what_they_stand_for():
    # the first five are ten times as large as most; only eight others, 5 to 12, are of their size
    norms = [10.0] * 5 + [9.0, 9.5, 10.0, 10.5, 11.0, 9.0, 10.0, 11.0] + [1.0] * 7
    replay = PixelReplay(norms)
    assert feature_norms(replay)[0].tolist() == pytest.approx(norms)
    for seed in range(3):
        assert 0.7 < matched_ablation(replay, attribution(replay), seed).norm_ratio < 1.1
    again = [matched_ablation(replay, attribution(replay), 1) for _ in range(2)]
    assert again[0] == again[1]


def test_without_enough_others_nothing_is_matched():
    replay = PixelReplay([1.0] * NUM_FEATURES)
    few = 2 * TOP - 1
    replay.captured.concepts = SparseConcepts(
        torch.arange(few), torch.ones(few), torch.zeros(few, dtype=torch.long), 1, 1
    )
    replay.codes = replay.codes[:few]
    assert matched_ablation(replay, attribution(replay)) is None


def test_unions_of_independent_concepts_add_up():
    replay = PixelReplay([1.0] * NUM_FEATURES)
    tests = union_tests(replay, attribution(replay))
    assert len(tests) == 6  # pairs of four
    for test in tests:  # each takes 2 of one pixel of six: 1/3 of a mean; the change is 5/3
        assert test.alone == pytest.approx((0.2, 0.2)) and test.together == pytest.approx(0.4)
        assert test.interference == pytest.approx(0.0, abs=1e-6)


def test_stand_ins_do_together_what_neither_does_alone():
    replay = PixelReplay([1.0] * NUM_FEATURES, together=True)
    first, *others = union_tests(replay, attribution(replay))
    assert first.alone == pytest.approx((0.0, 0.0), abs=1e-6)
    assert first.together == first.interference == pytest.approx(0.4)  # both pixels
    assert all(abs(test.interference) < 1e-6 for test in others)
