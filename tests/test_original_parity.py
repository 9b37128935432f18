# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Golden tensors of the original SegCompass code, reproduced through our public classes.

One class per fixture file. `SEGCOMPASS_PARITY_DIR` names another folder of fixtures than the one beside the tests.
Names of the original's weights occur here and in the key maps only.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_concepts import ConceptCodebook, sparsify_concepts
from segcompass_hf.modeling_sae import SegCompassSae

PARITY_DIR = Path(os.environ.get("SEGCOMPASS_PARITY_DIR") or Path(__file__).parent / "fixtures" / "parity")
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@lru_cache
def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description of fixture file `name`; skips the test where the folder lacks it."""
    if not (PARITY_DIR / f"{name}.safetensors").is_file():
        pytest.skip(f"no {name}.safetensors in {PARITY_DIR}; set SEGCOMPASS_PARITY_DIR to the folder of fixtures")
    return load_file(PARITY_DIR / f"{name}.safetensors"), json.loads((PARITY_DIR / f"{name}.json").read_text())


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class TestSae:
    VARIANTS = (
        "standard",
        "standard_bdec",
        "standard_layernorm",
        "standard_rescale",
        "standard_tanhrelu",
        "standard_topk",
        "gated",
        "gated_bdec",
        "jumprelu",
    )

    @staticmethod
    def build(cfg: dict, state: dict[str, torch.Tensor]) -> SegCompassSae:
        config = SegCompassSaeConfig(
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            architecture=cfg["architecture"],
            activation=cfg["activation_fn_str"],
            k=cfg["activation_fn_kwargs"].get("k"),
            normalize_activations=cfg["normalize_activations"],
            apply_b_dec_to_input=cfg["apply_b_dec_to_input"],
            finetuning_scaling_factor=cfg["finetuning_scaling_factor"],
        )
        sae = SegCompassSae(config).eval()
        sae.load_state_dict(state)  # strict: the parameter names are the original's own
        return sae

    def test_every_variant_is_covered(self):
        assert set(golden("sae")[1]["variants"]) == set(self.VARIANTS)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_encode_and_decode(self, variant):
        tensors, description = golden("sae")
        sae = self.build(description["variants"][variant]["cfg"], under(tensors, f"{variant}.state."))
        hidden_states = tensors[f"{variant}.x"]
        feature_acts = sae.encode(hidden_states)
        torch.testing.assert_close(feature_acts, tensors[f"{variant}.feature_acts"], **TOLERANCE)
        _, normalization = sae.normalize(hidden_states)
        torch.testing.assert_close(sae.decode(feature_acts, normalization), tensors[f"{variant}.recon"], **TOLERANCE)
        torch.testing.assert_close(sae(hidden_states).reconstruction, tensors[f"{variant}.recon"], **TOLERANCE)

    def test_per_token_is_constant_norm_rescale(self):
        tensors, description = golden("sae")
        cfg = description["variants"]["standard_rescale"]["cfg"] | {"normalize_activations": "per_token"}
        sae = self.build(cfg, under(tensors, "standard_rescale.state."))
        torch.testing.assert_close(
            sae.encode(tensors["standard_rescale.x"]), tensors["standard_rescale.feature_acts"], **TOLERANCE
        )

    def test_training_loss_and_gradients(self):
        tensors, description = golden("sae")
        state = under(tensors, "train.state.")
        d_in, d_sae = state["W_enc"].shape
        sae = SegCompassSae(
            SegCompassSaeConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=description["train"]["l1_coef"])
        ).train()
        sae.load_state_dict(state)
        output = sae(tensors["train.x"], attention_mask=tensors["train.attention_mask"])
        torch.testing.assert_close(output.mse_loss, tensors["train.mse_loss"], **TOLERANCE)
        torch.testing.assert_close(output.sparsity_loss, tensors["train.l1_loss"], **TOLERANCE)
        torch.testing.assert_close(output.loss, tensors["train.loss"], **TOLERANCE)
        output.loss.backward()
        gradients = under(tensors, "train.grad.")
        assert set(gradients) == {"W_enc", "b_enc", "W_dec", "b_dec"}
        for name, gradient in gradients.items():
            torch.testing.assert_close(getattr(sae, name).grad, gradient, **TOLERANCE)


class TestCodebook:
    """The first half of the original's query book; slots and their gradients are in `TestSlotEncoder`."""

    THRESHOLDS = {"thr2": 2.0, "thr0": 0.0}

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("case", THRESHOLDS)
    def test_sparse_embeddings_equal_the_original_dense_ones(self, case, side):
        tensors, _ = golden("query_book")
        weight, feature_acts = tensors[f"{case}.state.codebook.weight"], tensors[f"{case}.sae_embeds"]
        mask = tensors[f"{case}.{side}.attention_mask"].bool()
        codebook = ConceptCodebook(weight.shape[1], weight.shape[0])
        codebook.load_state_dict({"weight": weight.T})
        concepts = sparsify_concepts(feature_acts, self.THRESHOLDS[case], mask)
        # The original's own formulation: zero what is below the threshold, then a bias-free linear layer.
        kept = feature_acts.masked_fill(feature_acts.abs() < self.THRESHOLDS[case], 0.0)
        expected = torch.nn.functional.linear(kept, weight)
        assert expected[mask].abs().max() > 0.1
        embeddings = codebook(concepts)
        torch.testing.assert_close(embeddings[mask], expected[mask], **TOLERANCE)
        assert (embeddings[~mask] == 0).all()

    def test_values_at_the_threshold(self):
        tensors, _ = golden("query_book")
        feature_acts = tensors["thr2.sae_embeds"]
        edge = torch.tensor([-2.5, -1.5, 2.0, 1.9999, 2.0001, -2.0])
        places = (feature_acts.unfold(-1, 6, 1) == edge).all(-1).nonzero()
        assert len(places) == 1
        row, position, first = places[0].tolist()
        concepts = sparsify_concepts(feature_acts, 2.0)
        kept = concepts.dense(256)[row, position, first : first + 6]
        # Kept at and above 2 in magnitude, negatives included.
        torch.testing.assert_close(kept, torch.tensor([-2.5, 0.0, 2.0, 0.0, 2.0001, -2.0]), atol=0, rtol=0)
