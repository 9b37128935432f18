"""The bar of a training: which figures it shows, and that a training that goes on starts its bar there."""

import re

from robust_trainers import RobustTrainer, make_trainer
from transformers import ProgressCallback, TrainerCallback

from segcompass_hf.training.loop.progress import TrainingProgress


class Segmenting(RobustTrainer):
    """Logs what a segmentation logs beside its loss."""

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, "segmentation/giou": 0.25 * self.state.global_step, "other": 1.0}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self.log({"eval_gIoU": 0.125})
        self.control.should_evaluate = False
        return {}


class Watch(TrainerCallback):
    """What the bar of a trainer stood at after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        (shown,) = (one for one in self.trainer.callback_handler.callbacks if isinstance(one, ProgressCallback))
        bar = shown.training_bar
        self.seen.append((bar.initial, bar.n, bar.total))


def bars(trainer):
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]


def test_the_newest_figures_stand_on_the_bar(tmp_path, capsys):
    """Of rows 1, 2, 3, 4, whose loss they are: nothing is learned."""
    settings = {"disable_tqdm": False, "learning_rate": 0.0}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "evaluated": [{"x": 1.0}]}
    make_trainer(tmp_path, [1, 2, 3, 4], trainer_class=Segmenting, **settings, **evaluation).train()
    captured = capsys.readouterr()
    shown = re.findall(r"\d/4 \[[^]]*\]", captured.err)
    assert shown[0].startswith("0/4 [00:00<?")
    figures = [re.search(r"loss.*(?=\])", line)[0] for line in shown if "loss" in line]
    assert figures[0] == "loss 1, gIoU 0.25"
    assert "loss 2, gIoU 0.5, eval gIoU 0.125" in figures and "loss 3, gIoU 0.75, eval gIoU 0.125" in figures
    assert figures[-1] == "loss 4, gIoU 1, eval gIoU 0.125" and shown[-1].startswith("4/4 [")
    assert captured.out.count("'loss'") == 4, "the whole lines are still written"


def test_without_gIoU_the_loss_alone(tmp_path, capsys):
    make_trainer(tmp_path, [1, 2], disable_tqdm=False, learning_rate=0.0).train()
    assert re.search(r"2/2 \[[^]]*, loss 2\]", capsys.readouterr().err)


def test_a_training_that_goes_on_starts_its_bar_there(tmp_path):
    """Else the steps of the last start would count as done in a moment, and the time left would be far too short."""
    rows, saving = [1, 2, 3, 4], {"save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
    make_trainer(tmp_path, rows, **saving, max_steps=2).train()
    watch = Watch()
    watch.trainer = make_trainer(tmp_path, rows, callbacks=[watch], **saving)
    watch.trainer.train(resume_from_checkpoint=True)
    assert watch.seen == [(2, 2, 4), (2, 3, 4)], "it stands before the bar, which is moved after it"


def test_bars_of_others_stay(tmp_path):
    class Own(ProgressCallback):
        pass

    own = Own()
    assert bars(make_trainer(tmp_path, [1], disable_tqdm=True)) == []
    assert bars(make_trainer(tmp_path, [1], disable_tqdm=True, callbacks=[own])) == [own]
    (ours,) = bars(make_trainer(tmp_path, [1], disable_tqdm=False))
    assert type(ours) is TrainingProgress
