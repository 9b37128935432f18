"""Training that survives a bad number, a kill and a broken image: what every trainer of this package starts from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from transformers.utils import logging

from ...data.readable_rows import ReadableRows, count_unreadable, is_image_dataset, readable_stream
from .checkpoints import WholeCheckpointsMixin
from .steps import NonFiniteStepsMixin

logger = logging.get_logger(__name__)

UNREADABLE_ROWS = "unreadable_rows.jsonl"  # in the output folder


@dataclass
class RobustTrainingArguments:
    """Settings of [`RobustTrainerMixin`], to be mixed into any `TrainingArguments`.

    Args:
        max_nonfinite_steps (`int`, *optional*, defaults to 10):
            Skipped steps in a row, with a loss or gradient that is not finite, before training stops with an error.
        unreadable_rows (`str`, *optional*, defaults to `"skip"`):
            `"skip"` puts the next readable row in the place of one whose image or masks cannot be read, `"error"`
            stops at it.
    """

    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "Steps in a row with a non-finite loss or gradient before training stops."}
    )
    unreadable_rows: Literal["skip", "error"] = field(
        default="skip", metadata={"help": "Skip rows whose image or masks cannot be read, or stop at the first."}
    )

    def __post_init__(self):
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps is {self.max_nonfinite_steps}; it must be 1 or more.")
        if self.unreadable_rows not in ("skip", "error"):
            raise ValueError(f"unreadable_rows is {self.unreadable_rows!r}; it must be 'skip' or 'error'.")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()


class RewindableSampler(torch.utils.data.Sampler):
    """A sampler that draws a permutation per epoch from its own generator, such as TRL's `RepeatSampler`, set to any
    epoch: resumed in the second epoch it draws what it drew there before.

    Args:
        sampler (`torch.utils.data.Sampler`): with a `generator`, from which `__iter__` draws once, at its start.
    """

    def __init__(self, sampler: torch.utils.data.Sampler):
        self.sampler = sampler
        self.start = sampler.generator.get_state()

    def set_epoch(self, epoch: int) -> None:
        self.sampler.generator.set_state(self.start)
        for _ in range(epoch):
            next(iter(self.sampler), None)

    def __iter__(self):
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class RobustTrainerMixin(NonFiniteStepsMixin, WholeCheckpointsMixin):
    """The leftmost base of a trainer: `class MyTrainer(RobustTrainerMixin, Trainer)`, or `GRPOTrainer` in its place.

    - A step with a non-finite loss or gradient is skipped by all processes, counted (`nonfinite_steps` in the logs)
      and named in a warning; `max_nonfinite_steps` in a row stop the training.
    - A checkpoint appears under its name only when it is whole. `resume_from_checkpoint=True` takes the last whole
      one; one that does not fit the model by name and shape is refused.
    - Resuming continues the loss curve exactly: beside what Trainer restores, the running means of the log line, the
      counters, and for TRL's GRPO the place in the cycle of generation with the completions still in use.
    - Rows of a `datasets` data set whose image or masks cannot be read are skipped or fatal (`unreadable_rows`), and
      listed in `unreadable_rows.jsonl` in the output folder.

    A subclass with further state of its own extends `loop_state` and `load_loop_state`.
    """

    _rewindable_sampler: RewindableSampler | None = None

    def __init__(self, *args, **kwargs):
        self._reset_nonfinite()
        super().__init__(*args, **kwargs)
        self.train_dataset = self._readable_streams(self.train_dataset, "train")
        self.eval_dataset = self._readable_streams(self.eval_dataset, "eval")

    def train(self, *args, **kwargs):
        self._reset_nonfinite()
        return super().train(*args, **kwargs)

    def _robust_setting(self, name: str) -> Any:
        return getattr(self.args, name, getattr(RobustTrainingArguments, name))

    def _unreadable_file(self) -> Path:
        return Path(self.args.output_dir) / UNREADABLE_ROWS

    def _readable_streams(self, dataset, name: str):
        """Streams are wrapped before anything repeats their rows; other data sets when their loader is made."""
        import datasets

        if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict):
            return {key: self._readable_streams(value, f"{name}_{key}") for key, value in dataset.items()}
        if not isinstance(dataset, datasets.IterableDataset) or not is_image_dataset(dataset):
            return dataset
        return readable_stream(dataset, self._robust_setting("unreadable_rows"), self._unreadable_file(), name)

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        import datasets

        if isinstance(dataset, datasets.Dataset) and is_image_dataset(dataset):
            dataset = ReadableRows(
                dataset, self._robust_setting("unreadable_rows"), self._unreadable_file(), description.lower()
            )
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        # Samplers ask for length or columns, which the data set below answers for them.
        sampler = super()._get_train_sampler(dataset.dataset if isinstance(dataset, ReadableRows) else dataset)
        own_generator = isinstance(getattr(sampler, "generator", None), torch.Generator)
        if own_generator and not hasattr(sampler, "set_epoch"):
            sampler = self._rewindable_sampler = RewindableSampler(sampler)
        return sampler

    def _run_epoch(self, *args, **kwargs):
        if self._rewindable_sampler is not None:  # accelerate's wrappers do not reach it when they skip batches
            self._rewindable_sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
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

    def _loop_state_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"loop_state_{self.args.process_index}.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.loop_state(), self._loop_state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called by every process once the data is where it was, before the first resumed step."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = self._loop_state_file(checkpoint)
        if not os.path.isfile(file):
            logger.warning(
                f"{checkpoint} holds no {os.path.basename(file)}: it was saved by another trainer or by fewer "
                "processes, so the first log line and a GRPO cycle it interrupts may differ."
            )
            return
        self.load_loop_state(torch.load(file, map_location="cpu", weights_only=True))
