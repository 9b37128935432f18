"""Few active features in place of a dense row: the same values, the same gradients, at the features alone."""

import pytest
import torch
from sae import by_hand

from segcompass_hf import sparse_features_segcompass
from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.sae_activations_segcompass import smallest_kept
from segcompass_hf.sparse_features_segcompass import FeaturePattern, decode_active

TOP_K = {
    "topk": {"architecture": "topk"},
    "batchtopk": {"architecture": "batchtopk"},
    "standard": {"architecture": "standard", "activation": "topk"},
    "b_dec": {"architecture": "topk", "apply_b_dec_to_input": True},
    "b_dec of a batch": {"architecture": "batchtopk", "apply_b_dec_to_input": True},
    "scaled": {"architecture": "topk", "finetuning_scaling_factor": True},
    "normalised": {"architecture": "batchtopk", "normalize_activations": "per_token"},
}


@pytest.fixture
def formulation(monkeypatch):
    """Chooses how many features there must be for each active one until a few are computed with alone."""

    def choose(features_per_active: float) -> None:
        monkeypatch.setitem(sparse_features_segcompass.SPARSE_FROM, "cpu", features_per_active)

    return choose


def step(training, dead, **config):
    torch.manual_seed(0)
    sae = SegCompassSae(SegCompassSaeConfig(d_in=8, d_sae=64, k=4, initializer_range=0.3, **config)).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) / 3)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.8)
    states, mask = torch.randn(3, 7, 8, dtype=torch.float64), torch.ones(3, 7)
    mask[0, :2] = 0
    dead_features = torch.arange(64) % 3 == 0 if dead else None
    output = sae.train(training)(states, attention_mask=mask, dead_features=dead_features)
    (output.loss + (output.reconstruction * torch.randn_like(states)).sum()).backward()
    return output, sae


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dead", [True, False])
def test_values_and_gradients_are_the_dense_ones(formulation, name, training, dead):
    (dense, dense_sae), (sparse, sparse_sae) = [
        (formulation(limit), step(training, dead, **TOP_K[name]))[1] for limit in (float("inf"), 1)
    ]
    assert torch.equal(dense.feature_acts > 0, sparse.feature_acts > 0) and torch.equal(dense.fired, sparse.fired)
    assert dense.fired.sum() == (dense.feature_acts > 0).sum() > 0
    exact = {"rtol": 1e-12, "atol": 1e-12}
    for field in ("loss", "mse_loss", "reconstruction", "feature_acts", "sparsity_loss"):
        torch.testing.assert_close(sparse[field], dense[field], **exact)
    gradients = {key: value.grad for key, value in sparse_sae.named_parameters()}
    assert {key for key, value in gradients.items() if value is not None} >= {"W_enc", "W_dec", "b_enc", "b_dec"}
    for key, value in dense_sae.named_parameters():
        torch.testing.assert_close(gradients[key], value.grad, **exact)
    for key, value in dense_sae.named_buffers():
        torch.testing.assert_close(sparse_sae.get_buffer(key), value, **exact)


def test_no_dense_row_is_made_where_none_is_asked_for(formulation):
    states = torch.randn(3, 5, 2)
    for limit, is_dense in ((float("inf"), True), (1, False)):
        formulation(limit)
        output = by_hand(architecture="topk", k=1)(states, output_feature_acts=False)
        assert (output.feature_acts is not None) == is_dense and output.fired.shape == (3,)


def test_only_few_active_features_are_computed_with_alone(formulation):
    formulation(32)
    for d_sae, k, architecture, sparse in ((64, 2, "topk", True), (63, 2, "topk", False), (64, None, "gated", False)):
        sae = SegCompassSae(SegCompassSaeConfig(d_in=4, d_sae=d_sae, k=k, architecture=architecture))
        assert sae.computes_with_few("cpu") == sparse
        assert not sae.computes_with_few("meta")  # a device that was not measured
        for states in (torch.zeros(1, 4), torch.zeros(1, 4, requires_grad=True)):  # whose gradient needs all features
            is_dense = sae(states, output_feature_acts=False).feature_acts is not None
            assert is_dense == (states.requires_grad or not sparse)


def test_tokens_in_chunks_are_tokens_in_one(formulation, monkeypatch):
    formulation(1)
    whole, _ = step(True, False, architecture="topk")
    monkeypatch.setattr(sparse_features_segcompass, "CHUNK_ELEMENTS", 64 * 4)  # four tokens of 19
    parts, _ = step(True, False, architecture="topk")
    torch.testing.assert_close(parts.feature_acts, whole.feature_acts, rtol=1e-12, atol=1e-12)


def test_patterns_by_hand():
    # token 0: features 2 and 0; token 1: none; token 2: feature 2
    pattern = FeaturePattern.sorted_by_token(torch.tensor([0, 0, 2]), torch.tensor([2, 0, 2]), num_tokens=3, d_sae=4)
    assert pattern.token_starts.tolist() == [0, 2, 2] and pattern.feature_starts.tolist() == [0, 1, 1, 3]
    weights, decoder = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert decode_active(weights, decoder, pattern).tolist() == [[13.0], [0.0], [300.0]]  # 1 * 3 + 10 * 1
    rows = torch.tensor([[1.0], [5.0], [7.0]])
    assert pattern.sum_over_tokens(weights, rows).tolist() == [[10.0], [0.0], [701.0], [0.0]]  # 1 * 1 + 100 * 7
    assert pattern.dots(rows, decoder).tolist() == [3.0, 1.0, 21.0]
    empty = FeaturePattern.of(torch.zeros(3, 4, dtype=torch.bool))
    assert not decode_active(torch.zeros(0), decoder, empty).any() and empty.dots(rows, decoder).shape == (0,)


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([3.0, -1.0, 2.0, 1.0], 2, 2.0),
        ([3.0, -1.0, 2.0, 1.0], 9, 1.0),
        ([-3.0, -1.0], 1, float("inf")),
        ([], 3, float("inf")),
    ],
)
@pytest.mark.parametrize("guess", [0.0, 2.5, 100.0])
def test_the_smallest_that_is_kept(values, count, expected, guess):
    """A guess saves time and changes nothing."""
    assert smallest_kept(torch.tensor(values), count, torch.tensor(guess)) == expected
