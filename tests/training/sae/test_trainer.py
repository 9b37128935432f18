"""SAE pre-training: the losses, the counts, the evaluation, and runs that are stopped and taken up again."""

import doctest
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from places import ROOT, SUPPORT
from sae import StopAt, Stream, by_hand, interleaved, rows, settings
from tiny import tiny_image, tiny_model, tiny_processor
from transformers import TrainerCallback

from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.sae import cache_filling, metrics, upkeep
from segcompass_hf.training.sae.activations import ActivationHarvester
from segcompass_hf.training.sae.config import SaeTrainingConfig
from segcompass_hf.training.sae.metrics import SaeEvaluation, StateErrors, density_histogram, density_shares
from segcompass_hf.training.sae.rows import RowEncoder
from segcompass_hf.training.sae.start import fit_thresholds_
from segcompass_hf.training.sae.trainer import SaeTrainer
from segcompass_hf.training.sae.upkeep import FiringCounts, resample_dead_features_

ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("llava")


def trainer_of(model, processor, folder, train_dataset=None, **overrides) -> SaeTrainer:
    return SaeTrainer(model, settings(folder, **overrides), train_dataset or rows(8), processing_class=processor)


class TestDeadFeatureLoss:
    @pytest.mark.parametrize(
        ("dead", "expected"),
        [
            # x = (2, 1): pre-activations 2, 1, 3; k = 1 keeps the 3, rebuilt 3 (1, 0) + (0.5, -0.5) = (3.5, -0.5).
            # What is missed is (-1.5, 1.5). Feature 1 of value 1 writes (0, 1): 1.5^2 + 0.5^2.
            ([False, True, False], 2.5),
            # d_in / 2 = 1 of the two dead ones, the larger: feature 0 of value 2 writes (6, 8): 7.5^2 + 6.5^2.
            ([True, True, False], 98.5),
            ([False, False, False], 0.0),
        ],
    )
    @pytest.mark.parametrize(
        "config", [{"architecture": "topk"}, {"architecture": "batchtopk"}, {"activation": "topk"}]
    )
    def test_by_hand(self, config, dead, expected):
        output = by_hand(k=1, **config).train()(torch.tensor([[2.0, 1.0]]), dead_features=torch.tensor(dead))
        assert output.auxiliary_loss.item() == pytest.approx(expected)
        assert output.loss.item() == pytest.approx(output.mse_loss.item() + expected / 32)

    def test_only_dead_features_learn_from_it(self):
        sae = by_hand(architecture="topk", k=1)
        sae(torch.tensor([[2.0, 1.0]]), dead_features=torch.tensor([False, True, False])).auxiliary_loss.backward()
        assert sae.W_dec.grad[1].abs().sum() > 0 and sae.W_enc.grad[:, 1].abs().sum() > 0
        assert not sae.W_dec.grad[[0, 2]].any() and not sae.W_enc.grad[:, [0, 2]].any() and sae.b_dec.grad is None

    @pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
    def test_the_others_have_none(self, architecture):
        sae = by_hand(architecture=architecture)
        outputs = [sae(torch.tensor([[2.0, 1.0]]), dead_features=dead) for dead in (None, torch.ones(3) > 0)]
        assert torch.equal(outputs[0].loss, outputs[1].loss)


class TestNumbers:
    @pytest.mark.parametrize("module", [metrics, upkeep, cache_filling])
    def test_examples(self, module):
        results = doctest.testmod(module, extraglobs={"torch": torch})
        assert results.attempted and not results.failed

    def test_explained_variance_in_parts_is_that_of_the_whole(self):
        states, rebuilt = torch.randn(30, 4) + 5, torch.randn(30, 4) + 5
        parts = [StateErrors(), StateErrors()]
        for part, span in zip(parts, (slice(0, 7), slice(7, 30)), strict=True):
            part.add(states[span], rebuilt[span])
        parts[0].merge(parts[1])
        expected = 1 - (states - rebuilt).pow(2).sum() / (states - states.mean(0)).pow(2).sum()
        assert parts[0].explained_variance() == pytest.approx(expected.item(), rel=1e-5)
        assert math.isnan(StateErrors().explained_variance())

    def test_every_feature_is_in_one_decade(self):
        # of 10,000 tokens: never, 1 (1e-4), 10 (1e-3), 999 (1e-2), 1,000 (1e-1), all
        counts = torch.tensor([0, 1, 10, 999, 1000, 10_000])
        shares = density_shares(counts, 10_000)
        expected = {"never": 1, "1e-7": 0, "1e-6": 0, "1e-5": 0, "1e-4": 1, "1e-3": 1, "1e-2": 1, "1e-1": 2}
        assert shares == {name: pytest.approx(n / 6) for name, n in expected.items()}
        histogram = density_histogram(counts, 10_000)
        assert histogram["never"] == 1 and sum(histogram["features"]) == 5
        assert len(histogram["log10_edges"]) == len(histogram["features"]) + 1 == 29
        assert histogram["features"][12] == 1  # 10 ** -4: four bins a decade, from 10 ** -7

    def test_silence_is_counted_in_tokens(self):
        counts = FiringCounts(2)
        counts.add(torch.tensor([[1.0, 0.0]] * 3))
        counts.add(torch.tensor([[1.0, 0.0]] * 2))
        assert counts.silent_tokens.tolist() == [0, 5] and counts.fired.tolist() == [5, 0] and counts.tokens == 5
        assert counts.dead(5).tolist() == [False, True] and not counts.dead(6).any()
        counts.restart()
        assert counts.tokens == 0 and counts.silent_tokens.tolist() == [0, 5]  # silence goes on
        counts.add(torch.tensor([[0.0, 2.0]]))
        assert counts.silent_tokens.tolist() == [1, 0]
        other = FiringCounts(2)
        other.load_state_dict(counts.state_dict())
        assert other.silent_tokens.tolist() == [1, 0] and other.fired.tolist() == [0, 1] and other.tokens == 1

    def test_resampling_by_hand(self):
        sae = by_hand()
        optimizer = torch.optim.AdamW(sae.parameters())
        sae(torch.tensor([[2.0, 1.0]])).loss.backward()
        optimizer.step()
        sae = by_hand()
        for group in optimizer.param_groups:
            group["params"] = list(sae.parameters())
        optimizer.state = {p: {"exp_avg": torch.ones_like(p), "step": torch.tensor(1.0)} for p in sae.parameters()}
        # (2, 1) is rebuilt as 2 (3, 4) + 1 (0, 1) + 3 (1, 0) + b_dec = (9.5, 8.5): missed (-7.5, -7.5).
        state = torch.tensor([[2.0, 1.0]])
        dead = torch.tensor([False, True, True])
        features = resample_dead_features_(sae, dead, state, torch.zeros(1).long(), optimizer, torch.Generator())
        assert features.tolist() == [1]  # one token can start one feature
        direction = torch.tensor([-1.0, -1.0]) / math.sqrt(2)
        # Living: feature 0, whose decoder row has norm 5 and whose encoder column has norm 1.
        torch.testing.assert_close(sae.W_dec[1], 5 * direction)
        torch.testing.assert_close(sae.W_enc[:, 1], 0.2 * direction)
        averages = {name: optimizer.state[p]["exp_avg"] for name, p in sae.named_parameters()}
        assert averages["W_dec"].sum(1).tolist() == [2, 0, 2] and averages["W_enc"].sum(0).tolist() == [2, 0, 2]
        assert averages["b_enc"].tolist() == [1, 0, 1] and averages["b_dec"].tolist() == [1, 1]

    def test_nothing_dead_nothing_resampled(self):
        sae = by_hand()
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        optimizer = torch.optim.AdamW(sae.parameters())
        none = resample_dead_features_(
            sae, torch.zeros(3) > 0, torch.ones(2, 2), torch.zeros(2).long(), optimizer, torch.Generator()
        )
        assert none.numel() == 0
        assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def perfect_sae(width=32) -> SegCompassSae:
    """Rebuilds every state: features are the positive and the negative part of each coordinate."""
    sae = SegCompassSae(SegCompassSaeConfig(d_in=width, d_sae=2 * width, layer=2)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(width), -torch.eye(width)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
    return sae


def zero_sae(width=32) -> SegCompassSae:
    sae = SegCompassSae(SegCompassSaeConfig(d_in=width, d_sae=8, layer=2)).eval()
    with torch.no_grad():
        sae.W_enc.zero_()
    return sae


class TestEvaluation:
    def metrics(self, sae, model, processor, folder, **overrides):
        trainer = SaeTrainer(model, settings(folder, **overrides), rows(8), rows(3), processor, sae)
        return trainer.evaluate()

    def test_a_perfect_sae(self, model, processor, tmp_path):
        metrics = self.metrics(perfect_sae(), model, processor, tmp_path)
        assert metrics["eval_ce_recovered"] == pytest.approx(1, abs=1e-5)
        assert metrics["eval_explained_variance"] == pytest.approx(1, abs=1e-5)
        assert metrics["eval_ce_spliced"] == pytest.approx(metrics["eval_ce_clean"], abs=1e-5)
        assert metrics["eval_l0"] == pytest.approx(32)  # every coordinate has one sign
        assert abs(metrics["eval_ce_zero"] - metrics["eval_ce_clean"]) > 0.01

    def test_a_zero_sae(self, model, processor, tmp_path):
        metrics = self.metrics(zero_sae(), model, processor, tmp_path)
        assert metrics["eval_ce_recovered"] == pytest.approx(0, abs=1e-6)
        assert metrics["eval_l0"] == 0 and metrics["eval_dead_features"] == 1
        assert metrics["eval_explained_variance"] <= 0
        assert {"eval_explained_variance_text", "eval_explained_variance_image"} <= metrics.keys()

    @pytest.mark.parametrize("drop_first_token", [True, False])
    def test_cross_entropies_against_a_plain_formulation(self, model, processor, tmp_path, drop_first_token):
        metrics = self.metrics(zero_sae(), model, processor, tmp_path, drop_first_token=drop_first_token)
        sums, words = {"clean": 0.0, "zero": 0.0}, 0
        for row in enumerate(rows(2)):  # max_eval_rows is 2; one at a time, so without padding
            inputs = RowEncoder(processor)([row])
            ids = inputs["input_ids"][0]
            is_word = ids[1:] != processor.image_token_id
            words += int(is_word.sum())
            for name in sums:
                handle = model.vlm.base_model.language_model.layers[1].register_forward_hook(
                    lambda module, args, output: _zeroed(output, first=int(drop_first_token))
                )
                if name == "clean":
                    handle.remove()
                with torch.no_grad():
                    logits = model.vlm(**inputs).logits[0]
                handle.remove()
                sums[name] += F.cross_entropy(logits[:-1][is_word], ids[1:][is_word], reduction="sum").item()
        for name, total in sums.items():
            assert metrics[f"eval_ce_{name}"] == pytest.approx(total / words, abs=1e-5)

    def test_padding_changes_nothing(self, model, processor):
        sae = perfect_sae()
        sae.W_dec.data *= 0.7
        harvester = ActivationHarvester(model.vlm, RowEncoder(processor), 2)
        results = []
        for size in (1, 4):
            evaluation = SaeEvaluation()
            for start in range(0, 4, size):
                metrics.evaluate_rows(evaluation, sae, harvester, list(enumerate(rows(4)))[start : start + size])
            results.append(evaluation.metrics())
        assert results[0] == {name: pytest.approx(value, rel=1e-4) for name, value in results[1].items()}

    def test_processes_add_up(self, model, processor):
        harvester = ActivationHarvester(model.vlm, RowEncoder(processor), 2)
        sae, parts = perfect_sae(), [SaeEvaluation() for _ in range(3)]
        batch = list(enumerate(rows(4)))
        for part, taken in zip(parts, (batch, batch[:2], batch[2:]), strict=True):
            metrics.evaluate_rows(part, sae, harvester, taken)
        parts[1].merge(parts[2])
        whole = parts[0].metrics()
        assert parts[1].metrics() == {name: pytest.approx(v, rel=1e-4, abs=1e-6) for name, v in whole.items()}

    def test_without_rows(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, validation_share=0.0)
        with pytest.raises(ValueError, match="eval_dataset, or set validation_share"):
            trainer.evaluate()


def _zeroed(output, first):
    states = output if isinstance(output, torch.Tensor) else output[0]
    states = states.clone()
    states[:, first:] = 0
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])


class TestConfig:
    def test_defaults_are_the_papers(self, tmp_path):
        args = SaeTrainingConfig(output_dir=str(tmp_path))
        assert (args.learning_rate, args.l1_coefficient, args.max_grad_norm, args.d_sae) == (5e-5, 5.0, 1.0, 65_536)
        assert args.optim.startswith("adamw") and args.weight_decay == 0 and args.architecture == "standard"
        assert args.hold_out_every == 20  # 5 %

    def test_the_schedule(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, learning_rate=1.0)
        trainer.create_optimizer_and_scheduler(num_training_steps=200)
        rates = []
        for _ in range(200):
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert rates[:7] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])  # 3 % of 200
        half = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (103 - 6) / 194))
        assert rates[103] == pytest.approx(half) and trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.1)

    @pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
    def test_other_schedules(self, model, processor, tmp_path, name):
        trainer = trainer_of(model, processor, tmp_path, lr_scheduler_type=name, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"validation_share": 0.7}, "validation_share=0.7"),
            ({"l1_warmup_ratio": 2.0}, "l1_warmup_ratio is a share"),
            ({"buffer_tokens": 0}, "buffer_tokens must be positive"),
            ({"architecture": "topk", "resample_every": 10}, "resample_every is for architecture='standard'"),
            ({"train_tokens": 10, "max_steps": 10}, "not both"),
        ],
    )
    def test_wrong_settings(self, tmp_path, wrong, message):
        with pytest.raises(ValueError, match=message):
            SaeTrainingConfig(output_dir=str(tmp_path), **wrong)

    def test_from_the_command_line(self, tmp_path):
        from transformers import HfArgumentParser

        words = f"--output_dir {tmp_path} --architecture batchtopk --k 8 --sae_layer 3 --unreadable_rows error"
        words += " --cache_layers 1 3"
        (args,) = HfArgumentParser(SaeTrainingConfig).parse_args_into_dataclasses(words.split())
        assert (args.architecture, args.k, args.sae_layer, args.unreadable_rows) == ("batchtopk", 8, 3, "error")
        assert args.cache_layers == [1, 3]


class TestTraining:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_the_loss_falls_and_only_the_sae_moves(self, model, processor, tmp_path, architecture):
        trainer = trainer_of(model, processor, tmp_path, architecture=architecture, max_steps=60, logging_steps=10)
        vlm = {name: value.clone() for name, value in model.vlm.state_dict().items()}
        sae = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
        assert logs[-1]["explained_variance"] > logs[0]["explained_variance"]
        assert all(not torch.equal(value, sae[name]) for name, value in trainer.model.named_parameters())
        assert all(torch.equal(value, vlm[name]) for name, value in model.vlm.state_dict().items())
        if architecture == "topk":
            assert logs[-1]["l0"] <= 4
        norms = trainer.model.W_dec.norm(dim=-1)
        assert torch.allclose(norms, torch.ones(64), atol=1e-5) == (architecture != "standard")

    def test_logs(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, architecture="topk", logging_steps=4, max_steps=4)
        seen = []
        forward = trainer.model.forward
        trainer.model.forward = lambda *args, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1]
        trainer.train()
        (log,) = [line for line in trainer.state.log_history if "loss" in line]
        acts = torch.cat([output.feature_acts for output in seen])
        assert log["loss"] == pytest.approx(sum(output.loss.item() for output in seen) / 4)
        assert log["l0"] == pytest.approx((acts > 0).sum().item() / len(acts))
        assert log["feature_density/never"] == pytest.approx((~(acts > 0).any(0)).double().mean().item())
        assert sum(value for name, value in log.items() if name.startswith("feature_density")) == pytest.approx(1)
        # Silent for the last 100 tokens: not once in the last three batches of 48 (in two it may be one token short).
        dead = ~(acts[48:] > 0).any(0)
        assert log["dead_features"] == pytest.approx(dead.double().mean().item())
        record = json.loads((tmp_path / "feature_density.json").read_text())
        assert record["step"] == 4 and record["tokens"] == 4 * 48
        assert record["never"] + sum(record["features"]) == 64

    def test_a_run_that_fails_leaves_no_thread_behind(self, model, processor, tmp_path):
        class Failing(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                assert any(thread.name == "sae-harvest" for thread in threading.enumerate())
                raise RuntimeError("in the middle")

        trainer = trainer_of(model, processor, tmp_path)
        trainer.add_callback(Failing())
        with pytest.raises(RuntimeError, match="in the middle"):
            trainer.train()
        assert not any(thread.name == "sae-harvest" for thread in threading.enumerate())

    def test_a_new_sae_starts_from_the_mean_of_the_first_block(self, model, processor, tmp_path):
        means = []

        class Look(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                block = trainer.buffer.block().states  # before others stand in the place of what was served
                means.append((block / block.norm(dim=-1, keepdim=True) * math.sqrt(32)).mean(0))

            def on_step_begin(self, args, state, control, **kwargs):
                means.append(trainer.model.b_dec.detach().clone())
                control.should_training_stop = True

        trainer = trainer_of(model, processor, tmp_path)
        trainer.add_callback(Look())
        trainer.train()
        torch.testing.assert_close(means[0], means[1], atol=1e-5, rtol=1e-4)

    def test_thresholds_start_where_k_features_fire(self):
        sae = by_hand(architecture="jumprelu")
        states = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, -3.0], [4.0, 5.0]])
        # Pre-activations x: 1, 2, 3, 4; y: 0, 0, -3, 5; x + y: 1, 2, 0, 9. Of four tokens k / 3 is one for k = 1.
        fit_thresholds_(sae, states, k=1)
        torch.testing.assert_close(sae.threshold.data, torch.tensor([3.0, 0.01, 2.0]))
        assert (sae.encode(states) > 0).sum(0).tolist() == [1, 1, 1]

    def test_jumprelu_starts_at_k(self, model, processor, tmp_path):
        trainer = trainer_of(
            model, processor, tmp_path, architecture="jumprelu", k=4, max_steps=1, logging_steps=1, learning_rate=0.0
        )
        trainer.train()
        assert trainer.state.log_history[0]["l0"] == pytest.approx(4, abs=1)

    def test_normalisation_per_modality_is_fitted(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, normalize_activations="per_modality")
        trainer.train()
        assert trainer.model.modality_mean.any(1).all() and (trainer.model.modality_scale != 1).all()
        assert "eval_explained_variance" in trainer.evaluate()

    def test_warm_up_of_the_sparsity_weight(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, l1_warmup_ratio=0.5, max_steps=8, logging_steps=1)
        terms = []
        forward = trainer.model.forward

        def remember(*args, **kwargs):
            output = forward(*args, **kwargs)
            terms.append((output.mse_loss.item(), output.sparsity_loss.item()))
            return output

        trainer.model.forward = remember
        trainer.train()
        logs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        weights = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1]  # of 0.1, over 4 of 8 steps
        expected = [mse + weight * l1 for (mse, l1), weight in zip(terms, weights, strict=True)]
        assert logs == pytest.approx(expected, rel=1e-5)

    def test_dead_features_start_again(self, model, processor, tmp_path):
        overrides = {"resample_every": 4, "dead_after_tokens": 150, "max_steps": 8, "logging_steps": 4}
        trainer = trainer_of(model, processor, tmp_path, **overrides)
        trainer.model.b_enc.data[5:9] = -1e3  # never fire
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        assert logs[0]["resampled_features"] == 4 and (trainer.model.b_enc[5:9].abs() < 1).all()
        assert "resampled_features" not in logs[1]  # 8 of 8 steps is beyond 60 %

    def test_the_saved_sae(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, architecture="batchtopk")
        trainer.train()
        trainer.save_model()
        assert not (tmp_path / "tokenizer.json").exists()
        sae = SegCompassSae.from_pretrained(tmp_path)
        assert sae.config.layer == 2 and sae.config.architecture == "batchtopk" and sae.topk_threshold > 0
        states = torch.randn(5, 32)
        assert torch.equal(sae.encode(states), trainer.model.eval().encode(states))

    def test_going_on_from_an_sae(self, model, processor, tmp_path):
        sae = perfect_sae()
        b_dec = sae.b_dec.detach().clone()
        trainer = SaeTrainer(model, settings(tmp_path, max_steps=1, learning_rate=0.0), rows(8), None, processor, sae)
        trainer.train()
        assert torch.equal(sae.b_dec, b_dec)  # not started anew

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("decoder_norm", ["auto", "unit"])
    def test_the_decoder_norms_of_a_given_sae_are_no_loss(
        self, model, processor, tmp_path, architecture, decoder_norm, caplog
    ):
        free = {"architecture": architecture, "decoder_norm": "free", "max_steps": 40, "learning_rate": 1e-2}
        trainer = trainer_of(model, processor, tmp_path / "first", **free)
        trainer.train()
        sae, states = trainer.model.eval(), torch.randn(30, 32)
        norms = sae.W_dec.norm(dim=-1)
        assert norms.max() > 1.2 * norms.min()
        before, threshold = sae(states).reconstruction, getattr(sae, "topk_threshold", torch.zeros(())).clone()
        still = {"max_steps": 1, "learning_rate": 1e-12, "decoder_norm": decoder_norm}
        caplog.clear()
        again = SaeTrainer(model, settings(tmp_path / "second", **still), rows(8), None, processor, sae)
        again.train()
        ranks, kept = architecture in ("topk", "batchtopk"), sae.W_dec.norm(dim=-1)
        unit = decoder_norm == "unit" or architecture in ("gated", "jumprelu")
        assert torch.allclose(kept, torch.ones(64), atol=1e-4) == (unit and not (ranks and decoder_norm == "auto"))
        assert ("decoder rows of the given SAE have norms from" in caplog.text) == ranks
        if architecture == "batchtopk":  # its mean follows every batch
            sae.topk_threshold.copy_(threshold)
        if not (ranks and decoder_norm == "unit"):  # which the warning says
            torch.testing.assert_close(sae.eval()(states).reconstruction, before, atol=1e-4, rtol=1e-4)

    def test_a_top_k_sae_of_unit_rows_keeps_them(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, architecture="topk")
        trainer.train()
        again = SaeTrainer(model, settings(tmp_path / "again"), rows(8), None, processor, trainer.model)
        assert again.unit_decoder

    def test_resampling_is_refused_for_a_given_sae_of_another_architecture(self, model, processor, tmp_path):
        sae = SegCompassSae(SegCompassSaeConfig(d_in=32, d_sae=64, architecture="gated", layer=2))
        with pytest.raises(ValueError, match="resample_every is for architecture='standard', got an SAE of .*'gated'"):
            SaeTrainer(model, settings(tmp_path, resample_every=2), rows(8), None, processor, sae)

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
    def test_other_families_and_interleaved_streams(self, family, tmp_path):
        stream = Stream([interleaved() for _ in range(5)])
        trainer = trainer_of(
            tiny_model(family),
            tiny_processor(family),
            tmp_path,
            train_dataset=stream,
            max_steps=3,
            validation_share=0.25,
        )
        trainer.train()
        assert trainer.state.global_step == 3 and stream.epoch is not None
        assert math.isfinite(trainer.evaluate()["eval_ce_recovered"])

    def test_a_datasets_stream(self, model, processor, tmp_path):
        from datasets import Dataset, Features, Image, List, Value

        features = Features({"images": List(Image()), "texts": List(Value("string"))})
        documents = [{"images": [None, tiny_image(i)], "texts": [f"the ring {i}", None]} for i in range(6)]
        table = Dataset.from_list(documents, features=features)
        results = []
        for name, dataset in (("table", table), ("stream", table.to_iterable_dataset())):
            trainer = trainer_of(
                model, processor, tmp_path / name, train_dataset=dataset, shuffle_rows=False, validation_share=0.0
            )
            trainer.train()
            results.append(trainer.model.state_dict())
            assert "unreadable_rows" not in trainer.state.log_history[0]
        assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())

    def test_steps_from_tokens(self, model, processor, tmp_path):
        args = {"max_steps": -1, "train_tokens": 500, "gradient_accumulation_steps": 2}
        trainer = trainer_of(model, processor, tmp_path, **args)
        trainer.train()
        assert trainer.state.global_step == 5  # 500 // (48 * 2)

    def test_steps_from_epochs(self, model, processor, tmp_path):
        trainer = trainer_of(model, processor, tmp_path, max_steps=-1, num_train_epochs=2, validation_share=0.0)
        tokens = 2 * sum(len(batch) for _, batch in trainer.source.epoch_batches(0))  # of 8 rows, all of them sampled
        trainer.train()
        assert trainer.state.global_step == tokens // 48
        assert 1.5 < trainer.state.epoch <= 2

    def test_steps_from_a_cache_are_those_of_what_it_holds(self, model, processor, tmp_path):
        steps = []
        for limit in (60, None):  # a trial first
            overrides = {"max_steps": -1, "num_train_epochs": 1, "validation_share": 0.0, "cache_max_tokens": limit}
            folder = tmp_path / str(limit)
            trainer = trainer_of(model, processor, folder, cache_dir=str(tmp_path / "cache"), **overrides)
            trainer.train()
            cached = trainer.buffer.source.num_tokens
            assert trainer.state.global_step == cached // 48
            steps.append(trainer.state.global_step)
        assert cached == sum(len(batch) for _, batch in trainer.source.epoch_batches(0)) and steps[0] < steps[1]

    def test_unreadable_rows_are_left_out_and_counted(self, model, processor, tmp_path):
        data = [*rows(5), {"image": {"bytes": b"broken"}, "instruction": "the ring", "sample_id": "bad"}]
        trainer = trainer_of(model, processor, tmp_path, train_dataset=data, validation_share=0.0)
        trainer.train()
        assert trainer.state.log_history[-2]["unreadable_rows"] == 1
        trainer = trainer_of(
            model, processor, tmp_path, train_dataset=data, validation_share=0.0, unreadable_rows="error"
        )
        with pytest.raises(ValueError, match="row 5"):
            trainer.train()

    def test_which_layer(self, model, processor, tmp_path):
        vlm = model.vlm
        assert trainer_of(model, processor, tmp_path).harvester.layer == 2  # SegCompass's own
        assert trainer_of(vlm, processor, tmp_path).harvester.layer == 2  # half of 4
        trainer = trainer_of(model, processor, tmp_path, sae_layer=3)
        assert trainer.harvester.layer == trainer.model.config.layer == 3
        with pytest.raises(ValueError, match="trained on layer 2 and sae_layer is 1"):
            SaeTrainer(vlm, settings(tmp_path, sae_layer=1), rows(4), None, processor, perfect_sae())
        with pytest.raises(ValueError, match="0 to 4 for this VLM, got 7"):
            trainer_of(model, processor, tmp_path, sae_layer=7)
        with pytest.raises(ValueError, match="needs the model whose states it reads"):
            SaeTrainer(perfect_sae(), settings(tmp_path), rows(4), None, processor)
        with pytest.raises(ValueError, match="and train_dataset, got .* and NoneType"):
            SaeTrainer(vlm, settings(tmp_path), None, rows(4), processor)
        given = {"args": settings(tmp_path), "train_dataset": rows(4), "processing_class": processor}
        by_its_old_name = SaeTrainer(model=None, vlm=vlm, **given)
        assert by_its_old_name.is_new_sae and by_its_old_name.vlm is getattr(vlm, "vlm", vlm)

    @pytest.mark.parametrize("count", [2, 5])
    def test_a_small_stream_holds_rows_out_as_a_small_table_does(self, model, processor, tmp_path, count):
        # 5 rows are fewer than every 20th: the last one is held out, for a stream as for a table
        held_out = []
        for dataset in (rows(count), Stream(rows(count))):
            trainer = trainer_of(model, processor, tmp_path, train_dataset=dataset, validation_share=0.05)
            held_out.append([index for index, _ in trainer.eval_stream.rows(0)])
            assert len(list(trainer.source.stream.rows(0))) == count - 1
        trainer.train()
        assert held_out == [[count - 1]] * 2 and math.isfinite(trainer.evaluate()["eval_loss"])

    def test_what_cannot_be_evaluated_on_is_said_before_training(self, model, processor, tmp_path):
        for dataset in (rows(1), Stream(rows(1))):
            with pytest.raises(ValueError, match="has 1 rows, fewer than 2 for each of 1 processes"):
                trainer_of(model, processor, tmp_path, train_dataset=dataset, validation_share=0.05)
            trainer_of(model, processor, tmp_path, train_dataset=dataset, validation_share=0.0)
        bad = {"image": tiny_image(0), "instruction": "", "sample_id": "bad"}
        for train, evaluation in (([*rows(4), bad], None), (rows(4), [bad])):  # every 5th is held out, or rows given
            with pytest.raises(ValueError, match="none of the rows to evaluate on can be read"):
                SaeTrainer(model, settings(tmp_path, validation_share=0.05), train, evaluation, processor)

    def test_a_stream_needs_steps(self, model, processor, tmp_path):
        with pytest.raises(ValueError, match="max_steps has to be specified"):
            trainer_of(model, processor, tmp_path, train_dataset=Stream(rows(4)), max_steps=-1)
        steps = {"max_steps": -1, "train_tokens": 100}
        trainer = trainer_of(model, processor, tmp_path, train_dataset=Stream(rows(4)), **steps)
        assert trainer.args.max_steps == 2


RESUMES = {name: {"architecture": name} for name in ARCHITECTURES} | {
    "resampled": {"resample_every": 4, "resample_until": 1.0, "dead_after_tokens": 50, "l1_coefficient": 2.0},
    "accumulated": {"gradient_accumulation_steps": 2, "buffer_tokens": 192},
    "block of odd size": {"buffer_tokens": 144},
    "l1 warm-up": {"l1_warmup_ratio": 0.6},
}


MORE_RESUMES = ("gated", "jumprelu", "topk", "block of odd size", "l1 warm-up")  # differ little from the others


class TestResume:
    def run(self, model, processor, folder, stop=None, resume=False, make_data=lambda: rows(8), **overrides):
        overrides = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 2} | overrides
        trainer = trainer_of(model, processor, folder, train_dataset=make_data(), **overrides)
        if stop is not None:
            trainer.add_callback(StopAt(stop))
        torch.manual_seed(1234 if resume else 0)  # the state of the random numbers must not matter
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    def compare(self, model, processor, tmp_path, **kwargs):
        whole = self.run(model, processor, tmp_path / "whole", **kwargs)
        self.run(model, processor, tmp_path / "parts", stop=7, **kwargs)  # two steps after the checkpoint
        resumed = self.run(model, processor, tmp_path / "parts", resume=True, **kwargs)
        expected = whole.model.state_dict()
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected[name]), name
        assert torch.equal(resumed.firing.silent_tokens, whole.firing.silent_tokens)
        logs = [[line for line in t.state.log_history if "loss" in line] for t in (whole, resumed)]
        assert [line["loss"] for line in logs[1]] == [line["loss"] for line in logs[0]]
        for name in ("dead_features", "epoch", "feature_density/never"):
            assert logs[1][-1][name] == logs[0][-1][name]
        return whole, resumed

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE_RESUMES)) for name in RESUMES]
    )
    def test_the_same_weights(self, model, processor, tmp_path, name):
        whole, _ = self.compare(model, processor, tmp_path, **RESUMES[name])
        batches = 5 * whole.args.gradient_accumulation_steps
        assert 48 * batches % whole.buffer.block_tokens != 0  # the checkpoint lies inside a block
        if name == "resampled":
            assert any("resampled_features" in line for line in whole.state.log_history)

    def test_a_stream(self, model, processor, tmp_path):
        self.compare(model, processor, tmp_path, make_data=lambda: Stream([interleaved(), *rows(6)]))

    def test_from_a_cache(self, model, processor, tmp_path):
        cache = {"cache_dir": str(tmp_path / "cache"), "cache_dtype": "float32"}
        whole, _ = self.compare(model, processor, tmp_path, **cache)
        harvested = self.run(model, processor, tmp_path / "harvested", max_steps=3)
        cached = self.run(model, processor, tmp_path / "cached", max_steps=3, **cache)
        assert all(
            torch.equal(value, cached.model.state_dict()[name]) for name, value in harvested.model.state_dict().items()
        )

    def test_one_cache_for_saes_of_several_layers(self, model, processor, tmp_path, monkeypatch):
        cache = {"cache_dir": str(tmp_path / "cache"), "cache_dtype": "float32", "max_steps": 3}
        first = self.run(model, processor, tmp_path / "2", cache_layers=[1, 3], **cache)
        alone = self.run(model, processor, tmp_path / "3 alone", sae_layer=3, max_steps=3)
        monkeypatch.setattr(ActivationHarvester, "of_layers", None)  # no further pass through the VLM
        other = self.run(model, processor, tmp_path / "3", sae_layer=3, **cache)
        assert first.buffer.source.cache.index["layers"] == [1, 2, 3] and other.model.config.layer == 3
        for name, value in alone.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], value)

    def test_another_number_of_processes_is_refused(self, model, processor, tmp_path):
        self.run(model, processor, tmp_path, stop=5)
        state = tmp_path / "checkpoint-5" / "loop_state_0.pt"
        torch.save(torch.load(state, weights_only=True) | {"sae_processes": 4}, state)
        with pytest.raises(ValueError, match="written by 4 processes and this run has 1"):
            self.run(model, processor, tmp_path, resume=True)


TWO_PROCESSES = """
import sys, torch
sys.path[:0] = {paths!r}
from sae import rows, settings
from tiny import tiny_model, tiny_processor
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training.sae.start import fit_thresholds_
from segcompass_hf.training.sae.trainer import SaeTrainer

args = settings({folder!r}, architecture={architecture!r}, **{overrides!r})
assert args.world_size == 2
trainer = SaeTrainer(tiny_model("llava"), args, rows(7), None, tiny_processor("llava"))
trainer.train(resume_from_checkpoint={resume!r})
metrics = trainer.evaluate()
held = dict(steps=trainer.state.global_step, weights=trainer.model.state_dict(), metrics=metrics,
            silent=trainer.firing.silent_tokens, rows=[i for i, _ in trainer.source.stream.rows(0)])
torch.save(held, f"{folder}/rank{{args.process_index}}.pt")
Processes.current().finish()
"""


def _two_processes(folder: Path, architecture: str, resume=None, **overrides) -> list[dict]:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    paths = [str(SUPPORT), str(ROOT / "src")]
    script.write_text(
        TWO_PROCESSES.format(
            paths=paths, folder=str(folder), architecture=architecture, overrides=overrides, resume=resume
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
    def test_own_rows_same_steps_same_weights_and_resume(self, tmp_path, architecture):
        saving = {"save_strategy": "steps", "save_steps": 5}
        if architecture == "standard":
            saving |= {"resample_every": 4, "dead_after_tokens": 60, "l1_coefficient": 2.0}
        first, second = _two_processes(tmp_path / "run", architecture, **saving)
        assert first["steps"] == second["steps"] == 12
        assert len(first["rows"]) == len(second["rows"]) == 2 and not set(first["rows"]) & set(second["rows"])
        assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
        assert torch.equal(first["silent"], second["silent"]) and first["metrics"] == second["metrics"]
        again, _ = _two_processes(
            tmp_path / "run", architecture, resume=str(tmp_path / "run" / "checkpoint-5"), **saving
        )
        assert all(torch.equal(value, first["weights"][name]) for name, value in again["weights"].items())


ANY_NUMBER = """
import os, sys, torch
sys.path[:0] = {paths!r}
from sae import rows, settings
from tiny import tiny_model, tiny_processor
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training.sae.trainer import SaeTrainer

count = int(os.environ["WORLD_SIZE"])
for name, overrides in {runs!r}.items():
    folder = os.path.join({folder!r}, name)
    sizes = dict(per_device_train_batch_size=48 // count, buffer_tokens=96 // count)
    overrides["cache_dir"] = os.path.join(folder, "cache")
    args = settings(os.path.join(folder, f"run-{{count}}"), **sizes, **overrides)
    assert args.world_size == count
    trainer = SaeTrainer(tiny_model("llava"), args, rows(12), None, tiny_processor("llava"))
    if args.resample_every:
        trainer.model.b_enc.data[5:9] = -1e3  # never fire
    trainer.train()
    held = dict(weights=trainer.model.state_dict(), silent=trainer.firing.silent_tokens,
                resampled=[line.get("resampled_features") for line in trainer.state.log_history if "loss" in line])
    torch.save(held, os.path.join(folder, f"{{count}}-rank{{args.process_index}}.pt"))
Processes.current().finish()
"""

ANY_NUMBER_RUNS = {
    "resampled": {"resample_every": 3, "resample_until": 1.0, "dead_after_tokens": 120, "l1_coefficient": 2.0},
    "batchtopk": {"architecture": "batchtopk", "apply_b_dec_to_input": True},
    "topk": {"architecture": "topk", "d_sae": 256, "gradient_accumulation_steps": 2},  # enough features to be sparse
    "gated": {"architecture": "gated", "normalize_activations": "per_modality"},
    "jumprelu": {"architecture": "jumprelu", "k": 4},
}


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_sae_of_one_cache(tmp_path):
    """Of one, two and four; two of them fill the cache."""
    for overrides in ANY_NUMBER_RUNS.values():
        overrides |= {"cache_dtype": "float32", "validation_share": 0.0}
    for name in ANY_NUMBER_RUNS:
        (tmp_path / name).mkdir()
    script = tmp_path / "script.py"
    words = {"paths": [str(SUPPORT), str(ROOT / "src")], "folder": str(tmp_path), "runs": ANY_NUMBER_RUNS}
    script.write_text(ANY_NUMBER.format(**words))
    for count in (2, 1, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ANY_NUMBER_RUNS:
        one = torch.load(tmp_path / name / "1-rank0.pt", weights_only=True)
        if name == "resampled":
            assert sum(one["resampled"]) >= 4
        for count in (2, 4):
            for rank in range(count):
                other = torch.load(tmp_path / name / f"{count}-rank{rank}.pt", weights_only=True)
                for key, value in one["weights"].items():
                    torch.testing.assert_close(other["weights"][key], value, atol=1e-5, rtol=0, msg=f"{name} {key}")
                assert torch.equal(other["silent"], one["silent"]) and other["resampled"] == one["resampled"]


def test_the_example_goes_on_from_the_last_whole_checkpoint(monkeypatch, tmp_path):
    from scripts import module

    example, asked = module("examples/train_sae.py"), []

    class Stop(Exception):
        pass

    class Asked:
        def __init__(self, *args, **kwargs):
            pass

        def train(self, resume_from_checkpoint):
            asked.append(resume_from_checkpoint)
            raise Stop

    monkeypatch.setattr(example, "SaeTrainer", Asked)
    monkeypatch.setattr(sys, "argv", ["train_sae.py", "--output_dir", str(tmp_path), "--use_cpu", "--num_scenes", "2"])
    for _ in range(2):
        with pytest.raises(Stop):
            example.main()
        (tmp_path / "checkpoint-4").mkdir(exist_ok=True)
    assert asked == [True, True]  # the trainer knows whether there is one, and which


@pytest.mark.slow
def test_the_example(tmp_path):
    example = ROOT / "examples" / "train_sae.py"
    words = "--use_cpu --normalize_activations per_token --d_sae 256 --learning_rate 2e-3 --num_scenes 60 "
    words += (
        "--report_to none --per_device_train_batch_size 512 --buffer_tokens 4096 --max_steps 20 --disable_tqdm True"
    )
    folders = ["--output_dir", str(tmp_path / "sae"), "--export_sae_lens", str(tmp_path / "lens")]
    environment = {"PYTHONPATH": str(example.parent.parent / "src"), "HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    command = [sys.executable, str(example), *words.split(), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_ce_recovered" in done.stdout
    assert SegCompassSae.from_pretrained(tmp_path / "sae").config.layer == 2
    assert (tmp_path / "lens" / "cfg.json").is_file()
