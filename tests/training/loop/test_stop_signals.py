"""A signal while training: the step is finished and saved, the run goes on from there to the same end."""

import os
import signal
import time

import pytest
import torch
from robust_trainers import RobustTrainer, make_trainer
from transformers import TrainerCallback

from segcompass_hf.stopping import SIGNALS, Stopped, handled, raise_stopped
from segcompass_hf.training.loop import stop_signals

pytestmark = pytest.mark.usefixtures("usual_signals")
ROWS = [1.0, 3.0, 2.0, 5.0, 4.0]


class Signalled(RobustTrainer):
    """Sends itself a signal in a step, before its gradients are there."""

    moments = {}  # step -> signals

    def training_step(self, *args, **kwargs):
        for number in self.moments.get(self.state.global_step + 1, ()):
            os.kill(os.getpid(), number)
        return super().training_step(*args, **kwargs)


def trainer(folder, moments=None, **settings):
    made = make_trainer(folder, ROWS, trainer_class=Signalled, **{"logging_steps": 2} | settings)
    made.moments = moments or {}
    return made


def curve(run):
    return [line for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_the_step_is_saved_and_the_run_goes_on_to_the_same_end(tmp_path, caplog, number, strategy):
    handlers = [signal.getsignal(one) for one in SIGNALS]
    settings = {"save_strategy": strategy, "save_steps": 2}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = trainer(tmp_path / "run", {3: [number]}, **settings)
    with pytest.raises(Stopped) as ended:
        stopped.train(resume_from_checkpoint=True)
    assert ended.value.code == 128 + number and stopped.state.global_step == 3
    assert f"{number.name}: training stops behind step 3, of which a checkpoint is saved in" in caplog.text
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == (["checkpoint-2", "checkpoint-3"] if strategy == "steps" else ["checkpoint-3"])
    assert [signal.getsignal(one) for one in SIGNALS] == handlers
    resumed = trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from.endswith("checkpoint-3") and curve(resumed) == curve(whole)
    assert torch.equal(resumed.model.w, whole.model.w)


def test_in_the_last_step_and_behind_it(tmp_path):
    with pytest.raises(Stopped):
        trainer(tmp_path, {5: [signal.SIGTERM]}).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5 and [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]

    class Behind(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    late = make_trainer(tmp_path / "late", ROWS, callbacks=[Behind()])
    with pytest.raises(Stopped):
        late.train()
    assert late.state.global_step == 5, "nobody's wish to stop is lost"


def test_a_second_signal_ends_at_once_and_the_same_one_sent_twice_does_not(tmp_path, monkeypatch):
    twice = [signal.SIGINT, signal.SIGINT]  # by the terminal and by the launcher
    with pytest.raises(Stopped):
        trainer(tmp_path / "twice", {3: twice}).train()
    assert [path.name for path in (tmp_path / "twice").iterdir()] == ["checkpoint-3"]
    monkeypatch.setattr(stop_signals, "_ONE_PRESS", 0.0)
    run = trainer(tmp_path / "again", {3: twice})
    with pytest.raises(Stopped):
        run.train()
    assert run.state.global_step == 2 and list((tmp_path / "again").iterdir()) == []


def test_before_the_first_step_the_program_ends_at_once(tmp_path):
    class Slow(RobustTrainer):
        def get_train_dataloader(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            raise AssertionError("was not stopped")

    with pytest.raises(Stopped), handled(raise_stopped):
        make_trainer(tmp_path, ROWS, trainer_class=Slow).train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_that_load_rows_live_on(tmp_path, number):
    """A terminal sends Ctrl-C to them too, torchrun SIGTERM; and the step needs them."""

    class Rows(list):
        parent, sent = os.getpid(), False

        def __getitem__(self, index):
            if os.getpid() != self.parent and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    run = trainer(tmp_path, {2: [number]}, dataloader_num_workers=1)
    run.train_dataset = Rows({"x": torch.tensor([row])} for row in ROWS)
    with pytest.raises(Stopped):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
