"""Training that survives a bad number, a kill and a broken image: what every trainer of this package starts from."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ...data.readable_rows import ReadableRows, RowCheck, count_unreadable, is_image_dataset, readable_stream
from ..vision import kept_vision
from .batch_norms import keep_stored_statistics
from .checkpoints import WholeCheckpointsMixin
from .progress import show_figures
from .steps import JudgeStepsCallback, NonFiniteStepsMixin

logger = logging.get_logger(__name__)

UNREADABLE_ROWS = "unreadable_rows.jsonl"  # in the output folder
_PUBLISH = (
    "would upload all that lies in the output folder: logs, names of rows, and training_args.bin, a pickle that holds "
    "hub_token and local folders. Publish what was trained with `segcompass push OUTPUT_DIR OWNER/NAME`, which takes "
    "the checkpoint alone and checks it."
)


@dataclass
class RobustTrainingArguments:
    """Settings of [`RobustTrainerMixin`], to be mixed into any `TrainingArguments`.

    Args:
        max_nonfinite_steps (`int`, *optional*, defaults to 10):
            Skipped steps in a row, with a loss or gradient that is not finite, before training stops with an error.
        unreadable_rows (`str`, *optional*, defaults to `"skip"`):
            `"skip"` puts the next readable row in the place of one whose image, masks or texts cannot be used,
            `"error"` stops at it.
        embedding_cache_dir (`str`, *optional*):
            A folder for what frozen image encoders make of images, which then run once per image, not once per image
            and epoch: the VLM's (see [`VisionCache`]) and, where masks are trained, SAM's (see [`EmbeddingCache`]).
    """

    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "Steps in a row with a non-finite loss or gradient before training stops."}
    )
    unreadable_rows: Literal["skip", "error"] = field(
        default="skip",
        metadata={"help": "Skip rows whose image, masks or texts cannot be used, or stop at the first."},
    )
    embedding_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for what frozen image encoders make of images."}
    )

    def __post_init__(self) -> None:
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps is {self.max_nonfinite_steps}; it must be 1 or more.")
        if self.unreadable_rows not in ("skip", "error"):
            raise ValueError(f"unreadable_rows is {self.unreadable_rows!r}; it must be 'skip' or 'error'.")
        if getattr(self, "push_to_hub", False):
            raise ValueError(f"push_to_hub=True {_PUBLISH}")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()


def skip_permutations(sampler: Any, epochs: int) -> None:
    """Let a new sampler with its own generator, such as TRL's `RepeatSampler`, draw what it drew in the epochs before.

    Resumed in the second epoch it then draws what it drew there in the run that was interrupted. Samplers with
    `set_epoch` are set by Trainer.

    Args:
        sampler (`torch.utils.data.Sampler`, *optional*): One without a `generator` is left as it is; from a generator
            `__iter__` draws once, at its start.
        epochs (`int`): Finished epochs.
    """
    if isinstance(getattr(sampler, "generator", None), torch.Generator) and not hasattr(sampler, "set_epoch"):
        for _ in range(epochs):
            next(iter(sampler), None)


class ContinueCallback(TrainerCallback):
    """Puts a [`RobustTrainerMixin`] where its checkpoint was, before the first step."""

    def __init__(self, trainer: RobustTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        checkpoint = self.trainer.resumed_from
        if checkpoint is None:
            return
        if isinstance(train_dataloader, torch.utils.data.DataLoader):
            skip_permutations(sampler_of_rows(train_dataloader), int(state.epoch or 0))
        file = self.trainer.loop_state_file(checkpoint)
        if not os.path.isfile(file):
            logger.warning(
                f"{checkpoint} holds no {os.path.basename(file)}: it was saved by another trainer or by fewer "
                "processes, so the first log line and a GRPO cycle it interrupts may differ."
            )
            return
        self.trainer.load_loop_state(torch.load(file, map_location="cpu", weights_only=True))


def sampler_of_rows(dataloader: torch.utils.data.DataLoader) -> Any:
    """The sampler of rows under what accelerate wraps around it for several processes."""
    sampler = dataloader.batch_sampler
    while (inner := getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    return sampler


class RobustTrainerMixin(NonFiniteStepsMixin, WholeCheckpointsMixin):
    """The leftmost base of a trainer: `class MyTrainer(RobustTrainerMixin, Trainer)`, or `GRPOTrainer` in its place.

    - A step with a non-finite loss or gradient is skipped by all processes, counted (`nonfinite_steps` in the logs)
      and named in a warning; `max_nonfinite_steps` in a row stop the training.
    - A checkpoint appears under its name only when it is whole. `resume_from_checkpoint=True` takes the last whole
      one; one that does not fit the model by name and shape is refused.
    - Resuming continues the loss curve exactly: beside what Trainer restores, the running means of the log line, the
      counters, and for TRL's GRPO the place in the cycle of generation with the completions still in use.
    - Rows of a `datasets` data set whose image or masks cannot be read are skipped or fatal (`unreadable_rows`), and
      listed in `unreadable_rows.jsonl` in the output folder; so are rows that `check_text` refuses.
    - Batch norms normalise by their stored statistics, which stay as they are.
    - The progress bar shows the newest loss, and gIoU where it is known.

    A subclass whose VLM reads images says so (`reads_images`), one with further state of its own extends `loop_state`
    and `load_loop_state`, one that reads the rows' texts sets `check_text`.
    """

    check_text: RowCheck | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._reset_nonfinite()
        super().__init__(*args, **kwargs)
        keep_stored_statistics(self.model)
        self.train_dataset = self._readable_streams(self.train_dataset, "train")
        self.eval_dataset = self._readable_streams(self.eval_dataset, "eval")
        show_figures(self)
        self.add_callback(JudgeStepsCallback(self))
        self.add_callback(ContinueCallback(self))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refused: see the message."""
        raise ValueError(f"push_to_hub of a trainer {_PUBLISH}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._reset_nonfinite()
        reads = self.reads_images()
        with nullcontext() if reads is None else kept_vision(self, *reads):
            return super().train(*args, **kwargs)

    def reads_images(self) -> tuple[nn.Module, Any] | None:
        """The VLM that this trainer's rows go through, and its processor; `None` for trainers without one."""
        return None

    def _robust_setting(self, name: str) -> Any:
        return getattr(self.args, name, getattr(RobustTrainingArguments, name))

    def _unreadable_file(self) -> Path:
        return Path(self.args.output_dir) / UNREADABLE_ROWS

    def _readable_streams(self, dataset: Any, name: str) -> Any:
        """Streams are wrapped before anything repeats their rows; `_readable_rows` wraps the rest for its loader."""
        import datasets

        if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict):
            return {key: self._readable_streams(value, f"{name}_{key}") for key, value in dataset.items()}
        if not isinstance(dataset, datasets.IterableDataset) or not is_image_dataset(dataset):
            return dataset
        return readable_stream(dataset, *self._of_unreadable_rows(name))

    def _readable_rows(self, dataset: Any, name: str) -> Any:
        import datasets

        if isinstance(dataset, dict):
            return {key: self._readable_rows(value, name) for key, value in dataset.items()}
        if not isinstance(dataset, datasets.Dataset) or not is_image_dataset(dataset):
            return dataset
        return ReadableRows(dataset, *self._of_unreadable_rows(name))

    def _of_unreadable_rows(self, name: str) -> tuple:
        return self._robust_setting("unreadable_rows"), self._unreadable_file(), name, self.check_text

    def get_train_dataloader(self) -> Any:
        self.train_dataset = self._readable_rows(self.train_dataset, "training")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.eval_dataset = self._readable_rows(self.eval_dataset, "evaluation")
        return super().get_eval_dataloader(self._readable_rows(eval_dataset, "evaluation"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._readable_rows(test_dataset, "test"))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Samplers ask for length or columns, which the data set below answers for them.
        dataset = self.train_dataset if dataset is None else dataset
        return super()._get_train_sampler(dataset.dataset if isinstance(dataset, ReadableRows) else dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["nonfinite_steps"] = self.nonfinite_steps
            unreadable = count_unreadable(self._unreadable_file())
            if unreadable:
                logs["unreadable_rows"] = unreadable
        super().log(logs, *args, **kwargs)

    def loop_state(self) -> dict[str, Any]:
        """What the training loop of this process holds besides weights, optimizer and random states.

        Returns:
            `dict`: of numbers, strings, tensors and lists, tuples and dicts of them, which `torch.load` reads safely.
        """
        state = {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_row": self.nonfinite_in_row,
            "summed_loss": self._tr_loss.detach().cpu(),  # since the last log line
            "last_logged_step": self._globalstep_last_logged,
        }
        if hasattr(self, "_buffered_inputs"):  # GRPO
            state["grpo_cycle"], state["grpo_step"] = self._generation_cycle(), self._step
            state["grpo_metrics"] = {name: list(values) for name, values in self._metrics["train"].items()}
            if self._step % (self.args.steps_per_generation * self.num_iterations):
                state["grpo_buffer"] = self._buffered_inputs  # inside a cycle: completions that are not used up
        return state

    def load_loop_state(self, state: dict[str, Any]) -> None:
        """Put back what `loop_state` returned."""
        self.nonfinite_steps, self.nonfinite_in_row = state["nonfinite_steps"], state["nonfinite_in_row"]
        self._tr_loss = state["summed_loss"].to(self.args.device)
        self._total_loss_scalar -= self._tr_loss.item()  # the mean that train() returns is over its own steps
        self._globalstep_last_logged = state["last_logged_step"]
        if "grpo_step" not in state:
            return
        self._metrics["train"].update(state["grpo_metrics"])
        if state["grpo_cycle"] == self._generation_cycle():
            self._step = state["grpo_step"]
            self._buffered_inputs = send_to_device(state.get("grpo_buffer"), self.args.device)
        else:
            logger.warning(
                f"the checkpoint was saved with {state['grpo_cycle']}, this run has {self._generation_cycle()}: its "
                "completions are not used further and sampling starts anew, so the curve will differ."
            )

    def _generation_cycle(self) -> dict[str, int]:
        """What completions in use depend on: they are of no use to a run with other sizes."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        sizes = {name: getattr(self.args, name) for name in (*names, "num_iterations", "num_generations")}
        return {"world_size": self.args.world_size, **sizes}

    def loop_state_file(self, checkpoint: str | Path) -> str:
        """Where this process's loop state stands in a checkpoint."""
        return os.path.join(checkpoint, f"loop_state_{self.args.process_index}.pt")

    def save_loop_state(self, folder: Path) -> None:
        torch.save(self.loop_state(), self.loop_state_file(folder))
