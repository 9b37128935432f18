"""Measured paths: planted effects are found as they are, what many concepts do together is told apart."""

from types import SimpleNamespace

import pytest
import torch

from segcompass_hf import SparseConcepts
from segcompass_hf.explain.paths import FIRST, measure_paths, share_out
from segcompass_hf.explain.replay import Replay
from segcompass_hf.explain.scalars import Scalars

NUM_FEATURES = 20


class PlantedReplay(Replay):
    """Twenty features, each with a channel of its own on one token: `3 a + 2 b c - d + 5 max(of the last eight)`."""

    def __init__(self):
        ids = torch.arange(NUM_FEATURES)
        concepts = SparseConcepts(ids, torch.ones(NUM_FEATURES), torch.zeros_like(ids), 1, 1)
        self.captured = SimpleNamespace(concepts=concepts, pred_masks=torch.ones(1, 1, 2, 2))
        self.model = SimpleNamespace(config=SimpleNamespace(mask_logit_threshold=0.0))
        self.codes, self.valid_area = torch.eye(NUM_FEATURES), None

    def maps(self, embeddings):
        level = embeddings.sum(1)  # (rows, 20)
        value = 3 * level[:, 0] + 2 * level[:, 1] * level[:, 2] - level[:, 3] + 5 * level[:, FIRST:].amax(1)
        return SimpleNamespace(slot_logits=value[:, None], heatmap_logits=None)


def test_planted_effects_are_measured_and_the_rest_is_told_apart():
    scores = torch.linspace(4.0, -1.0, NUM_FEATURES)  # what gradients say: only the order of the first is right
    read = measure_paths(Scalars(PlantedReplay(), [0], "slot_logit"), 0, scores, (0.0, 9.0))
    # a: 3 with and without the others; b and c, worth 2 together: c brings it when b is there, and it goes with b;
    # d: -1; the other eight first ones do nothing
    torch.testing.assert_close(read.contributions[:FIRST], torch.tensor([3.0, 1.0, 1.0, -1.0] + [0.0] * 8))
    assert read.measured.tolist() == [True] * FIRST + [False] * (NUM_FEATURES - FIRST)
    # each of the last eight alone would bring 5: together they are worth 5, which no reading gives to one of them
    assert read.shared == pytest.approx(5.0)
    assert read.contributions[FIRST:].sum().item() == pytest.approx(5.0)


def test_with_few_features_all_are_measured():
    replay = PlantedReplay()
    replay.captured.concepts = SparseConcepts(torch.arange(4), torch.ones(4), torch.zeros(4, dtype=torch.long), 1, 1)
    replay.codes = torch.eye(NUM_FEATURES)[:4]
    read = measure_paths(Scalars(replay, [0], "slot_logit"), 0, torch.tensor([4.0, 3.0, 2.0, 1.0]), (0.0, 4.0))
    torch.testing.assert_close(read.contributions, torch.tensor([3.0, 1.0, 1.0, -1.0]))
    assert read.measured.all() and read.shared == 0.0


def test_what_can_stand_for_each_other_is_shared_by_halves():
    """`max(a, b)`: a brings it and b adds nothing; without a it stays, and goes with b. The others do nothing."""

    class EitherReplay(PlantedReplay):
        def maps(self, embeddings):
            return SimpleNamespace(slot_logits=embeddings.sum(1)[:, :2].amax(1, keepdim=True), heatmap_logits=None)

    scores = torch.linspace(4.0, 1.0, NUM_FEATURES)
    read = measure_paths(Scalars(EitherReplay(), [0], "slot_logit"), 0, scores, (0.0, 1.0))
    torch.testing.assert_close(read.contributions[:FIRST], torch.tensor([0.5, 0.5] + [0.0] * 10))
    # Gradients say 4 to 1 where 1 was measured; of the others they are scaled likewise, and cancel out to nothing.
    assert read.contributions[FIRST:].sum().abs() < 1e-6
    assert read.shared == pytest.approx(read.contributions[FIRST:].abs().sum().item())


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_shares_are_in_proportion_however_small_and_alike_where_nothing_is_known(scale):
    scores, group = scale * torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    shared = share_out(scores, group, torch.tensor([8.0, 1.0]))
    torch.testing.assert_close(shared, torch.tensor([2.0, 6.0, 0.0, 0.5, 0.5]))
    # 1 and -3 should add up to 2: 4 is missing and goes by size, 1 and 3
    shared = share_out(torch.tensor([1.0, -3.0]), torch.tensor([0, 0]), torch.tensor([2.0]))
    torch.testing.assert_close(shared, torch.tensor([2.0, 0.0]))
