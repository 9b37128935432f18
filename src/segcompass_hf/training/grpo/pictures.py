# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Every so many steps: what the model sees, thinks and segments, as pictures on disk and in the trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ...images_segcompass import restore_map, to_rgb_image
from ..rewards.rewards import THINK_END, THINK_START, completion_text, format_problem

logger = logging.get_logger(__name__)


def picture_sample(
    processor: Any,
    row: Mapping[str, Any],
    completion: Any,
    original_size: Sequence[int],
    reshaped_input_size: Sequence[int],
    rewards: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """
    One completion as [`SamplePictureLogger`] takes it, from the columns that reward functions get.

    Args:
        processor ([`SegCompassProcessor`]): Brings maps back to the image's size.
        row (`Mapping`):
            `image`, `instruction` (or `prompt`), `pred_masks`, `heatmap_logits`, `mask_labels` `(num_slots, h, w)`,
            `slot_logits` `(num_slots,)`, `num_objects`, `slot_logit_threshold`; where present, `mask_logit_threshold`
            (0 otherwise) and `sample_id`.
        completion (`str` or `list[dict]`): The answer, as text or conversation.
        original_size, reshaped_input_size (`Sequence[int]`): (height, width), as the processor returns them.
        rewards (`Mapping[str, float]`, *optional*): By name.

    Returns:
        `dict`: `image`, `instruction`, `completion`, `masks` `(n, H, W)` bool, `scores` `(n,)`, `slots` `(n,)`,
        `heatmaps` `(num_slots, H, W)` and `confidences` `(num_slots,)` in [0, 1], `true_masks` `(num_objects, H, W)`
        bool, `rewards`, `problem` (what is wrong with the form, or `None`), `sample_id`.

    Raises:
        `ValueError`: masks or logits are not finite.
    """
    outputs = SimpleNamespace(**{name: row[name][None] for name in ("pred_masks", "heatmap_logits", "slot_logits")})
    original_size, reshaped_input_size = (torch.as_tensor(s).tolist() for s in (original_size, reshaped_input_size))
    sizes, threshold = ([original_size], [reshaped_input_size]), row.get("mask_logit_threshold")
    (every,) = processor.post_process_slots(outputs, *sizes, mask_logit_threshold=threshold)
    (kept,) = processor.post_process_segmentation(
        outputs,
        *sizes,
        slot_logit_threshold=row["slot_logit_threshold"],
        mask_logit_threshold=threshold,
        output_heatmaps=False,
    )
    labels = row["mask_labels"][: int(row["num_objects"])].float().cpu()
    place = (processor.canvas_size, reshaped_input_size, original_size)
    true_masks = [restore_map(label, *place) > 0.5 for label in labels]
    return {
        "image": to_rgb_image(row["image"]),
        "instruction": _instruction(row),
        "completion": completion_text(completion),
        "masks": kept["masks"].numpy(),
        "scores": kept["scores"].numpy(),
        "slots": kept["slots"].numpy(),
        "heatmaps": every["heatmaps"].numpy(),
        "confidences": every["scores"].numpy(),
        "true_masks": torch.stack(true_masks).numpy() if true_masks else every["masks"][:0].numpy(),
        "rewards": dict(rewards or {}),
        "problem": format_problem(completion, num_slots=len(every["scores"])),
        "sample_id": row.get("sample_id"),
    }


def _instruction(row: Mapping[str, Any]) -> str:
    if row.get("instruction") is not None:
        return row["instruction"]
    return completion_text(row["prompt"])  # the last message, which is the user's


class SamplePictureLogger:
    """
    Writes sample pictures to `folder/step-000100/` (`sample-0.png` and so on, with their words and figures in
    `samples.jsonl`) and hands them to TensorBoard, Weights & Biases and Trackio where the trainer reports there.

    Only the main process writes. Whatever fails here is told once and never stops training.

    Args:
        folder (`str` or `os.PathLike`): Where the folders of the steps go, such as `output_dir/samples`.
        every_steps (`int`): Steps between pictures; 0 for none.
        num_samples (`int`): Pictures each time, at most.
        callbacks (`Sequence[TrainerCallback]`, *optional*): The trainer's, `trainer.callback_handler.callbacks`; the
            trackers are found among them each time.

    Examples:

    >>> pictures = SamplePictureLogger("output/samples", every_steps=100, num_samples=4)
    >>> shown = []
    >>> for step in range(0, 300, 30):  # answers are sampled every 30 steps here
    ...     if pictures.wants(step):
    ...         pictures.log(step, [])
    ...         shown.append(step)
    >>> shown
    [0, 120, 210]
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every_steps: int,
        num_samples: int,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if every_steps < 0 or num_samples < 0:
            raise ValueError(
                f"every_steps is {every_steps} and num_samples {num_samples}; expected 0 (no pictures) or more."
            )
        self.folder, self.every_steps, self.num_samples = Path(folder), every_steps, num_samples
        self.callbacks = callbacks
        self._due: int | None = None
        self._warned: set[str] = set()

    def wants(self, step: int) -> bool:
        """
        Whether pictures are due at `step`: at a multiple of `every_steps`, or the first asked about after one, since
        rollouts may come less often than every step.
        """
        if not (self.every_steps and self.num_samples):
            return False
        if self._due is None:  # the first question; a resumed run waits for the next multiple
            self._due = -(-step // self.every_steps) * self.every_steps
        return step >= self._due

    def log(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """
        Draw and write the first `num_samples` samples.

        Args:
            step (`int`): Optimizer steps done.
            samples (`Iterable[Mapping]`): As [`picture_sample`] makes them. Given as a generator, they are made on the
                main process alone, no more than needed, and failures in making them do not stop training either.
        """
        from accelerate import PartialState

        if self.every_steps:
            self._due = (step // self.every_steps + 1) * self.every_steps
        if not PartialState().is_main_process:
            return
        try:
            self._write(step, islice(samples, self.num_samples))
        except Exception as error:  # a picture is never worth a training run
            self._warn("write", f"sample pictures of step {step} are incomplete: {type(error).__name__}: {error}")

    def _write(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        folder = self.folder / f"step-{step:06d}"
        records = None
        try:
            for index, sample in enumerate(samples):
                if records is None:
                    folder.mkdir(parents=True, exist_ok=True)
                    records = (folder / "samples.jsonl").open("w", encoding="utf-8")
                path = folder / f"sample-{index}.png"
                is_drawn = self._draw(sample, path)
                records.write(json.dumps(_record(step, sample, path.name if is_drawn else None)) + "\n")
                records.flush()
                if is_drawn:
                    self._track(step, index, sample, path)
        finally:
            if records is not None:
                records.close()

    def _draw(self, sample: Mapping[str, Any], path: Path) -> bool:
        from ...figure import SegmentationRow, plot_segmentations

        row = SegmentationRow(
            **{name: sample[name] for name in ("image", "instruction", "masks", "scores", "slots", "heatmaps")},
            confidences=sample["confidences"],
            true_masks=sample["true_masks"],
            reasoning=_shown_words(sample),
            caption=_caption(sample),
        )
        try:
            plot_segmentations([row]).savefig(path)
        except ImportError as error:
            self._warn("draw", f"sample pictures are not drawn, only samples.jsonl is written: {error}")
            return False
        return True

    def _track(self, step: int, index: int, sample: Mapping[str, Any], path: Path) -> None:
        from transformers.integrations import (
            INTEGRATION_TO_CALLBACK,
            TensorBoardCallback,
            TrackioCallback,
            WandbCallback,
        )

        name = f"samples/{index}"
        words = " | ".join(part for part in (sample["instruction"], _caption(sample)) if part)
        for callback in self.callbacks:
            tracker = type(callback).__name__.removesuffix("Callback")
            try:
                if isinstance(callback, TensorBoardCallback):
                    _to_tensorboard(callback.tb_writer, step, name, words, path)
                elif isinstance(callback, (WandbCallback, TrackioCallback)):
                    module = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
                    # the step as these callbacks log it: their own counter runs with every call
                    module.log({name: module.Image(str(path), caption=words), "train/global_step": step})
                elif isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
                    self._warn(tracker, f"sample pictures do not go to {tracker}; they are in {self.folder}.")
            except Exception as error:  # trackers fail in their own ways (network, quota)
                self._warn(tracker, f"{tracker} did not take a sample picture: {type(error).__name__}: {error}")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message)


def _to_tensorboard(writer: Any, step: int, name: str, words: str, path: Path) -> None:
    import numpy as np
    from PIL import Image

    if writer is None:
        return
    with Image.open(path) as picture:
        writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    writer.add_text(name, words, step)


def _shown_words(sample: Mapping[str, Any]) -> str:
    """The reasoning, or the whole answer where its form is broken, so that one sees how."""
    answer = sample["completion"]
    if sample.get("problem") is not None:
        return answer
    return answer.partition(THINK_START)[2].partition(THINK_END)[0]


def _caption(sample: Mapping[str, Any]) -> str:
    parts = [f"{name} {value:.2f}" for name, value in sample["rewards"].items()]
    return ",  ".join([*parts, *([sample["problem"]] if sample.get("problem") else [])])


def _record(step: int, sample: Mapping[str, Any], picture: str | None) -> dict[str, Any]:
    return {
        "step": step,
        "picture": picture,
        "sample_id": sample.get("sample_id"),
        "instruction": sample["instruction"],
        "completion": sample["completion"],
        "problem": sample.get("problem"),
        "rewards": {name: float(value) for name, value in sample["rewards"].items()},
        "slots": [int(slot) for slot in sample["slots"]],
        "confidences": [round(float(value), 4) for value in sample["confidences"]],
        "num_objects": len(sample["true_masks"]),
    }
