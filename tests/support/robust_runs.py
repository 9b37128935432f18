"""Training runs that are killed and resumed, each in a process of its own: `python robust_runs.py FOLDER`.

Imports happen once; every run is a fork of this process, which SIGKILL ends at the place asked for. What a run logged
and its final weights go to `FOLDER/<scenario>-<name>.pt`, how the runs ended to `FOLDER/reports.json`.
"""

import io
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, trainer_utils

from segcompass_hf.training.loop import checkpoints as robust_checkpoints
from segcompass_hf.training.loop.resume import RobustTrainerMixin, RobustTrainingArguments


@dataclass
class Arguments(RobustTrainingArguments, TrainingArguments):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)

    def forward(self, x, y):
        return {"loss": (self.last(self.dropout(self.first(x).tanh())) - y).pow(2).mean()}


class Points(torch.utils.data.Dataset):
    """20 rows; with batches of 2 and 2 of them per step an epoch has 5 steps."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(4, generator=generator), "y": torch.randn(1, generator=generator)}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(step):
    """`torch.save` that dies in the middle of the optimizer's file at a step."""
    save = torch.save

    def dying_save(content, place, **kwargs):
        if str(place).endswith(f"checkpoint-{step}/optimizer.pt"):
            whole = io.BytesIO()
            save(content, whole)
            Path(place).write_bytes(whole.getvalue()[: whole.tell() // 2])
            die()
        save(content, place, **kwargs)

    torch.save = dying_save


def before_rename(step):
    publish = robust_checkpoints.publish

    def dying_publish(aside, final):
        die() if final.name == f"checkpoint-{step}" else publish(aside, final)

    robust_checkpoints.publish = dying_publish


def between_renames(step):
    """Dies when the old checkpoint of the step is out of the way and the new one not yet in place."""
    rename = Path.rename

    def dying_rename(self, target):
        rename(self, target)
        if Path(target).name == f"replaced-checkpoint-{step}":
            die()

    Path.rename = dying_rename


def in_rotation(step):
    """Dies with one file of an old checkpoint deleted."""
    rmtree = shutil.rmtree

    def dying_rmtree(path, **kwargs):
        if Path(path).name == f"checkpoint-{step}" and Path(path).is_dir():
            next(Path(path).glob("*.pt")).unlink()
            die()
        rmtree(path, **kwargs)

    shutil.rmtree = dying_rmtree


def in_step(step):
    KillableMixin.kill_in_step = step


DEATHS = {
    "in_step": in_step,
    "half_written": half_written,
    "before_rename": before_rename,
    "between_renames": between_renames,
    "in_rotation": in_rotation,
}


class KillableMixin:
    kill_in_step = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step + 1 == self.kill_in_step and self.accelerator.sync_gradients:
            die()  # the gradients are there, the optimizer has not moved
        return loss


class PlainTrainer(KillableMixin, RobustTrainerMixin, Trainer):
    pass


def plain_trainer(folder):
    torch.manual_seed(0)
    args = Arguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=0.05,
        logging_steps=3,
        save_steps=2,
        save_total_limit=3,
        report_to=[],
        disable_tqdm=True,
    )
    return PlainTrainer(model=Net(), args=args, train_dataset=Points())


def run(make_trainer, folder, name, resume=None, death=None):
    """Train in a fork; returns its exit status, -9 where it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if death is not None:
                DEATHS[death[0]](death[1])
            trainer = make_trainer(folder)
            trainer.train(resume_from_checkpoint=resume)
            curve = [
                {key: value for key, value in line.items() if key not in ("step_time", "unreadable_rows")}
                for line in trainer.state.log_history
                if "loss" in line
            ]
            started = trainer._initial_global_step
            result = {"curve": curve, "weights": trainer.model.state_dict(), "started": started}
            torch.save(result, f"{folder}-{name}.pt")
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(make_trainer, folder, death, first_complete=False):
    """Kill a run, look at what is on the disk, resume it."""
    report = {}
    if first_complete:  # then a second run from its middle overwrites its checkpoints
        report["first"] = run(make_trainer, folder, "first")
        kept = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        report["killed"] = run(make_trainer, folder, "killed", resume=str(kept[0]), death=death)
    else:
        report["killed"] = run(make_trainer, folder, "killed", death=death)
    report["left"] = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    checkpoints = [name for name in report["left"] if name.startswith("checkpoint")]
    report["broken"] = [name for name in checkpoints if robust_checkpoints.what_is_missing(folder / name)]
    report["last"] = Path(trainer_utils.get_last_checkpoint(folder)).name
    report["resumed"] = run(make_trainer, folder, "resumed", resume=True)
    report["afterwards"] = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    return report


DEATHS_OF_PLAIN = {
    "in_step": ("in_step", 9),
    "in_step_after_epoch": ("in_step", 6),  # an epoch has 5 steps, the last checkpoint is of step 4
    "half_written": ("half_written", 8),
    "before_rename": ("before_rename", 12),
    "in_rotation": ("in_rotation", 4),
    "between_renames": ("between_renames", 14),
}


def main(folder, make_trainer, deaths):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    reports = {"whole": run(make_trainer, folder / "whole", "run")}
    for name, death in deaths.items():
        reports[name] = killed_and_resumed(make_trainer, folder / name, death, name == "between_renames")
    (folder / "reports.json").write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], plain_trainer, DEATHS_OF_PLAIN)
