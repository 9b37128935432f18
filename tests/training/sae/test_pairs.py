"""Pair losses of SAE training: values by hand, what they do to features, and runs that use them."""

import math

import pytest
import torch
from concept_metrics import concept_jaccard
from sae import StopAt, harvester, settings
from supervised import tiny_row
from tiny import tiny_model, tiny_processor

from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.sae.config import SaeTrainingConfig
from segcompass_hf.training.sae.pair_buffer import NamedStates, PairBlock, PairBuffer
from segcompass_hf.training.sae.pair_losses import contrastive_loss, pair_loss, shared_selection, shared_topk_loss
from segcompass_hf.training.sae.rows import RowStream
from segcompass_hf.training.sae.trainer import SaeTrainer


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("llava")


def identity_sae(**config) -> SegCompassSae:
    """Three features, each a coordinate."""
    sae = SegCompassSae(SegCompassSaeConfig(d_in=3, d_sae=3, layer=0, **config))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae


def rows_with_masks(count: int = 8) -> list[dict]:
    return [tiny_row(i, 1 + i % 2, instruction=("the red circle", "the ring")[i % 2]) for i in range(count)]


def test_shared_selection_by_hand():
    words = torch.tensor([[3.0, 0, 1, 0], [0, 0, 0, 1]])
    patches = torch.tensor([[0.0, 2, 1.5, 0], [0, 0, 0, 1]])  # sums 3, 2, 2.5, 0 and 0, 0, 0, 2
    assert shared_selection(words, patches, k=2).tolist() == [[True, False, True, False], [False] * 3 + [True]]


def test_shared_topk_by_hand():
    sae = identity_sae()
    words, patches = torch.tensor([[2.0, 0, 1]]), torch.tensor([[1.0, 3, 1]])
    # Sums 3, 3, 2: with k=2 the third feature is out. Rebuilt: word (2, 0, 0), patches (1, 3, 0). Errors of the word
    # 0 + 0 + 1 and 1 + 9 + 1; of the patches 1 + 9 + 1 and 0 + 0 + 1.
    loss = shared_topk_loss(sae, words, patches, k=2)
    assert loss.item() == pytest.approx((1 + 11 + 11 + 1) / 4)
    loss.backward()
    # d/dW_dec = h^T (x' - x) * 2 / 4, summed over the four terms: the third feature gets none.
    assert torch.allclose(sae.W_dec.grad[2], torch.zeros(3)) and sae.W_dec.grad[0].norm() > 0
    feature_0 = 0.5 * (
        2 * torch.tensor([1.0, -3, -1]) + 2 * torch.tensor([0.0, 0, -1])
    )  # from the word's activation 2
    feature_0 += 0.5 * (1 * torch.tensor([-1.0, 3, -1]) + 1 * torch.tensor([0.0, 0, -1]))  # from the patch's 1
    torch.testing.assert_close(sae.W_dec.grad[0], feature_0)


def test_contrastive_by_hand():
    sae = identity_sae()
    words = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    patches = torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 0, 1]])
    names = torch.tensor([4, 7, 4])  # pairs 0 and 2 are of one name: no negatives of each other
    loss = contrastive_loss(sae, words, patches, names, temperature=0.5)
    s = math.sqrt(2)  # a cosine of 1 / sqrt 2, over 0.5
    scores = [[s, 0, s], [s, 2, 0], [s, 0, s]]  # word i, patch j
    forward = [
        s - math.log(math.exp(s) + 1),
        2 - math.log(math.exp(2) + math.exp(s) + 1),
        s - math.log(math.exp(s) + 1),
    ]
    backward = [
        s - math.log(math.exp(s) + math.exp(scores[1][0])),
        2 - math.log(math.exp(2) + 2),
        s - math.log(math.exp(s) + 1),
    ]
    assert loss.item() == pytest.approx(-(sum(forward) + sum(backward)) / 6, rel=1e-5)


def test_pairs_are_normalised_by_their_own_modality():
    sae = identity_sae(normalize_activations="per_modality")
    with torch.no_grad():
        sae.modality_mean.copy_(torch.tensor([[1.0, 0, 0], [0, 5, 0]]))
    pairs = NamedStates(torch.tensor([[3.0, 0, 1]]), torch.tensor([[1.0, 8, 1]]), torch.zeros(1))
    loss = pair_loss(sae, pairs, "shared_topk", k=2)  # the states of the case by hand
    assert loss.item() == pytest.approx(6)


@pytest.mark.parametrize("kind", ["shared_topk", "contrastive"])
def test_pair_losses_make_words_and_patches_share_features(kind):
    # Four names. Words and patches of a name have a direction in common, and one each that is theirs alone; L1 gives
    # each its own feature, which the pair losses make common.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    names = torch.arange(4).repeat(64)
    words = 3 * basis[names] + 3 * basis[4 + names] + 0.1 * torch.randn(256, 12, generator=generator)
    patches = 3 * basis[names] + 3 * basis[8 + names] + 0.1 * torch.randn(256, 12, generator=generator)
    shared = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        sae = SegCompassSae(SegCompassSaeConfig(d_in=12, d_sae=24, layer=0, l1_coefficient=0.5))
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(200):
            loss = sae(torch.cat([words, patches])).loss
            if weight:
                loss = loss + weight * pair_loss(sae, NamedStates(words, patches, names), kind, k=2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            shared[weight] = concept_jaccard(sae.encode(words), sae.encode(patches), threshold=0.1)
    assert shared[1.0] > shared[0.0] + 0.2, shared


def test_a_block_draws_names_evenly_and_pairs_within_them():
    block = PairBlock()
    block.add("Red", torch.full((1, 2), 1.0), torch.tensor([[10.0, 0], [11, 0]]))
    block.add("ring", torch.full((3, 2), 2.0), torch.full((1, 2), 20.0))
    block.add("red", torch.full((1, 2), 3.0), torch.full((1, 2), 30.0))
    batch = block.draw(600, torch.Generator().manual_seed(0))
    assert batch.words.shape == batch.patches.shape == (600, 2)
    of_word = {1.0: {10.0, 11.0}, 2.0: {20.0}, 3.0: {30.0}}
    for value, patches in of_word.items():
        drawn = batch.words[:, 0] == value
        assert 150 < drawn.sum() < 250 and set(batch.patches[drawn][:, 0].tolist()) == patches
    ids = {value: batch.name_ids[batch.words[:, 0] == value].unique().tolist() for value in of_word}
    assert ids[1.0] == ids[3.0] != ids[2.0]  # the same word, however it is written


def test_the_buffer_goes_on_where_it_was(model, processor):
    def make():
        stream = RowStream(rows_with_masks(6), seed=3)
        return PairBuffer(
            harvester(model, processor), stream, pairs=5, block_rows=4, rows_per_batch=2, block_batches=3
        )

    whole = make()
    expected = [whole.next_batch() for _ in range(8)]
    assert whole.state_dict()["epoch"] == 1  # 4 rows of 6 each time
    for served in (2, 3, 7):
        first, second = make(), make()
        for _ in range(served):
            first.next_batch()
        second.load_state_dict(first.state_dict())
        for ours, theirs in zip(second.next_batch(), expected[served], strict=True):
            assert torch.equal(ours, theirs)
    assert expected[0].words.shape == (5, model.vlm.config.get_text_config().hidden_size)


def test_rows_without_names_are_said(model, processor):
    stream = RowStream([tiny_row(i, 0) for i in range(4)])
    with pytest.raises(ValueError, match="none of 4 rows has a name"):
        PairBuffer(harvester(model, processor), stream, block_rows=4).next_batch()


def trainer_of(model, processor, folder, **overrides) -> SaeTrainer:
    overrides = {"pair_loss": "shared_topk", "pair_k": 2, "pair_batch": 16, "pair_rows": 4} | overrides
    args = settings(folder, **overrides)
    return SaeTrainer(model, args, rows_with_masks(), None, processor)


@pytest.mark.parametrize("kind", ["shared_topk", "contrastive"])
def test_training_stopped_and_taken_up_again(model, processor, tmp_path, kind):
    overrides = {"pair_loss": kind, "save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 1}
    whole = trainer_of(model, processor, tmp_path / "whole", **overrides)
    whole.train()
    logs = [line["pair_loss"] for line in whole.state.log_history if "pair_loss" in line]
    assert len(logs) == 6 and all(math.isfinite(value) and value > 0 for value in logs)
    stopped = trainer_of(model, processor, tmp_path / "parts", **overrides)
    stopped.add_callback(StopAt(4))
    stopped.train()
    resumed = trainer_of(model, processor, tmp_path / "parts", **overrides)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    whole.save_model(str(tmp_path / "sae"))
    loaded = SegCompassSae.from_pretrained(tmp_path / "sae")
    states = torch.randn(3, loaded.config.d_in)
    assert torch.equal(loaded.encode(states), whole.model.encode(states))
    without = trainer_of(model, processor, tmp_path / "without", **overrides | {"pair_loss": "none"})
    without.train()
    assert not torch.equal(without.model.W_dec, whole.model.W_dec) and without.pairs is None


def test_the_default_is_the_papers_and_wrong_counts_are_said(tmp_path):
    assert SaeTrainingConfig(output_dir=str(tmp_path)).pair_loss == "none"
    with pytest.raises(ValueError, match="pair_k must be positive"):
        SaeTrainingConfig(output_dir=str(tmp_path), pair_k=0)


def test_normalised_cosines_need_no_activation():
    # A pair of which nothing fires has cosine 0 and a finite gradient.
    sae = identity_sae()
    loss = contrastive_loss(sae, -torch.ones(2, 3), -torch.ones(2, 3), torch.arange(2))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and sae.W_enc.grad.isfinite().all()
