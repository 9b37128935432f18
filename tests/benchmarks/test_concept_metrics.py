"""How shared a concept space is: every value derived by hand."""

import math

import pytest
import torch
from concept_metrics import (
    ConceptTokens,
    _weighted_auc,
    bridge_score,
    concept_jaccard,
    feature_auc,
    joint_auc,
    one_modality_share,
)


def test_auc_counts_pairs_with_ties_as_half():
    # Feature 0: concept 0 has {3, 1}, the others {2, 0}: 3>2, 3>0, 1<2, 1>0 -> 3 of 4 pairs. Feature 1 never fires.
    # Feature 2: {1, 0} against {1, 0}: 1=1 half, 1>0 one, 0<1 none, 0=0 half -> 2 of 4.
    activations = torch.tensor([[3.0, 0, 1], [1, 0, 0], [2, 0, 1], [0, 0, 0], [9, 9, 9]])
    labels = torch.tensor([0, 0, 1, 5, -1])  # 5: a negative of all; -1 is left out
    auc = feature_auc(activations, labels, num_concepts=2)
    torch.testing.assert_close(auc[0], torch.tensor([0.75, 0.5, 0.5], dtype=torch.float64))
    # Concept 1 has {2} against {3, 1, 0}: above 2 of 3.
    assert auc[1, 0].item() == pytest.approx(2 / 3)


def test_auc_of_sparse_activations_is_that_of_dense_ones(monkeypatch):
    monkeypatch.setattr("concept_metrics.FEATURE_CHUNK", 3)  # more than one chunk
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(40, 8, generator=generator) - 0.5).relu()
    labels = torch.randint(-1, 4, (40,), generator=generator)
    expected = feature_auc(dense, labels, num_concepts=3)
    for sparse in (dense.to_sparse_coo(), dense.to_sparse_csr()):
        torch.testing.assert_close(feature_auc(sparse, labels, num_concepts=3), expected)
    assert feature_auc(dense, torch.zeros(40, dtype=torch.long), 1).isnan().all()  # nothing to tell it from


def test_weighted_auc_is_that_of_the_repeated_tokens():
    scores, positive = torch.tensor([2.0, 1, 1, 0]), torch.tensor([True, False, True, False])
    weights = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 0], [0, 1, 0, 1]], dtype=torch.float64)
    # Row 0: 2>1, 2>0, 1=1 (half), 1>0: 3.5 of 4. Row 1: one 2 and three 1s against two 1s: (2 + 3 * 2 / 2) of 8.
    got = _weighted_auc(scores, positive, weights)
    assert got[:2].tolist() == pytest.approx([3.5 / 4, 5 / 8])
    assert math.isnan(got[2])


def _modality(columns: list[list[float]], labels: list[int]) -> ConceptTokens:
    return ConceptTokens(torch.tensor(columns).T, torch.tensor(labels), torch.arange(len(labels)))


def test_joint_auc_needs_one_feature_for_both_and_chooses_it_on_the_other_half():
    labels = [0, 0, 1, 1] * 2  # samples 0 to 7: both halves hold both concepts
    fires_on_0 = [1.0, 1, 0, 0] * 2
    silent = [0.0] * 8
    # Feature 0 knows the word only, feature 1 the patches only, feature 2 both but the patches less well: in half 0
    # (samples 0, 2, 4, 6) concept 0 has 1 and 0 against 0 and 0: (1 + 1 + 1/2 + 1/2) / 4; likewise in half 1.
    words = _modality([fires_on_0, silent, fires_on_0], labels)
    patches = _modality([silent, fires_on_0, [1.0, 1, 0, 0, 0, 0, 0, 0]], labels)
    red, green = joint_auc(words, patches, ["red", "green"], num_resamples=200)
    assert (red.joint, red.joint_in_sample, red.features) == (0.75, 0.75, (2, 2))
    assert (red.words_alone, red.patches_alone) == (1.0, 1.0)
    assert 0.5 <= red.low <= 0.75 <= red.high <= 1.0
    # For green every feature fires on the wrong tokens in at least one modality; silent ones have 0.5 in the other.
    assert green.joint == 0.0 and green.words_alone == green.patches_alone == 0.5


def test_joint_auc_is_not_optimistic_about_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) // 2 % 2
    samples = torch.arange(80)
    words, patches = (ConceptTokens(torch.rand(80, 400, generator=generator), labels, samples) for _ in range(2))
    (score, _) = joint_auc(words, patches, ["a", "b"], num_resamples=0)
    assert score.joint_in_sample > 0.6  # the best of 400 coins looks good
    assert abs(score.joint - 0.45) < 0.1  # the smaller of two AUCs of 0.5 each


def test_joint_auc_says_which_concept_is_missing():
    tokens = _modality([[1.0, 1, 0, 0]], [0, 0, 0, 1])
    with pytest.raises(ValueError, match="red, green: no words"):
        joint_auc(tokens, tokens, ["red", "green"])


def test_bridge_score_by_hand():
    words = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    patches = torch.tensor([[0.0, 0, 3], [0, 1, 1]])
    directions = torch.tensor([[1.0, 0], [0, 2], [3, 4]])  # cosines: 0-2 0.6, 1-2 0.8, 0-1 0
    # C = mean of outer products: (0,2): 6/2 = 3; (1,1): 1/2; (1,2): 1/2. B = 3*0.6, 0.5*1, 0.5*0.8.
    result = bridge_score(words, patches, directions)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 2], expected[1, 1], expected[1, 2] = 1.8, 0.5, 0.4
    torch.testing.assert_close(result.matrix, expected)
    assert result.score == pytest.approx(2.7 / 4)
    assert result.same_feature == pytest.approx(0.5 / 4)
    # Independent: means (1, .5, 0) x (0, .5, 2): (0,1) .5, (0,2) 2, (1,1) .25, (1,2) 1; times cosines 0, .6, 1, .8.
    assert result.chance == pytest.approx((1.2 + 0.25 + 0.8) / 3.75)
    assert bridge_score(words.to_sparse(), patches.to_sparse(), directions).score == pytest.approx(2.7 / 4)


def test_jaccard_and_modality_shares_by_hand():
    words = torch.tensor([[1.0, 2, 0, 0, 0], [0, 0.2, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    patches = torch.tensor([[0.0, 2, 3, 0, 0], [0, 0.2, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])
    # Pairs share 1 of 3, 1 of 1, nothing of nothing (0), 0 of 3.
    assert concept_jaccard(words, patches) == pytest.approx((1 / 3 + 1) / 4)
    assert concept_jaccard(words, patches, threshold=0.5) == pytest.approx((1 / 3) / 4)
    # Feature 0 fires on 1/4 of the words and of the patches, feature 1 on 3/4 and 2/4 (0.6), feature 2 on patches.
    shares = one_modality_share(words, patches)
    assert shares == {"words_only": 0, "patches_only": pytest.approx(1 / 3), "both": pytest.approx(2 / 3), "firing": 3}
    assert one_modality_share(words, patches, dominance=0.6)["words_only"] == pytest.approx(1 / 3)
