"""Matching features of two SAEs: those that come again are found under other numbers, those that do not are not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segcompass_hf import SparseConcepts
from segcompass_hf.explain.controls.seeds import match_features
from segcompass_hf.modeling_concepts import sparsify_concepts

TOKENS, FEATURES = 40, 6


class Model:
    """Activations that are given, row by row, whatever the inputs."""

    device = torch.device("cpu")

    def __init__(self, activations: torch.Tensor, directions: torch.Tensor):
        self.activations, self.sae = activations, SimpleNamespace(decoder_directions=directions)

    def __call__(self, input_ids, slots_alone, output_concepts, **inputs) -> SimpleNamespace:
        return SimpleNamespace(concepts=sparsify_concepts(self.activations[input_ids[:, 0]], 0.0))


def processor(images, instruction, reasoning):
    """The picture is the number of its row."""
    ids = torch.tensor(images)[:, None].expand(-1, TOKENS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def first():
    generator = torch.Generator().manual_seed(0)
    activations = torch.rand(3, TOKENS, FEATURES, generator=generator)
    activations = activations * (torch.rand(activations.shape, generator=generator) < 0.4)
    activations[..., 5] = 0.0
    activations[0, :3, 5] = 1.0  # fires three times in all
    return Model(activations, torch.eye(FEATURES, 8))


ROWS = [{"image": number, "instruction": "it"} for number in range(3)]


def test_the_same_features_under_other_numbers(first):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    second = Model(2 * first.activations[..., order], first.sae.decoder_directions[order])
    found = match_features(first, second, processor, ROWS, batch_size=2)
    assert found.features.tolist() == [0, 1, 2, 3, 4]  # feature 5 fires too seldom to say anything
    torch.testing.assert_close(found.cosines, torch.ones(5))
    torch.testing.assert_close(found.correlations, torch.ones(5), rtol=0, atol=1e-4)


def test_features_that_do_not_come_again(first):
    other = first.activations.roll(7, dims=1).clone()  # fire elsewhere
    other[..., 0] = first.activations[..., 0]  # but one
    second = Model(other, torch.eye(FEATURES, 8).roll(2, dims=1))
    found = match_features(first, second, processor, ROWS)
    # by numpy: correlations of columns over the 120 tokens
    columns = [one.reshape(-1, FEATURES)[:, :5].numpy().T for one in (first.activations, other)]
    expected = torch.corrcoef(torch.tensor(np.concatenate(columns)))[:5, 5:].amax(1)
    torch.testing.assert_close(found.correlations, expected, rtol=0, atol=1e-4)
    assert found.correlations[0] > 0.99 and found.correlations[1:].max() < 0.5
    assert found.cosines.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]  # directions 0 and 1 are written by no other


def test_states_of_another_width_have_no_cosine(first):
    second = Model(first.activations, torch.eye(FEATURES, 16))
    assert match_features(first, second, processor, ROWS).cosines.isnan().all()


def test_silent_features_match_nothing(first):
    silent = Model(torch.zeros(3, TOKENS, FEATURES), torch.eye(FEATURES, 8))
    with pytest.raises(ValueError, match="0 features fire"):
        match_features(first, silent, processor, ROWS)
    assert isinstance(sparsify_concepts(silent.activations, 0.0), SparseConcepts)
