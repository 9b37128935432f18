"""The drift monitor: distances by hand, thresholds that hold on data of the same kind, files that are refused."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from segcompass_hf.explain.drift import (
    MIN_SAMPLES,
    DriftMonitor,
    concept_histograms,
    histograms_of_rows,
    js_distance,
)
from segcompass_hf.modeling_concepts import SparseConcepts


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def drawn(model, number, seed, shift=0.0):
    """Histograms of `number` samples, each of 60 tokens, of which a share `shift` uses other features."""
    generator, d_sae = np.random.default_rng(seed), model.config.sae_config.d_sae
    usual = np.zeros(d_sae)
    usual[:10], other = 0.1, np.zeros(d_sae)
    other[10:12] = 0.5
    counts = generator.multinomial(60, (1 - shift) * usual + shift * other, size=number)
    return (counts / 60).astype(np.float32)


def test_a_histogram_counts_tokens_and_weighs_samples_alike():
    concepts = SparseConcepts(
        features=torch.tensor([0, 2, 2, 1]),
        values=torch.tensor([9.0, 0.1, 0.1, 1.0]),
        token_index=torch.tensor([0, 0, 1, 3]),  # of three rows of two tokens; the last has no concept
        batch_size=3,
        sequence_length=2,
    )
    expected = [[1 / 3, 0, 2 / 3], [0, 1, 0], [0, 0, 0]]
    assert concept_histograms(concepts, 3).tolist() == [pytest.approx(row) for row in expected]


def test_the_distance_by_hand():
    # Middle (3/4, 1/4): 1/2 (1 log2 4/3 + 1/2 log2 2/3 + 1/2 log2 2) = 0.3113
    distance = js_distance(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    assert distance**2 == pytest.approx(0.3113, abs=1e-4)
    assert js_distance(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == pytest.approx(distance)


def test_the_same_kind_passes_and_another_does_not(model):
    monitor = DriftMonitor(model, drawn(model, 200, seed=0))
    flags = [monitor.check(drawn(model, 20, seed=s), 0.95, num_resamples=200).drifted for s in range(1, 61)]
    assert sum(flags) <= 9  # about 3 of 60 are expected; 10 or more have a chance of 0.1 %
    found = monitor.check(drawn(model, 20, seed=1, shift=0.2))
    assert found.drifted and found.distance > found.threshold and found.p_value == pytest.approx(1 / 501)
    assert {change.feature for change in found.changes[:2]} == {10, 11}
    first = found.changes[0]
    assert first.before == 0 and first.now == pytest.approx(0.1, abs=0.03) and 0 < first.part < 1
    assert sum(change.part for change in monitor.check(drawn(model, 20, 1, 0.2), num_changes=99).changes) == (
        pytest.approx(1)
    )


def test_small_windows_and_small_references_vary_more(model):
    reference = drawn(model, 200, seed=0)
    thresholds = {
        size: DriftMonitor(model, reference).check(drawn(model, size, seed=2)).threshold for size in (10, 160)
    }
    assert thresholds[10] > 2 * thresholds[160]
    small = DriftMonitor(model, reference[:20]).check(drawn(model, 160, seed=2)).threshold
    assert small > 1.5 * thresholds[160]  # the reference is drawn anew too


def test_chunks_of_resamples_change_nothing(model, monkeypatch):
    monitor, window = DriftMonitor(model, drawn(model, 30, seed=0)), drawn(model, 20, seed=1)
    whole = monitor._resampled(20, 50, seed=0)
    assert whole.shape == (50,) and np.array_equal(whole, monitor._resampled(20, 50, seed=0))
    monkeypatch.setattr("segcompass_hf.explain.drift.ROWS_AT_ONCE", 30 * 7)
    assert monitor._resampled(20, 50, seed=0).shape == (50,)
    assert monitor.check(window).num_reference == 30


def test_names_come_from_a_dictionary(model):
    class Dictionary:
        said = staticmethod(lambda feature: (f"name {feature}", 0.9))

    monitor = DriftMonitor(model, drawn(model, 50, seed=0))
    report = monitor.check(drawn(model, 20, seed=1, shift=0.3), dictionary=Dictionary(), num_changes=1).to_dict()
    (change,) = report["changes"]
    assert change["label"] == f"name {change['feature']}" and report["num_samples"] == 20


def test_a_reference_is_kept_in_a_file(model, tmp_path):
    monitor = DriftMonitor(model, drawn(model, 40, seed=0))
    monitor.save(tmp_path / "reference.safetensors")
    loaded = DriftMonitor.load(tmp_path / "reference.safetensors", model)
    assert np.array_equal(loaded.reference, monitor.reference)
    window = drawn(model, 20, seed=3)
    assert loaded.check(window) == monitor.check(window)
    other = tiny_model(seed=5)
    with torch.no_grad():
        other.sae.W_enc.add_(1.0)
    with pytest.raises(ValueError, match="reference of another SAE"):
        DriftMonitor.load(tmp_path / "reference.safetensors", other)
    (tmp_path / "reference.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no reference of a drift monitor"):
        DriftMonitor.load(tmp_path / "reference.safetensors", model)
    with pytest.raises(FileNotFoundError):
        DriftMonitor.load(tmp_path / "missing.safetensors", model)


def test_what_cannot_be_compared_is_refused(model):
    monitor = DriftMonitor(model)
    with pytest.raises(ValueError, match="the reference has 0 samples"):
        monitor.check(drawn(model, 20, seed=0))
    monitor = DriftMonitor(model, drawn(model, 20, seed=0))
    with pytest.raises(ValueError, match=f"the window has 2 samples; at least {MIN_SAMPLES}"):
        monitor.check(drawn(model, 2, seed=0))
    with pytest.raises(ValueError, match=r"the window has histograms of shape \(20, 3\)"):
        monitor.check(np.zeros((20, 3)))
    for confidence, resamples in ((1.0, 500), (0.0, 500), (0.999, 500)):
        with pytest.raises(ValueError, match="cannot be told from 500 resamples"):
            monitor.check(drawn(model, 20, seed=0), confidence, resamples)


def test_batches_join_the_reference(model):
    concepts = SparseConcepts(torch.tensor([0, 1]), torch.ones(2), torch.tensor([0, 1]), 2, 1)
    monitor = DriftMonitor(model)
    monitor.add_reference(concepts)
    monitor.add_reference(concepts)
    assert monitor.reference[:, :2].tolist() == [[1, 0], [0, 1]] * 2

    class Predictor:
        sizes = []

        def __init__(self):
            self.model = model

        def segment(self, rows):
            self.sizes.append(len(rows))
            first = SparseConcepts(torch.tensor([0]), torch.ones(1), torch.tensor([0]), len(rows), 1)
            return type("Output", (), {"concepts": first}), None, None

    found = histograms_of_rows(Predictor(), iter([{}] * 5), batch_size=2)
    assert Predictor.sizes == [2, 2, 1] and found[:, 0].tolist() == [1, 0, 1, 0, 1]
    assert histograms_of_rows(Predictor(), iter([])).shape == (0, monitor.d_sae)  # where no row can be read
