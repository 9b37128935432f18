"""Settings, and training that goes on after numbers that are not finite."""

import math
from dataclasses import dataclass

import pytest
import torch
from robust_trainers import Arguments, RobustTrainer, logged, make_trainer
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

from segcompass_hf.training.loop.checkpoints import what_is_missing
from segcompass_hf.training.loop.resume import RobustTrainingArguments, sampler_of_rows, skip_permutations
from segcompass_hf.training.loop.steps import has_nonfinite_norm, nonfinite_names

NAN, INF = float("nan"), float("inf")


# Settings.


def test_settings_mix_with_trl_and_parse():
    from trl import GRPOConfig, TrlParser

    @dataclass
    class Joint(RobustTrainingArguments, GRPOConfig):
        pass

    (args,) = TrlParser(Joint).parse_args_and_config(
        "--output_dir x --use_cpu True --unreadable_rows error --max_nonfinite_steps 3".split()
    )
    assert (args.unreadable_rows, args.max_nonfinite_steps, args.num_generations) == ("error", 3, 8)
    (plain,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(["--output_dir", "x"])
    assert (plain.unreadable_rows, plain.max_nonfinite_steps) == ("skip", 10)
    with pytest.raises(SystemExit):
        HfArgumentParser(Arguments).parse_args_into_dataclasses(["--output_dir", "x", "--unreadable_rows", "drop"])


@pytest.mark.parametrize("setting", [{"unreadable_rows": "drop"}, {"max_nonfinite_steps": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Arguments("x", **setting)


# Numbers that are not finite.


def test_nonfinite_names_and_norm():
    tensors = [
        ("a", torch.ones(3)),
        ("b", torch.tensor([1.0, NAN])),
        ("c", torch.tensor([-INF])),
        ("d", torch.ones(0)),
    ]
    assert nonfinite_names(tensors) == ["b", "c"]
    assert has_nonfinite_norm([tensor for _, tensor in tensors])
    assert not has_nonfinite_norm([torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(0)])
    assert has_nonfinite_norm([torch.full((4,), 3e38)])  # finite values, norm 6e38


@pytest.mark.parametrize("max_grad_norm", [0.0, 100.0])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_loss_leaves_weights_momentum_and_schedule(tmp_path, caplog, bad, max_grad_norm):
    trainer = make_trainer(
        tmp_path,
        [1, bad, 2],
        max_grad_norm=max_grad_norm,
        optim_args="momentum=0.5",
        weight_decay=0.0,
        lr_scheduler_type="linear",
        max_steps=3,
    )
    trainer.create_optimizer()
    trainer.optimizer.param_groups[0]["momentum"] = 0.5
    trainer.train()
    # Rates 0.1, then 0.1 * 2/3: the schedule waited. Momentum buffers 1, then 0.5 * 1 + 2 = 2.5.
    assert trainer.model.w.item() == pytest.approx(1 - 0.1 * 1 - 0.1 * 2 / 3 * 2.5, abs=1e-6)
    assert trainer.optimizer.state_dict()["state"][0]["momentum_buffer"].item() == pytest.approx(2.5)
    assert trainer.lr_scheduler.last_epoch == 2
    assert logged(trainer, "nonfinite_steps") == [0, 1, 1]
    assert trainer.state.global_step == 3
    (warning,) = [record.message for record in caplog.records if "is skipped" in record.message]
    assert "step 2 is skipped" in warning and f"the loss is {bad}" in warning and "1 of at most 10" in warning


@pytest.mark.parametrize("max_grad_norm", [0.0, 100.0])
def test_a_bad_gradient_of_a_finite_loss_is_named(tmp_path, caplog, max_grad_norm):
    rows = [
        {"x": torch.tensor([x]), "gradient_factor": torch.tensor([f])} for x, f in ((1.0, 1.0), (3.0, INF), (2.0, 1.0))
    ]
    trainer = make_trainer(tmp_path, rows, max_grad_norm=max_grad_norm, optim="adamw_torch", weight_decay=0.5)
    trainer.train()
    # AdamW, first two steps with gradients 1 and 2: each shrinks w by lr * decay and moves it by lr * m / sqrt(v).
    w = (1 - 0.1 * 0.5 * 1) - 0.1
    m, v = 0.9 * 0.1 + 0.1 * 2, 0.999 * 0.001 + 0.001 * 4
    w = w * (1 - 0.05) - 0.1 * (m / (1 - 0.81)) / math.sqrt(v / (1 - 0.999**2))
    assert trainer.model.w.item() == pytest.approx(w, abs=1e-5)
    assert trainer.optimizer.state_dict()["state"][0]["step"].item() == 2
    assert trainer.nonfinite_steps == 1
    (warning,) = [record.message for record in caplog.records if "is skipped" in record.message]
    assert "non-finite gradients: w" in warning and "loss" not in warning


class Difference(nn.Module):
    """loss = w_0 x - w_1 x: 0, with gradients x and -x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return {"loss": (self.w[0] * x - self.w[1] * x).sum()}


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9])
def test_an_overflowing_norm_of_finite_gradients_is_skipped(tmp_path, caplog, max_grad_norm):
    trainer = make_trainer(tmp_path, [1, 3e38, 2], Difference(), max_grad_norm=max_grad_norm)  # a norm of 4.2e38
    trainer.train()
    torch.testing.assert_close(trainer.model.w.data, torch.tensor([1 - 0.3, 1 + 0.3]))
    assert trainer.nonfinite_steps == 1
    assert "the norm of the gradients overflows" in caplog.text


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_micro_batch_spoils_its_window_only(tmp_path, place):
    rows = [3.0, 4.0, 5.0, 6.0, 6.0, 6.0]
    rows[place] = NAN
    trainer = make_trainer(tmp_path, rows, gradient_accumulation_steps=3)
    trainer.train()
    assert trainer.model.w.item() == pytest.approx(1 - 0.1 * 6, abs=1e-6)
    assert (trainer.nonfinite_steps, trainer.nonfinite_in_row) == (1, 0)


def test_under_bf16_autocast(tmp_path):
    model = nn.Module()
    model.layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.layer.weight, 1.0)
    model.forward = lambda x: {"loss": model.layer(x).sum()}
    rows = [{"x": torch.tensor([x])} for x in (1.0, INF, 2.0)]
    trainer = make_trainer(tmp_path, rows, model, bf16=True)
    trainer.remove_unused_columns = False
    trainer.train()
    assert trainer.model.layer.weight.item() == pytest.approx(1 - 0.1 * 1 - 0.1 * 2, abs=1e-6)
    assert trainer.nonfinite_steps == 1


def test_some_in_a_row_stop_and_the_checkpoint_stays(tmp_path):
    trainer = make_trainer(
        tmp_path, [1, NAN, 2, NAN, NAN, NAN, 5], max_nonfinite_steps=3, save_strategy="steps", save_steps=3
    )
    with pytest.raises(RuntimeError, match=r"3 steps in a row, up to step 6.*loss is nan.*learning_rate"):
        trainer.train()
    assert trainer.nonfinite_steps == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert what_is_missing(tmp_path / "checkpoint-3") is None
    assert trainer.model.w.item() == pytest.approx(1 - 0.1 - 0.2, abs=1e-6)


def test_counters_survive_a_resume(tmp_path):
    rows, settings = [NAN, 1, NAN, NAN, NAN, 1], {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, rows, max_steps=4, **settings).train()
    trainer = make_trainer(tmp_path, rows, max_nonfinite_steps=3, **settings)
    with pytest.raises(RuntimeError, match="3 steps in a row, up to step 5"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.nonfinite_steps == 4
    fresh = make_trainer(tmp_path, rows)
    fresh.train()
    fresh.train()  # a run anew counts anew
    assert fresh.nonfinite_steps == 4


def test_broken_weights_stop_at_once_and_are_not_saved(tmp_path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 4:
                model.w.data.fill_(NAN)

    settings = {"callbacks": [Break()], "save_strategy": "steps"}
    with pytest.raises(RuntimeError, match=r"1 trained weights are not finite at the save of step 4, such as w"):
        make_trainer(tmp_path / "a", [1] * 6, save_steps=2, **settings).train()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-2"]
    with pytest.raises(RuntimeError, match=r"1 trained weights are not finite after step 4"):
        make_trainer(tmp_path / "b", [1] * 6, save_steps=3, **settings).train()


class ScaledTrainer(RobustTrainer):
    """The fp16 scaler of a GPU, on the CPU: accelerate makes one only there."""

    start = 1024.0

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        scaler = self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.start)
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(self.optimizer.optimizer)


def test_fp16_overflow_lowers_the_scale_and_does_not_count_in_a_row(tmp_path):
    rows = [{"x": torch.tensor([1.0]), "gradient_factor": torch.tensor([f])} for f in (1.0, INF, NAN, 1.0)]
    trainer = make_trainer(tmp_path, rows, trainer_class=ScaledTrainer, max_nonfinite_steps=1)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024 / 4  # halved by each of the two
    assert (trainer.nonfinite_steps, trainer.nonfinite_in_row) == (2, 0)
    assert trainer.model.w.item() == pytest.approx(1 - 0.2, abs=1e-6)
    assert trainer.lr_scheduler.last_epoch == 2


def test_fp16_bad_loss_counts_and_keeps_the_scale(tmp_path):
    class DetachedNan(ScaledTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + NAN if self.state.global_step == 1 else loss  # the gradient stays finite

    trainer = make_trainer(tmp_path, [1, 1, 1], trainer_class=DetachedNan, max_nonfinite_steps=2)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024
    assert trainer.nonfinite_steps == 1
    assert trainer.model.w.item() == pytest.approx(1 - 0.2, abs=1e-6)


def test_fp16_at_its_lowest_scale_counts(tmp_path):
    class Lowest(ScaledTrainer):
        start = 1.0

    rows = [{"x": torch.tensor([1.0]), "gradient_factor": torch.tensor([INF])}] * 3
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        make_trainer(tmp_path, rows, trainer_class=Lowest, max_nonfinite_steps=2).train()


def test_deepspeed_steps_by_itself(tmp_path):
    """A step that it skipped is counted; one that it took, inside backward, ends the run."""

    class Engine:
        step_was_skipped = True

        def get_global_grad_norm(self):
            return INF

    trainer = make_trainer(tmp_path, [1])
    trainer.is_deepspeed_enabled, trainer.optimizer = True, Engine()
    trainer.accelerator.deepspeed_engine_wrapped = trainer.optimizer
    trainer.judge_step(trainer.model)
    assert (trainer.nonfinite_steps, trainer.nonfinite_in_row) == (1, 0)
    Engine.step_was_skipped = False
    with pytest.raises(RuntimeError, match="step 1 was not finite and DeepSpeed has applied it.*check_grad_overflow"):
        trainer.judge_step(trainer.model)


def test_a_new_sampler_goes_on_with_the_permutation_of_its_epoch():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, DataLoader
    from trl.trainer.utils import RepeatSampler

    def sampler():
        return RepeatSampler(range(5), mini_repeat_count=2, batch_size=2, repeat_count=2, seed=3)

    plain = sampler()
    epochs = [list(plain) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in (2, 0, 1):
        new = sampler()
        skip_permutations(new, epoch)
        assert [list(new) for _ in range(3 - epoch)] == epochs[epoch:]
        batches = BatchSamplerShard(BatchSampler(new, 2, False), 2, 0)  # as on the first of two processes
        assert sampler_of_rows(DataLoader(range(5), batch_sampler=batches)) is new
    skip_permutations(None, 3)


def test_completions_of_another_cycle_are_not_used(tmp_path, caplog):
    class Cycle(RobustTrainer):
        """The parts of GRPOTrainer that are stored."""

        _step, num_iterations, _buffered_inputs = 5, 2, [{"advantages": torch.ones(2)}, {"advantages": torch.zeros(2)}]
        _tr_loss, _globalstep_last_logged, _total_loss_scalar = torch.tensor(0.5), 3, 0.0

    def cycle(steps_per_generation=2):
        trainer = make_trainer(tmp_path, [1], trainer_class=Cycle)
        sizes = {"steps_per_generation": steps_per_generation, "num_iterations": 2, "num_generations": 2}
        for name, size in sizes.items():
            setattr(trainer.args, name, size)
        trainer._metrics = {"train": {"reward": [0.25]}}
        return trainer

    state = cycle().loop_state()  # 5 is no multiple of 2 * 2
    assert state["grpo_buffer"][0]["advantages"].tolist() == [1, 1] and state["grpo_metrics"] == {"reward": [0.25]}
    same, other = cycle(), cycle(steps_per_generation=4)
    for trainer in (same, other):
        trainer._step, trainer._buffered_inputs, trainer._metrics = 0, None, {"train": {}}
        trainer.load_loop_state(state)
        assert trainer._metrics["train"] == {"reward": [0.25]}
        assert (trainer._tr_loss.item(), trainer._globalstep_last_logged, trainer._total_loss_scalar) == (0.5, 3, -0.5)
    assert same._step == 5 and same._buffered_inputs[1]["advantages"].tolist() == [0, 0]
    assert other._step == 0 and other._buffered_inputs is None
    assert "sampling starts anew" in caplog.text
    at_its_end = cycle()
    at_its_end._step = 8
    assert "grpo_buffer" not in at_its_end.loop_state()


def test_length_grouping_still_finds_its_column(tmp_path):
    from datasets import Dataset
    from PIL import Image

    rows = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 3, "length": [3, 1, 2]})
    trainer = make_trainer(tmp_path, [], train_sampling_strategy="group_by_length", remove_unused_columns=False)
    trainer.train_dataset = rows
    assert sorted(trainer.get_train_dataloader().batch_sampler.sampler) == [0, 1, 2]


def test_private_methods_of_the_trainer_that_are_overridden():
    """Each may change with any version of transformers or TRL: these, and no others."""
    from transformers import Trainer
    from trl import GRPOTrainer

    from segcompass_hf.training import SaeTrainer, SegCompassGRPOTrainer, SegmentationTrainer, WarmupTrainer

    trainers = (WarmupTrainer, SaeTrainer, SegmentationTrainer, SegCompassGRPOTrainer)
    classes = {c for trainer in trainers for c in trainer.__mro__ if c.__module__.startswith("segcompass_hf")}
    methods = {name for c in classes for name, value in vars(c).items() if callable(value)}
    own = {name for name in methods if name[:1] == "_" != name[1:2]}
    assert own & set(dir(Trainer)) == {
        "_get_output_dir",
        "_get_train_sampler",
        "_load_best_model",
        "_prepare_inputs",  # of TRL's trainer, whose name it is too
        "_push_from_checkpoint",
        "_save_checkpoint",
    }
    of_trl = {
        "_calculate_rewards",
        "_generate",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "_get_per_token_logps_and_entropies",
        "_tokenize_prompts",
    }
    assert own & set(dir(GRPOTrainer)) - set(dir(Trainer)) == of_trl
