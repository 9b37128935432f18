"""SAE training on SmolLM2's residual stream, beside one on random weights of the same shape."""

import pytest
import torch

from segcompass_hf.training.sae.sae_lens import save_sae_lens
from segcompass_hf.training.sae.trainer import SaeTrainer

LAYER, D_SAE, STEPS = 2, 1024, 200
SMALL = {"per_device_train_batch_size": 256, "buffer_tokens": 4096, "max_length": 64, "max_eval_rows": 8}
SMALL |= {"dead_after_tokens": 256 * STEPS // 2, "logging_steps": STEPS, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def texts(smollm2_package) -> list[dict]:
    from smollm2_sae import docstrings

    return list(docstrings(160))


@pytest.fixture(scope="module")
def models(smollm2_package) -> dict:
    """The first layers of SmolLM2, and of a model of its shape with random weights."""
    from smollm2 import smollm2
    from smollm2_sae import random_weights

    real = smollm2(num_layers=LAYER)
    return {"real": real, "random": random_weights(real)}


@pytest.fixture(scope="module")
def trainers(models, texts, tmp_path_factory) -> dict[str, SaeTrainer]:
    from smollm2 import smollm2_tokenizer
    from smollm2_sae import settings, train

    folder = tmp_path_factory.mktemp("sae")
    return {
        name: train(model, smollm2_tokenizer(), texts, settings(folder / name, STEPS, LAYER, D_SAE, **SMALL))
        for name, model in models.items()
    }


def test_it_learns_the_real_ones(trainers, measured):
    """Most of their variance by 32 features a token, more than of random ones, and most features live."""
    from smollm2_sae import measure

    found = {name: measure(trainer) for name, trainer in trainers.items()}
    measured("sae", found)
    assert found["real"]["explained_variance"] > max(0.6, found["random"]["explained_variance"] + 0.1)
    assert found["real"]["dead_features"] < 0.25
    assert all(abs(row["l0"] - 32) < 16 for row in found.values())


def test_the_first_token_is_massive_in_the_real_ones(models, texts, measured):
    """What `drop_first_token` is for."""
    from smollm2 import smollm2_tokenizer
    from smollm2_sae import massive_activations

    found = {name: massive_activations(model, smollm2_tokenizer(), LAYER, texts[:8]) for name, model in models.items()}
    measured("massive activations", found)
    assert found["real"]["first_token"] > 4 and found["random"]["first_token"] < 3


@torch.no_grad()
def test_sae_lens_reads_it(trainers, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = trainers["real"].model.eval()
    states = next(iter(trainers["real"].source.batches((0, 0))))[1].states[:64].float()
    theirs = sae_lens.SAE.load_from_disk(str(save_sae_lens(sae, tmp_path)))
    acts, normalization = sae.encode(states), sae.normalize(states)[1]
    assert (acts > 0).any(-1).all()
    torch.testing.assert_close(theirs.encode(states), acts, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(theirs(states), sae.decode(acts, normalization), atol=1e-3, rtol=1e-3)
