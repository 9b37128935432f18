"""The smallest trainer with `RobustTrainerMixin`: one weight, whose gradient is the row."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from segcompass_hf.training.loop.resume import RobustTrainerMixin, RobustTrainingArguments


@dataclass
class Arguments(RobustTrainingArguments, TrainingArguments):
    pass


class RobustTrainer(RobustTrainerMixin, Trainer):
    pass


class Line(nn.Module):
    """loss = w * x, so that the gradient of w is x."""

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start]))

    def forward(self, x, gradient_factor=None):
        loss = (self.w * x).mean()
        if gradient_factor is not None and loss.requires_grad:
            factor = gradient_factor.mean()
            loss.register_hook(lambda gradient: gradient * factor)
        return {"loss": loss}


def make_trainer(folder, rows, model=None, trainer_class=RobustTrainer, callbacks=(), evaluated=None, **settings):
    args = Arguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "max_grad_norm": 0.0,
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        },
    )
    rows = [{"x": torch.tensor([float(row)])} if not isinstance(row, dict) else row for row in rows]
    return trainer_class(
        model=Line() if model is None else model,
        args=args,
        train_dataset=rows,
        eval_dataset=evaluated,
        callbacks=list(callbacks),
    )


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]
