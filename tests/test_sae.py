# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sparse autoencoder: every architecture and normalisation against values worked out by hand."""

import math

import pytest
import torch
from sae import by_hand, seeded

from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_sae import SegCompassSae

ARCHITECTURES = {
    "standard": {},
    "tanh-relu": {"activation": "tanh-relu"},
    "topk-activation": {"activation": "topk", "k": 2},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": 2},
    "batchtopk": {"architecture": "batchtopk", "k": 2},
}


class TestArchitectures:
    def test_standard(self):
        sae = by_hand()
        # Pre-activations 2, -1, 1 -> ReLU; reconstruction 2 (3, 4) + 1 (1, 0) + b_dec.
        acts = sae.encode(torch.tensor([[2.0, -1.0]]))
        torch.testing.assert_close(acts, torch.tensor([[2.0, 0.0, 1.0]]))
        torch.testing.assert_close(sae.decode(acts), torch.tensor([[7.5, 7.5]]))

    def test_tanh_relu(self):
        acts = by_hand(activation="tanh-relu").encode(torch.tensor([[2.0, -1.0]]))
        torch.testing.assert_close(acts, torch.tensor([[math.tanh(2.0), 0.0, math.tanh(1.0)]]))

    @pytest.mark.parametrize("config", [{"architecture": "topk"}, {"activation": "topk"}])
    def test_top_k_is_per_token_and_never_negative(self, config):
        acts = by_hand(k=2, **config).encode(torch.tensor([[2.0, 1.0], [1.0, -3.0]]))
        # (2, 1, 3) keeps 3 and 2; (1, -3, -2) keeps 1 and -2, which ReLU clears.
        torch.testing.assert_close(acts, torch.tensor([[2.0, 0.0, 3.0], [1.0, 0.0, 0.0]]))

    def test_gated(self):
        sae = by_hand(architecture="gated")
        with torch.no_grad():
            sae.b_gate.copy_(torch.tensor([0.0, 2.0, -3.0]))
            sae.r_mag.copy_(torch.tensor([math.log(2.0), 0.0, 0.0]))
            sae.b_mag.copy_(torch.tensor([0.5, 4.0, 0.0]))
        # Gate: 2 > 0, -1 + 2 > 0, 1 - 3 < 0. Magnitude: 2 * 2 + 0.5, -1 + 4, 1.
        torch.testing.assert_close(sae.encode(torch.tensor([[2.0, -1.0]])), torch.tensor([[4.5, 3.0, 0.0]]))

    def test_jumprelu(self):
        sae = by_hand(architecture="jumprelu")
        with torch.no_grad():
            sae.threshold.copy_(torch.tensor([1.0, 1.0, 3.0]))
        # 2 > 1 stays whole (not 2 - 1), 1 is not above 1, 3 is not above 3.
        torch.testing.assert_close(sae.encode(torch.tensor([[2.0, 1.0]])), torch.tensor([[2.0, 0.0, 0.0]]))

    def test_batch_top_k_shares_the_budget_in_training(self):
        sae = by_hand(architecture="batchtopk", k=1).train()
        # Pre-activations (5, 4, 9) and (0, 1, 1): the 1 * 2 tokens largest of all six are 9 and 5.
        output = sae(torch.tensor([[5.0, 4.0], [0.0, 1.0]]))
        torch.testing.assert_close(output.feature_acts, torch.tensor([[5.0, 0.0, 9.0], [0.0, 0.0, 0.0]]))
        assert sae.topk_threshold.item() == 5.0
        sae(torch.tensor([[5.0, 6.0], [0.0, 1.0]]))  # keeps 11 and 6
        assert sae.topk_threshold.item() == pytest.approx(0.99 * 5 + 0.01 * 6)

    def test_batch_top_k_is_per_token_outside_training(self):
        sae = by_hand(architecture="batchtopk", k=1)
        sae.topk_threshold.fill_(4.5)
        tokens = torch.tensor([[5.0, 4.0], [0.0, 1.0]])
        expected = torch.tensor([[5.0, 0.0, 9.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(sae.encode(tokens), expected)
        torch.testing.assert_close(sae.encode(tokens[:1]), expected[:1])
        sae.train()  # a frozen SAE inside a model in training mode
        torch.testing.assert_close(sae.encode(tokens), expected)
        assert sae.topk_threshold.item() == 4.5

    def test_b_dec_is_subtracted_from_the_input_on_request(self):
        acts = by_hand(apply_b_dec_to_input=True).encode(torch.tensor([[2.0, -1.0]]))
        torch.testing.assert_close(acts, torch.tensor([[1.5, 0.0, 1.0]]))  # of (1.5, -0.5)

    def test_finetuning_scaling_factor_scales_the_reconstruction_only(self):
        sae = by_hand(finetuning_scaling_factor=True)
        with torch.no_grad():
            sae.finetuning_scaling_factor.copy_(torch.tensor([2.0, 1.0, 3.0]))
        acts = sae.encode(torch.tensor([[2.0, -1.0]]))
        torch.testing.assert_close(acts, torch.tensor([[2.0, 0.0, 1.0]]))
        torch.testing.assert_close(sae.decode(acts), torch.tensor([[15.5, 15.5]]))  # 4 (3, 4) + 3 (1, 0) + b_dec

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_leading_shape_and_batching_change_nothing(self, name):
        sae = seeded(**ARCHITECTURES[name])
        tokens = torch.randn(3, 5, 8)
        acts = sae.encode(tokens)
        assert acts.shape == (3, 5, 32) and (acts >= 0).all() and 0 < (acts > 0).float().mean() < 1
        for row in range(3):
            torch.testing.assert_close(sae.encode(tokens[row, 2]), acts[row, 2], atol=1e-6, rtol=0)

    def test_wrong_width_is_refused_with_both_sizes(self):
        with pytest.raises(ValueError, match="9 wide.*d_in=8"):
            seeded().encode(torch.randn(2, 9))


class TestNormalisation:
    def test_layer_norm(self):
        sae = seeded(normalize_activations="layer_norm")
        normalized, normalization = sae.normalize(torch.arange(8.0).repeat(2, 1) * torch.tensor([[1.0], [10.0]]))
        # Mean 3.5, unbiased standard deviation sqrt(42 / 7); the factor 10 is divided out.
        expected = (torch.arange(8.0) - 3.5) / math.sqrt(6)
        torch.testing.assert_close(normalized, expected.repeat(2, 1), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalization.undo(normalized)[1], 10 * torch.arange(8.0), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("mode", ["constant_norm_rescale", "per_token"])
    def test_per_token_norm_is_the_root_of_the_width(self, mode):
        sae = by_hand(normalize_activations=mode)
        tokens = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
        normalized, normalization = sae.normalize(tokens)
        root = math.sqrt(2)
        expected = torch.tensor([[0.6 * root, 0.8 * root], [0.6 * root, 0.8 * root], [0.0, 0.0]])
        torch.testing.assert_close(normalized, expected)
        torch.testing.assert_close(normalization.undo(normalized), tokens)

    def test_per_token_norm_survives_half_precision(self):
        sae = seeded(d_in=64, normalize_activations="per_token").half()
        # The squared norm, 64 * 200^2, is beyond the range of float16 (65,504).
        normalized, _ = sae.normalize(torch.full((1, 64), 200.0, dtype=torch.float16))
        torch.testing.assert_close(normalized, torch.ones(1, 64, dtype=torch.float16), atol=1e-3, rtol=0)

    def test_per_modality(self):
        sae = by_hand(normalize_activations="per_modality")
        sae.modality_mean.copy_(torch.tensor([[1.0, 1.0], [10.0, 20.0]]))
        sae.modality_scale.copy_(torch.tensor([2.0, 0.1]))
        tokens, modality_ids = torch.tensor([[2.0, 1.0], [30.0, 20.0]]), torch.tensor([0, 1])
        normalized, normalization = sae.normalize(tokens, modality_ids)
        torch.testing.assert_close(normalized, torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
        torch.testing.assert_close(normalization.undo(normalized), tokens)
        with pytest.raises(ValueError, match="per_modality.*modality_ids"):
            sae.encode(tokens)

    def test_modality_statistics_bring_both_to_the_same_mean_norm(self):
        torch.manual_seed(0)
        modality_ids = torch.tensor([0] * 50 + [1] * 30)
        states = torch.randn(80, 8) * torch.where(modality_ids == 1, 240.0, 1.0)[:, None] + modality_ids[:, None] * 7.0
        sae = seeded(normalize_activations="per_modality").fit_modality_statistics_(states, modality_ids)
        normalized, _ = sae.normalize(states, modality_ids)
        for modality in (0, 1):
            of_one = normalized[modality_ids == modality]
            torch.testing.assert_close(of_one.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
            assert of_one.norm(dim=-1).mean().item() == pytest.approx(math.sqrt(8), rel=1e-5)

    def test_statistics_of_another_normalisation_are_refused(self):
        with pytest.raises(ValueError, match="per_modality"):
            seeded().fit_modality_statistics_(torch.randn(2, 8), torch.tensor([0, 1]))


class TestTrainingLoss:
    def test_standard_by_hand(self):
        output = by_hand(l1_coefficient=10.0)(torch.tensor([[2.0, -1.0], [0.0, 0.0]]))
        # Token 1: (7.5, 7.5) against (2, -1): 5.5^2 + 8.5^2 = 102.5; token 2: b_dec = (0.5, -0.5) against 0: 0.5.
        assert output.mse_loss.item() == pytest.approx((102.5 + 0.5) / 2)
        # Token 1: activations 2, 1 times decoder norms 5, 1.
        assert output.sparsity_loss.item() == pytest.approx(11 / 2)
        assert output.loss.item() == pytest.approx(51.5 + 55)

    def test_masked_tokens_count_for_nothing(self):
        sae = seeded()
        states, mask = torch.randn(2, 4, 8), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        output = sae(states, attention_mask=mask)
        alone = sae(states[mask.bool()])
        torch.testing.assert_close(output.loss, alone.loss)
        torch.testing.assert_close(output.feature_acts[mask.bool()], alone.feature_acts)
        assert (output.feature_acts[mask == 0] == 0).all() and (output.reconstruction[mask == 0] == 0).all()
        states[mask == 0] = 1e6
        torch.testing.assert_close(sae(states, attention_mask=mask).loss, output.loss)

    def test_nothing_but_padding_is_refused(self):
        with pytest.raises(ValueError, match="keeps no token"):
            seeded()(torch.randn(1, 3, 8), attention_mask=torch.zeros(1, 3))

    def test_error_is_measured_after_normalisation(self):
        # Tokens of norm 240 and 1 weigh the same, and the reconstruction returns in the input's own space.
        sae = seeded(normalize_activations="per_token")
        states = torch.randn(1, 8)
        torch.testing.assert_close(sae(240 * states).mse_loss, sae(states).mse_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(sae(240 * states).reconstruction, 240 * sae(states).reconstruction)

    def test_topk_needs_no_sparsity_loss(self):
        output = seeded(architecture="topk", k=3)(torch.randn(4, 8))
        assert output.sparsity_loss.item() == 0 and output.loss.item() == output.mse_loss.item() > 0

    def test_gated_gate_learns_through_a_frozen_decoder(self):
        sae = seeded(architecture="gated", l1_coefficient=0.0)
        states = torch.randn(4, 8)
        output = sae(states)
        gate = torch.relu(states @ sae.W_enc + sae.b_gate)
        expected = (gate @ sae.W_dec + sae.b_dec - states).pow(2).sum(-1).mean()
        torch.testing.assert_close(output.auxiliary_loss, expected)
        torch.testing.assert_close(output.loss, output.mse_loss + expected)
        output.auxiliary_loss.backward()
        assert sae.W_dec.grad is None and sae.b_gate.grad.abs().sum() > 0

    def test_jumprelu_threshold_gradients_by_hand(self):
        sae = by_hand(architecture="jumprelu", l1_coefficient=1.0)
        with torch.no_grad():
            sae.threshold.copy_(torch.tensor([2.01, 1.0, 1.0]))
        output = sae(torch.tensor([[2.0, -1.0]]))
        # 2 is below 2.01, -1 below 1, and 1 not above 1: none active, and pre-activations 0 and 2 are within 0.025.
        assert output.sparsity_loss.item() == 0
        (gradient,) = torch.autograd.grad(output.sparsity_loss, sae.threshold, retain_graph=True)
        torch.testing.assert_close(gradient, torch.tensor([-20.0, 0.0, -20.0]))  # -1 / bandwidth 0.05
        (gradient,) = torch.autograd.grad(output.mse_loss, sae.threshold)
        # d mse / d h = 2 (b_dec - x) . W_dec = 2 (-1.5, 0.5) . W_dec rows = -5, ., -3; times -threshold / bandwidth.
        torch.testing.assert_close(gradient, torch.tensor([5 * 2.01 / 0.05, 0.0, 3 * 1.0 / 0.05]))

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_parameter_trains_and_the_loss_falls(self, name):
        sae = seeded(l1_coefficient=0.01, **ARCHITECTURES[name]).train()
        if name == "jumprelu":
            sae.threshold.data.fill_(0.1)
        states = torch.randn(64, 8)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        before = {key: value.clone() for key, value in sae.named_parameters()}
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = sae(states).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert all(not torch.equal(value, before[key]) for key, value in sae.named_parameters())


class TestFolding:
    @pytest.mark.parametrize("name", ["standard", "gated", "jumprelu"])
    def test_unit_norms_and_the_same_reconstruction(self, name):
        sae = seeded(normalize_activations="per_token", **ARCHITECTURES[name])
        sae.W_dec.data[3] = 0  # a dead feature must not turn into NaN
        states = torch.randn(6, 8)
        norms = sae.W_dec.norm(dim=-1)
        acts = sae.encode(states)
        before = sae(states).reconstruction
        sae.fold_decoder_norms_()
        expected = torch.ones(32)
        expected[3] = 0
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), expected)
        torch.testing.assert_close(sae(states).reconstruction, before, atol=1e-5, rtol=0)
        norms[3] = 1
        torch.testing.assert_close(sae.encode(states), acts * norms, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("name", ["tanh-relu", "topk-activation", "topk", "batchtopk"])
    def test_what_would_change_features_is_refused(self, name):
        with pytest.raises(ValueError, match="cannot be folded"):
            seeded(**ARCHITECTURES[name]).fold_decoder_norms_()

    def test_decoder_directions_are_unit_vectors(self):
        torch.testing.assert_close(by_hand().decoder_directions[0], torch.tensor([0.6, 0.8]))


class TestSaving:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_round_trip(self, name, tmp_path):
        sae = seeded(normalize_activations="per_modality", finetuning_scaling_factor=True, **ARCHITECTURES[name])
        modality_ids = torch.tensor([0, 1, 1, 0])
        sae.fit_modality_statistics_(torch.randn(4, 8) * 5 + 1, modality_ids)
        if name == "batchtopk":
            sae.topk_threshold.fill_(0.7)
        sae.save_pretrained(tmp_path)
        loaded = SegCompassSae.from_pretrained(tmp_path)
        state, expected = loaded.state_dict(), sae.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        states = torch.randn(4, 8)
        assert torch.equal(loaded.encode(states, modality_ids), sae.encode(states, modality_ids))
        for field in ("architecture", "activation", "k", "normalize_activations", "finetuning_scaling_factor"):
            assert getattr(loaded.config, field) == getattr(sae.config, field)

    def test_names_and_shapes_are_those_of_saelens(self):
        names = {
            name: set(SegCompassSae(SegCompassSaeConfig(d_in=4, d_sae=6, architecture=name)).state_dict())
            for name in ("standard", "gated", "jumprelu")
        }
        assert names["standard"] == {"W_enc", "b_enc", "W_dec", "b_dec"}
        assert names["gated"] == {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}
        assert names["jumprelu"] == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
        sae = SegCompassSae(SegCompassSaeConfig(d_in=4, d_sae=6))
        assert sae.W_enc.shape == (4, 6) and sae.W_dec.shape == (6, 4)

    def test_bfloat16(self, tmp_path):
        sae = seeded().to(torch.bfloat16)
        sae.save_pretrained(tmp_path)
        loaded = SegCompassSae.from_pretrained(tmp_path)
        assert loaded.W_enc.dtype == torch.bfloat16
        states = torch.randn(4, 8)
        assert loaded.encode(states).dtype == torch.bfloat16
        torch.testing.assert_close(loaded.encode(states).float(), seeded().encode(states), atol=0.05, rtol=0.02)

    def test_a_missing_tensor_is_initialised_and_the_others_kept(self, tmp_path):
        from safetensors.torch import load_file, save_file

        sae = seeded()
        sae.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["b_enc"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = SegCompassSae.from_pretrained(tmp_path)
        assert torch.equal(loaded.W_enc, sae.W_enc) and torch.equal(loaded.W_dec, sae.W_dec)
        assert torch.equal(loaded.b_enc, torch.zeros(32))

    def test_fresh_weights_read_what_they_write(self):
        sae = SegCompassSae(SegCompassSaeConfig(d_in=64, d_sae=256, initializer_range=0.1))
        assert sae.W_dec.std().item() == pytest.approx(0.1, rel=0.05)
        assert torch.equal(sae.W_enc, sae.W_dec.T) and not sae.b_enc.any() and not sae.b_dec.any()
