# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Concept path: sparse encoding, interventions, codebook, and the memory that all of it may use."""

import json
import math
import runpy
import sys

import pytest
import torch
from places import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from segcompass_hf import modeling_concepts
from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.interventions_segcompass import (
    ConceptIntervention,
    apply_interventions,
    normalize_interventions,
    steer_hidden_states,
)
from segcompass_hf.modeling_concepts import (
    MAX_CHUNK_ELEMENTS,
    ConceptCodebook,
    SparseConcepts,
    encode_concepts,
    sparsify_concepts,
)
from segcompass_hf.modeling_sae import SegCompassSae

D_IN, D_SAE, D_SLOT = 8, 40, 6
# Two rows of five tokens, the first left-padded by two; tokens 2 and 3 of each row are image tokens.
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
MODALITY = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 0]])


def small_sae(**config) -> SegCompassSae:
    torch.manual_seed(0)
    return SegCompassSae(SegCompassSaeConfig(d_in=D_IN, d_sae=D_SAE, initializer_range=0.5, **config)).eval()


def dense_path(sae, states, mask, threshold, modality_ids=None) -> torch.Tensor:
    acts = sae.encode(states, modality_ids)
    return torch.where((acts.abs() >= threshold) & mask.bool()[..., None], acts, 0.0)


def by_hand() -> SparseConcepts:
    """Row 0: token 2 has features 1 (2.0) and 3 (4.0), token 4 has 3 (1.0). Row 1: token 0 has 3 (5.0)."""
    dense = torch.zeros(2, 5, D_SAE)
    dense[0, 2, 1], dense[0, 2, 3], dense[0, 4, 3], dense[1, 0, 3] = 2.0, 4.0, 1.0, 5.0
    return sparsify_concepts(dense, 0.0)


class TestSparseConcepts:
    def test_layout(self):
        concepts = by_hand()
        assert concepts.features.tolist() == [1, 3, 3, 3]
        assert concepts.values.tolist() == [2.0, 4.0, 1.0, 5.0]
        assert concepts.token_index.tolist() == [2, 2, 4, 5]  # row * 5 + position
        assert concepts.counts().tolist() == [[0, 0, 2, 0, 1], [1, 0, 0, 0, 0]]
        assert concepts.dense(D_SAE)[0, 2].nonzero().squeeze(1).tolist() == [1, 3]

    def test_one_row(self):
        row = by_hand().for_row(1)
        assert (row.features.tolist(), row.values.tolist(), row.token_index.tolist()) == ([3], [5.0], [0])
        assert (row.batch_size, row.sequence_length) == (1, 5)
        with pytest.raises(ValueError, match="row 2 of a batch of 2"):
            by_hand().for_row(2)

    def test_threshold_is_inclusive_on_the_magnitude_and_zero_is_never_kept(self):
        acts = torch.tensor([[[-2.5, -1.5, 2.0, 1.9999, 2.0001, -2.0, 0.0]]])
        assert sparsify_concepts(acts, 2.0).features.tolist() == [0, 2, 4, 5]
        assert sparsify_concepts(acts, 0.0).features.tolist() == [0, 1, 2, 3, 4, 5]
        with pytest.raises(ValueError, match="cannot be negative, got -1"):
            sparsify_concepts(acts, -1.0)


class TestEncoding:
    @pytest.mark.parametrize("threshold", [0.0, 0.7])
    @pytest.mark.parametrize("chunk_size", [1, 3, 4096])
    def test_equals_the_dense_formulation(self, threshold, chunk_size):
        sae, states = small_sae(), torch.randn(2, 5, D_IN)
        concepts = encode_concepts(sae, states, MASK, threshold, chunk_size=chunk_size)
        expected = dense_path(sae, states, MASK, threshold)
        assert 0 < len(concepts.values) == int((expected != 0).sum())
        torch.testing.assert_close(concepts.dense(D_SAE), expected, atol=1e-6, rtol=0)
        assert not concepts.values.requires_grad
        assert (concepts.token_index.diff() >= 0).all()

    def test_padding_is_never_encoded(self, monkeypatch):
        sae, states = small_sae(), torch.randn(2, 5, D_IN)
        states[MASK == 0] = math.nan  # would be found out
        encoded = []
        encode = sae.encode
        monkeypatch.setattr(sae, "encode", lambda chunk, ids=None: encoded.append(len(chunk)) or encode(chunk, ids))
        concepts = encode_concepts(sae, states, MASK, 0.5, chunk_size=3)
        assert encoded == [3, 3, 2]
        assert concepts.counts()[MASK == 0].sum() == 0 < concepts.counts().sum()

    def test_a_batch_equals_its_rows(self):
        sae, states = small_sae(), torch.randn(2, 5, D_IN)
        batch = encode_concepts(sae, states, MASK, 0.5)
        alone = encode_concepts(sae, states[:1, 2:], None, 0.5)
        row = batch.for_row(0)
        assert torch.equal(row.features, alone.features) and torch.equal(row.token_index - 2, alone.token_index)
        torch.testing.assert_close(row.values, alone.values, atol=1e-6, rtol=0)

    def test_per_modality_ids_reach_the_sae(self):
        sae = small_sae(normalize_activations="per_modality")
        sae.modality_scale.copy_(torch.tensor([1.0, 3.0]))
        states = torch.randn(2, 5, D_IN)
        concepts = encode_concepts(sae, states, MASK, 0.5, modality_ids=MODALITY, chunk_size=3)
        expected = dense_path(sae, states, MASK, 0.5, MODALITY)
        torch.testing.assert_close(concepts.dense(D_SAE), expected, atol=1e-6, rtol=0)

    def test_nothing_but_padding_gives_no_concepts(self):
        concepts = encode_concepts(small_sae(), torch.randn(2, 5, D_IN), torch.zeros(2, 5), 0.5)
        assert concepts.features.numel() == 0
        assert ConceptCodebook(D_SAE, D_SLOT)(concepts).shape == (2, 5, D_SLOT)

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match=r"attention_mask.*\(2, 5\).*got \(2, 4\)"):
            encode_concepts(small_sae(), torch.randn(2, 5, D_IN), MASK[:, 1:], 0.5)
        with pytest.raises(ValueError, match=r"batch_size, sequence_length, d_in.*\(5, 8\)"):
            encode_concepts(small_sae(), torch.randn(5, D_IN), None, 0.5)

    @pytest.mark.parametrize("threshold", [0.0, 0.5])
    def test_broken_weights_are_named(self, threshold):
        sae, states = small_sae(), torch.randn(2, 5, D_IN)
        states[1, 1, 0] = math.nan
        with pytest.raises(ValueError, match=f"{D_SAE} of .* not finite.*1 of the hidden states.*weights of the VLM"):
            encode_concepts(sae, states, MASK, threshold)
        sae.W_enc.data[0, 3] = math.nan
        with pytest.raises(ValueError, match="8 of .* not finite.*0 of the hidden states.*weights of the SAE"):
            encode_concepts(sae, torch.randn(2, 5, D_IN), MASK, threshold)


class TestCodebook:
    def test_by_hand(self):
        codebook = ConceptCodebook(D_SAE, 2)
        with torch.no_grad():
            codebook.weight[1], codebook.weight[3] = torch.tensor([1.0, 0.0]), torch.tensor([0.5, -1.0])
        embeddings = codebook(by_hand())
        expected = torch.zeros(2, 5, 2)
        expected[0, 2] = torch.tensor([4.0, -4.0])  # 2 (1, 0) + 4 (0.5, -1)
        expected[0, 4] = torch.tensor([0.5, -1.0])
        expected[1, 0] = torch.tensor([2.5, -5.0])
        torch.testing.assert_close(embeddings, expected)

    def test_dense_and_sparse_agree_in_value_and_in_both_gradients(self):
        sae, states, codebook = small_sae(), torch.randn(2, 5, D_IN), ConceptCodebook(D_SAE, D_SLOT)
        upstream = torch.randn(2, 5, D_SLOT)

        concepts = encode_concepts(sae, states, MASK, 0.5, chunk_size=3)
        concepts.values.requires_grad_()
        embeddings = codebook(concepts)
        weight_grad, value_grad = torch.autograd.grad(
            (embeddings * upstream).sum(), (codebook.weight, concepts.values)
        )

        acts = dense_path(sae, states, MASK, 0.5).detach().requires_grad_()
        dense = codebook.dense(acts)
        dense_weight_grad, acts_grad = torch.autograd.grad((dense * upstream).sum(), (codebook.weight, acts))

        assert dense.abs().max() > 1
        torch.testing.assert_close(embeddings, dense, atol=1e-5, rtol=0)
        torch.testing.assert_close(weight_grad, dense_weight_grad, atol=1e-5, rtol=0)
        at_values = acts_grad.flatten(0, 1)[concepts.token_index, concepts.features]
        torch.testing.assert_close(value_grad, at_values, atol=1e-5, rtol=0)
        inactive = torch.ones(D_SAE, dtype=torch.bool)
        inactive[concepts.features] = False
        assert (weight_grad[inactive] == 0).all() and (weight_grad[~inactive] != 0).any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_codebook_on_float32_values(self, dtype):
        codebook, half = ConceptCodebook(D_SAE, D_SLOT), ConceptCodebook(D_SAE, D_SLOT)
        half.load_state_dict(codebook.state_dict())
        half.to(dtype)
        concepts = by_hand()
        concepts.values.requires_grad_()
        embeddings = half(concepts)
        assert embeddings.dtype == dtype
        torch.testing.assert_close(embeddings.float(), codebook(concepts), atol=0.05, rtol=0.02)
        embeddings.sum().backward()
        expected = codebook.weight[concepts.features].sum(-1)
        torch.testing.assert_close(concepts.values.grad, expected, atol=0.05, rtol=0.02)
        assert half.weight.grad[3].tolist() == [10.0] * D_SLOT and (half.weight.grad[0] == 0).all()


class TestInterventionForms:
    def test_shorthand_scales(self):
        assert normalize_interventions({7: 0, 9: 2.0}) == [
            ConceptIntervention(7, scale=0.0),
            ConceptIntervention(9, scale=2.0),
        ]
        assert normalize_interventions(None) == []

    def test_defaults(self):
        ablate, add = ConceptIntervention(7), ConceptIntervention(7, add=3)
        assert (ablate.scale, ablate.add, ablate.tokens, ablate.where) == (0.0, 0.0, "all", "concepts")
        assert (add.scale, add.add) == (1.0, 3.0)

    def test_dicts_and_lists(self):
        expected = [ConceptIntervention(7, scale=2.0, tokens="image")]
        fields = {"feature": 7, "scale": 2.0, "tokens": "image"}
        assert normalize_interventions(fields) == normalize_interventions([fields]) == expected
        assert normalize_interventions(expected) == normalize_interventions(expected[0]) == expected

    @pytest.mark.parametrize(
        ("interventions", "message"),
        [
            ({40: 0.0}, "feature 40.*d_sae=40.*0 to 39"),
            ({-1: 0.0}, "id, an int of 0 or more, got -1"),
            ({"7": 0.0}, "id, an int of 0 or more, got '7'"),
            ({True: 0.0}, "id, an int of 0 or more, got True"),
            ({7: "much"}, "feature 7: scale must be a finite number, got 'much'"),
            ({7: math.nan}, "feature 7: scale must be a finite number, got nan"),
            ([{"feature": 7, "add": math.inf}], "feature 7: add must be a finite number, got inf"),
            ({7: 10**400}, "feature 7: scale must be a finite number, got 1000"),
            ({7: 1e300}, "feature 7: scale must be a finite number, got 1e[+]300"),  # infinite as float32
            ([{"feature": 7, "add": "-inf"}], "feature 7: add must be a finite number, got '-inf'"),
            ({math.inf: 0.0}, "id, an int of 0 or more, got inf"),
            ({10**30: 0.0}, "but the SAE has d_sae=40"),
            ([{"feature": 7, "tokens": "images"}], "tokens must be one of all, image, text, got 'images'"),
            ([{"feature": 7, "where": "logits"}], "where must be one of concepts, residual, got 'logits'"),
            ([{"feature": 7, "factor": 2}], r"unknown fields \['factor'\].*'scale'"),
            ([{"scale": 2}], "dicts with a 'feature'"),
            ([7], "got 7 of type int"),
            ("7", "got '7' of type str"),
        ],
    )
    def test_what_is_refused(self, interventions, message):
        with pytest.raises(ValueError, match=message):
            normalize_interventions(interventions, d_sae=D_SAE)


class TestInterventions:
    def changed(self, interventions, mask=MASK, modality=MODALITY) -> torch.Tensor:
        concepts = by_hand()
        before = concepts.dense(D_SAE)
        result = apply_interventions(concepts, interventions, mask, modality, D_SAE)
        assert torch.equal(concepts.dense(D_SAE), before)  # the input stays as it was
        assert (result.values != 0).all() and (result.token_index.diff() >= 0).all()
        return result.dense(D_SAE)

    def test_none_changes_nothing(self):
        assert torch.equal(self.changed(None), by_hand().dense(D_SAE))
        assert torch.equal(self.changed({3: 1.0}), by_hand().dense(D_SAE))

    def test_ablate(self):
        expected = by_hand().dense(D_SAE)
        expected[..., 3] = 0
        assert torch.equal(self.changed({3: 0}), expected)
        assert 3 not in apply_interventions(by_hand(), {3: 0}).features.tolist()

    def test_scale_below_the_threshold_is_kept(self):
        expected = by_hand().dense(D_SAE)
        expected[..., 3] *= 0.01
        torch.testing.assert_close(self.changed({3: 0.01}), expected)

    @pytest.mark.parametrize(("tokens", "places"), [("all", MASK == 1), ("image", (MASK * MODALITY) == 1)])
    def test_add_an_inactive_feature(self, tokens, places):
        expected = by_hand().dense(D_SAE)
        expected[..., 30][places] = 1.5
        assert torch.equal(self.changed([ConceptIntervention(30, add=1.5, tokens=tokens)]), expected)

    def test_add_to_an_active_feature_on_text_tokens(self):
        expected = by_hand().dense(D_SAE)
        expected[..., 3][(MASK == 1) & (MODALITY == 0)] += 1.5  # 1.0 and 5.0 become 2.5 and 6.5
        assert expected[0, 4, 3] == 2.5 and expected[0, 2, 3] == 4.0
        assert torch.equal(self.changed([ConceptIntervention(3, add=1.5, tokens="text")]), expected)

    def test_set_by_scale_and_add(self):
        expected = by_hand().dense(D_SAE)
        expected[..., 3] = 7.0 * MASK
        assert torch.equal(self.changed([ConceptIntervention(3, scale=0, add=7)]), expected)

    def test_they_act_in_order(self):
        items = [ConceptIntervention(3, add=1.0), ConceptIntervention(3, scale=2.0), ConceptIntervention(1, scale=0)]
        expected = by_hand().dense(D_SAE)
        expected[..., 3] = (expected[..., 3] + 1) * 2 * MASK
        expected[..., 1] = 0
        assert torch.equal(self.changed(items), expected)

    def test_adding_what_is_there_already_leaves_nothing(self):
        result = apply_interventions(by_hand().for_row(1), [ConceptIntervention(3, add=-5.0)], torch.eye(5)[:1])
        assert result.features.numel() == 0

    def test_residual_ones_are_left_alone(self):
        assert torch.equal(self.changed([ConceptIntervention(3, where="residual")]), by_hand().dense(D_SAE))

    def test_modalities_are_needed_for_image_tokens(self):
        with pytest.raises(ValueError, match=r"feature 3 is for image tokens only.*modality_ids of shape \(2, 5\)"):
            self.changed([ConceptIntervention(3, tokens="image")], modality=None)

    def test_gradients_flow_through(self):
        concepts = by_hand()
        concepts.values.requires_grad_()
        items = [ConceptIntervention(3, scale=2.0, add=1.0), ConceptIntervention(1, scale=3.0)]
        apply_interventions(concepts, items, MASK).values.sum().backward()
        assert concepts.values.grad.tolist() == [3.0, 2.0, 2.0, 2.0]


class TestSteering:
    """With an orthogonal decoder that the encoder reads exactly, a changed residual shows in the activation itself."""

    def orthogonal(self, **config) -> SegCompassSae:
        sae = SegCompassSae(SegCompassSaeConfig(d_in=D_IN, d_sae=D_IN, **config)).eval()
        with torch.no_grad():
            sae.W_dec.copy_(torch.linalg.qr(torch.randn(D_IN, D_IN))[0])
            sae.W_enc.copy_(sae.W_dec.T)
        return sae

    @pytest.mark.parametrize("mode", ["none", "per_modality"])
    def test_activations_become_what_was_asked(self, mode):
        sae = self.orthogonal(normalize_activations=mode)
        if mode == "per_modality":
            sae.fit_modality_statistics_(torch.randn(40, D_IN) * 5 + 1, torch.arange(40) % 2)
        states = torch.randn(2, 5, D_IN)
        items = [
            ConceptIntervention(2, scale=0.5, add=3.0, where="residual"),
            ConceptIntervention(5, add=4.0, tokens="image", where="residual"),
            ConceptIntervention(2, scale=2.0, where="residual"),
            ConceptIntervention(7, scale=0.0),
        ]
        steered = steer_hidden_states(sae, states, items, MASK, MODALITY)
        normalized, _ = sae.normalize(states, MODALITY)
        projections, before = normalized @ sae.W_enc, sae.encode(states, MODALITY)
        expected = projections.clone()
        expected[..., 2] += (2 * (0.5 * before[..., 2] + 3) - before[..., 2]) * MASK
        expected[..., 5] += 4.0 * (MASK * MODALITY)
        after, _ = sae.normalize(steered, MODALITY)
        torch.testing.assert_close(after @ sae.W_enc, expected, atol=1e-5, rtol=0)
        assert torch.equal(steered[MASK == 0], states[MASK == 0])

    def test_per_token_scale_is_undone(self):
        sae = self.orthogonal(normalize_activations="per_token")
        states = 100 * torch.randn(1, 3, D_IN)
        steered = steer_hidden_states(sae, states, [ConceptIntervention(2, add=1.0, where="residual")])
        # One unit of activation is norm / sqrt(d_in) of the residual stream.
        expected = states.norm(dim=-1, keepdim=True) / D_IN**0.5 * sae.W_dec[2]
        torch.testing.assert_close(steered - states, expected, rtol=1e-4, atol=1e-4)

    def test_dtype_and_identity(self):
        sae, states = self.orthogonal(), torch.randn(1, 3, D_IN, dtype=torch.bfloat16)
        assert steer_hidden_states(sae, states, {2: 0.0}) is states  # on the concepts, not here
        steered = steer_hidden_states(sae, states, [ConceptIntervention(2, add=9.0, where="residual")])
        assert steered.dtype == torch.bfloat16 and not torch.equal(steered, states)
        with pytest.raises(ValueError, match="feature 8.*d_sae=8"):
            steer_hidden_states(sae, states, [ConceptIntervention(8, where="residual")])


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages alive that were made inside the context, after every operation."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak, self.largest = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in known:
                self.storages[leaf.untyped_storage()] = leaf.untyped_storage().nbytes()
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return result

    @property
    def live(self) -> int:
        return sum(self.storages.values())


class TestMemory:
    D_SAE, TOKENS, THRESHOLD = 65_536, 1_536, 7.0

    def setup(self):
        torch.manual_seed(0)
        sae = SegCompassSae(SegCompassSaeConfig(d_in=4, d_sae=self.D_SAE, initializer_range=1.0)).eval()
        return sae, torch.randn(2, self.TOKENS // 2, 4), ConceptCodebook(self.D_SAE, 4)

    def test_the_counter_sees_the_dense_formulation(self):
        sae, states, _ = self.setup()
        with LiveTensors() as memory, torch.no_grad():
            acts = sae.encode(states[:, :64])
            assert memory.live == acts.nbytes == 128 * self.D_SAE * 4
        assert memory.largest == acts.nbytes <= memory.peak

    def test_no_tokens_by_d_sae_tensor_outlives_a_chunk(self):
        """At d_sae 65,536 the peak stays under three float32 chunks, half of one dense activation tensor."""
        sae, states, codebook = self.setup()
        chunk_bytes, dense_bytes = MAX_CHUNK_ELEMENTS * 4, self.TOKENS * self.D_SAE * 4
        assert 3 * chunk_bytes <= dense_bytes / 2
        with LiveTensors() as memory:
            concepts = encode_concepts(sae, states, None, self.THRESHOLD)
            sparse_bytes = concepts.features.nbytes + concepts.values.nbytes + concepts.token_index.nbytes
            assert memory.live == sparse_bytes
            assert memory.largest <= chunk_bytes and memory.peak < 3 * chunk_bytes
            codebook(concepts).sum().backward()
        assert memory.largest <= chunk_bytes and memory.peak < 3 * chunk_bytes
        assert 0 < len(concepts.values) < 0.05 * self.TOKENS * self.D_SAE
        assert codebook.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(("chunk_size", "expected"), [(4096, 4), (3, 3)])
    def test_chunks_shrink_with_d_sae(self, monkeypatch, chunk_size, expected):
        monkeypatch.setattr(modeling_concepts, "MAX_CHUNK_ELEMENTS", 4 * D_SAE)
        sae, sizes = small_sae(), []
        encode = sae.encode
        monkeypatch.setattr(sae, "encode", lambda chunk, ids=None: sizes.append(len(chunk)) or encode(chunk, ids))
        encode_concepts(sae, torch.randn(2, 5, D_IN), None, 0.5, chunk_size=chunk_size)
        assert max(sizes) == expected and sum(sizes) == 10


def test_benchmark_writes_its_record(tmp_path, monkeypatch, capsys):
    script = ROOT / "benchmarks" / "concept_path.py"
    sizes = "--d-in 32 --d-sae 256 --d-slot 16 --tokens 20 --batch-size 2 --active 8 --repeats 1"
    monkeypatch.setattr(sys, "argv", [str(script), *sizes.split(), "--output", str(tmp_path / "record.json")])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(script), run_name="__main__")
    record = json.loads((tmp_path / "record.json").read_text())
    assert 4 < record["active_per_token"] < 16
    assert record["output_difference"]["relative"] < 1e-5 > record["gradient_difference"]["relative"]
    assert record["gradient_difference"]["reference_max"] > 0
    assert (tmp_path / "record.md").read_text() == capsys.readouterr().out
