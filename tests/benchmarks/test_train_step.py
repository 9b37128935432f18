# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The training-step benchmark: every formulation computes the same, and the record holds what the tables show."""

import sys
from dataclasses import replace

import pytest
import torch
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import train_step
import train_step_measuring as measuring
from train_step_formulations import LADDER, NAIVE, OURS, UNSHARED, WITHOUT_KL, References, run_forward
from train_step_models import END_THINK, IMAGE, PAD, PRESETS, REF, THINK, Preset, proportions
from train_step_workloads import make_inputs

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def bench():
    return measuring.Bench(train_step.parse_arguments(["--preset", "tiny"]), ["whole", "shared"])


def test_ladder_ends_in_what_the_package_does():
    assert LADDER[0] is NAIVE
    assert replace(LADDER[-1], name="ours", prompts="shared", through_package=True) == OURS
    for before, after in zip(LADDER, LADDER[1:], strict=False):
        changed = [field for field in vars(after) if getattr(after, field) != getattr(before, field)]
        assert len(changed) == 2 and "name" in changed  # one saving at a time


@pytest.mark.slow
def test_same_loss_and_gradients(bench):
    found, peaks = measuring.check(bench, "a", [*LADDER, OURS, *WITHOUT_KL])
    assert set(found) == {row.name for row in [*LADDER[1:], OURS]}
    assert set(peaks) == {row.name for row in [*LADDER, OURS, *WITHOUT_KL]}
    assert peaks["ours"] == pytest.approx(peaks["+ matched slots decoded"], rel=0.01)
    for name, row in found.items():
        assert row["loss"] <= 1e-5 and row["log_probs"] <= 1e-5 and row["ref_log_probs"] <= 1e-5, name
        assert row["gradients_relative"] <= 1e-5, name
        assert {"vlm", "codebook", "slot_encoder", "slot_mapper", "sam"} == set(row["parts"])
        assert all(part["largest"] > 1e-6 for part in row["parts"].values()), "a part without gradient shows nothing"


def test_a_group_has_the_same_loss_and_gradients(bench):
    with measuring.scaled_tiles(TINY):
        found, peaks = measuring.check(bench, "c", [NAIVE, UNSHARED, OURS])
    for name, row in found.items():
        assert row["compared"] == "loss"
        assert max(row[key] for key in ("loss", "log_probs", "ref_log_probs", "gradients_relative")) <= 1e-5, name
    assert peaks["ours"] < peaks["ours without sharing"] < peaks["naive"]


@pytest.mark.parametrize("workload", ["a", "c"])
def test_another_family_has_the_same_loss_and_gradients(workload):
    """Qwen3-VL: positions of images in three dimensions, pictures as patches, features beside the first layers."""
    given = train_step.parse_arguments(["--preset", "tiny-qwen3-vl", "--depth", "3"])
    qwen = measuring.Bench(given, ["whole", "shared"])
    assert len(qwen.model.base_model.language_model.layers) == 3
    found, _ = measuring.check(qwen, workload, [NAIVE, OURS])
    row = found["ours"]
    assert max(row[key] for key in ("loss", "log_probs", "ref_log_probs", "gradients_relative")) <= 1e-5
    assert all(part["largest"] > 1e-6 for part in row["parts"].values())


def test_original_layout_agrees_where_it_can(bench):
    row = measuring.check(bench, "b", [NAIVE, OURS])[0]["ours"]
    assert row["compared"] == "policy_loss"
    assert max(row[key] for key in ("loss", "log_probs", "ref_log_probs", "gradients_relative")) <= 1e-5


def test_kl_term_is_there_and_is_left_out(bench):
    losses = {}
    for formulation in (NAIVE, *WITHOUT_KL):
        inputs = measuring.inputs_of(bench, formulation, "a")
        with torch.no_grad():
            output = run_forward(bench.model, bench.references, formulation, inputs)
            losses[formulation.name] = output.loss(inputs).item()
        if formulation is NAIVE:
            difference = (output.ref_log_probs - output.log_probs) * inputs.completion_mask
            # 0.2 x the mean over completion tokens of exp(d) - d - 1; no padding in (a).
            kl = 0.2 * (difference.exp() - difference - 1).mean().item()
    assert kl > 1e-6, "the policy must differ from its reference"
    assert losses["naive"] - losses["naive without KL"] == pytest.approx(kl, rel=0.02)
    assert losses["ours without KL"] == pytest.approx(losses["naive without KL"], abs=1e-5)


class TestInputs:
    def test_rows_without_padding(self, bench):
        inputs = make_inputs(bench.model, TINY, "a", "original")
        ids = inputs.vlm["input_ids"]
        assert ids.shape == (2, 28) and bool((inputs.vlm["attention_mask"] == 1).all())
        assert ((ids == IMAGE).sum(1) == 9).all()  # 42 pixels in patches of 14: 3 x 3
        assert (ids[:, 14] == THINK).all() and (ids[:, -6] == END_THINK).all() and (ids[:, -5:-1] == REF).all()
        assert torch.equal(inputs.second["input_ids"], ids)

    def test_a_group_has_one_prompt_and_different_answers(self, bench):
        inputs = measuring.inputs_of(bench, OURS, "c")
        ids = inputs.vlm["input_ids"]
        assert ids.shape == (4, 44) and (ids[:, :30] == ids[0, :30]).all()  # 30 + 14 tokens
        assert (
            len(ids[:, 30:].unique(dim=0)) == 4 and (inputs.vlm["pixel_values"] == inputs.vlm["pixel_values"][0]).all()
        )
        assert torch.equal(inputs.targets.prompts.inputs["input_ids"], ids[:1, :30])
        assert measuring.inputs_of(bench, UNSHARED, "c").targets.prompts is None

    def test_original_layout_repeats_the_completion_with_its_padding(self, bench):
        original, ours = (make_inputs(bench.model, TINY, "b", layout) for layout in ("original", "ours"))
        assert original.vlm["input_ids"].shape == (2, 48)  # 24 + 24, fixed
        # 14 prompt tokens; completions of 0.8 x 14 = 11 and 1.2 x 14 = 17.
        assert ours.vlm["input_ids"].shape == (2, 31) and ours.completion_mask.sum(1).tolist() == [11, 17]
        for row in range(2):
            tokens = ours.vlm["input_ids"][row][ours.vlm["attention_mask"][row].bool()]
            assert torch.equal(original.vlm["input_ids"][row][original.vlm["attention_mask"][row].bool()], tokens)
            completion = original.vlm["input_ids"][row, 24:]
            expected = torch.cat([tokens, completion])[:48]
            mask = original.second["attention_mask"][row].bool()
            assert torch.equal(original.second["input_ids"][row][mask], expected)
            assert (expected == PAD).any(), "padding of the completion counts as tokens"


class TestRecord:
    @pytest.mark.slow
    def test_measures_and_reports(self, tmp_path, capsys, monkeypatch):
        shares = {"SAE encode": 0.03}
        monkeypatch.setattr(train_step, "proportions", lambda preset: shares)  # building a 7B model takes its time
        path = tmp_path / "record.json"
        assert train_step.main(["--preset", "tiny", "--repeats", "1", "--output", str(path)]) == 0
        text = path.with_suffix(".md").read_text()
        assert text in capsys.readouterr().out
        for workload in ("(a): no padding", "(b): the original's layout"):
            assert f"## Workload {workload}" in text
        assert "Matching slots to objects takes" in text and "| SAE encode | 3.00 | 3.00 |" in text

    def test_memory_is_exact(self, bench):
        inputs = measuring.inputs_of(bench, OURS, "a")
        first, result = bench.counted_step(OURS, inputs)
        trained = sum(gradient.nbytes for gradient in result["gradients"].values())
        assert first == bench.counted_step(OURS, inputs)[0] > trained  # gradients and activations
        held = bench.held(OURS)
        upper = sum(p.nbytes for p in bench.model.vlm.model.language_model.layers[2:].parameters())
        head = bench.model.vlm.lm_head.weight
        # The reference owns the layers above the middle and the head (some rows of it train), nothing else.
        assert held["reference"] == upper + head.nbytes
        assert 2 * trained <= held["optimizer"] <= 2 * trained + 4 * len(bench.trained)  # two moments, a count each
        whole = sum(p.nbytes for p in [*bench.model.vlm.parameters(), *bench.model.vlm.buffers()])
        assert bench.held(NAIVE)["reference"] == whole

    def test_every_step_starts_from_the_same_weights(self, bench):
        inputs = measuring.inputs_of(bench, OURS, "a")
        bench.step(OURS, inputs)
        assert any(not torch.equal(p, w) for p, w in zip(bench.trained, bench.weights, strict=True))
        bench.reset()
        assert all(torch.equal(p, w) for p, w in zip(bench.trained, bench.weights, strict=True))


@pytest.mark.parametrize("name", ["cpu", "llava-7b"])
def test_presets_keep_the_proportions(name):
    """LLaVA-1.5-7B: vocabulary / (depth x width) is 32,064 / (32 x 4,096) = 0.245, d_sae / (depth x width) 0.5."""
    preset: Preset = PRESETS[name]
    assert preset.vocabulary / (preset.depth * preset.width) == pytest.approx(0.2446, rel=0.01)
    assert preset.d_sae / (preset.depth * preset.width) == 0.5
    assert preset.feed_forward / preset.width == pytest.approx(11008 / 4096, rel=0.01)
    assert preset.prompt_tokens + preset.completion_tokens == 926


def test_proportions_are_counted():
    # Per sequence of 28 tokens: SAE encode 2 x 28 x 32 x 64, head the same with 64 words, codebook 2 x 28 x 64 x 32.
    shares = proportions(TINY)
    assert shares["SAE encode"] == shares["SAE decode"] == shares["head over all tokens"] == shares["dense codebook"]
    whole = shares["vision tower"] + shares["decoder layers"] + shares["head over all tokens"]
    assert whole == pytest.approx(1.0)
    # A layer of width 32: 4 x 32^2 for attention's weights and 3 x 32 x 64 for the feed-forward; attention itself
    # takes 2 products of 28 x 28 x 32.
    layer = 2 * 28 * (4 * 32**2 + 3 * 32 * 64) + 2 * 2 * 28 * 28 * 32
    assert shares["decoder layers"] / shares["SAE encode"] == pytest.approx(4 * layer / (2 * 28 * 32 * 64))


def test_references_share_what_is_frozen(bench):
    references = References(bench.model)
    assert references.bytes("none") == 0 and references.build("none") is None
    shared, whole = references.bytes("shared"), references.bytes("whole")
    assert 0 < shared < whole
