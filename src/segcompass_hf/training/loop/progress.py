# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The bar of a training: steps done, time left, and the newest loss and gIoU."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer

# Of a log line, of training or of evaluation -> what the bar calls it.
SHOWN = {"loss": "loss", "segmentation/giou": "gIoU", "eval_gIoU": "eval gIoU"}


class TrainingProgress(ProgressCallback):
    """[`~transformers.ProgressCallback`] whose bar also shows the newest figures of `SHOWN`, where they are known.

    A training that goes on from a checkpoint starts its bar there: the time left is that of the steps of this start.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.figures: dict[str, float] = {}
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None:
            self.figures |= {shown: logs[name] for name, shown in SHOWN.items() if name in logs}
            self.training_bar.set_postfix_str(", ".join(f"{name} {self.figures[name]:.3g}" for name in self.figures))


def show_figures(trainer: Trainer) -> None:
    """Put [`TrainingProgress`] in the place of the plain bar of a trainer; a notebook's table and what users pass stay
    as they are, and where bars are switched off there is none."""
    plain = next((one for one in trainer.callback_handler.callbacks if type(one) is ProgressCallback), None)
    if plain is not None:
        trainer.remove_callback(plain)
        trainer.add_callback(TrainingProgress())


__all__ = ["SHOWN", "TrainingProgress", "show_figures"]
