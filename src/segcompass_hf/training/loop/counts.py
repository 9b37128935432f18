# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a mean is taken over when an optimizer step sees several micro-batches on several processes.

A mean of means is wrong where micro-batches differ: one with two answers of ten tokens and one with two of a thousand,
one with eight objects to find and one with none. Here every term is a sum divided by the count of the whole window:
all micro-batches of the step, of all processes. `batch 8 x accumulation 1` on one process and `batch 2 x accumulation
2` on two then give the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class WindowCounts:
    """Counts of a window, at least 1 each.

    Plain numbers: FSDP would cast tensors to bf16, which cannot count beyond 256.

    Args:
        tokens: Tokens with a language target.
        segmentation_items: Samples the mean of L_seg is over: those with objects, or all of them
            (`empty_samples="zero"`).
        samples: All samples, for L_conf.
        alignment_items: Samples with a word and a patch to align.
    """

    tokens: float
    segmentation_items: float
    samples: float
    alignment_items: float


def count_window(
    batches: Iterable[Mapping[str, Any]],
    empty_samples: Literal["exclude", "zero"] = "exclude",
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> WindowCounts:
    """Count what the losses of these batches are averaged over.

    Args:
        batches (`Iterable[Mapping]`): The micro-batches of one optimizer step on this process. `labels` are counted
            from the second token on (the first is never predicted), `num_objects`, `alignment_words`
            and `pair_words` where given. Batches of a slot cache have `slots` in place of `input_ids`.
        empty_samples (`str`, defaults to `"exclude"`): The model configuration's: whether samples without objects
            count in L_seg.
        reduce (`Callable`, *optional*): Sums a tensor over the processes (`accelerator.reduce`).
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        labels, objects, words = (batch.get(name) for name in ("labels", "num_objects", "alignment_words"))
        size = len(batch["input_ids"] if "input_ids" in batch else batch["slots"])
        tokens = 0 if labels is None else int((labels[:, 1:] != -100).sum())
        found = 0 if objects is None else int((objects > 0).sum()) if empty_samples == "exclude" else size
        aligned = 0 if words is None else int((words.any(1) & (batch["alignment_coverage"] > 0).any(1)).sum())
        if "pair_words" in batch:
            aligned = int((batch["pair_words"].any(1) & batch["pair_patches"].any(1)).any(1).sum())
        totals += torch.tensor([tokens, found, size, aligned], dtype=torch.float64)
    totals = totals.float()
    if reduce is not None:
        totals = reduce(totals)
    return WindowCounts(*totals.clamp(min=1).tolist())


class WindowCountsMixin:
    """Makes a Trainer hand `WindowCounts` to `compute_loss` as `num_items_in_batch`, and leave the scaling to it.

    In `compute_loss`, divide sums by the counts of `self.window_counts(...)` and multiply the result by
    `self.loss_scale(...)`: gradients are averaged over processes, which a sum over the window must undo.

    The last window of an epoch may be shorter where the data has a length. A stream ends without notice; what it
    gives for less than a whole window is left out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} sees {self.args.n_gpu} GPUs in one process, which torch.nn.DataParallel would "
                "share; start it with `accelerate launch`, or choose one GPU by CUDA_VISIBLE_DEVICES."
            )
        self.model_accepts_loss_kwargs = True  # losses arrive scaled: Trainer must not divide by accumulation steps

    @property
    def empty_samples(self) -> str:
        """Whether samples without objects count in L_seg, by the model's configuration."""
        return getattr(self.accelerator.unwrap_model(self.model).config, "empty_samples", "exclude")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches and self.state.global_step == 0:  # Trainer would end without a step, and save
            raise ValueError(
                f"the training rows give {len(batches)} batches of {self.args.per_device_train_batch_size} rows per "
                f"process, but a step takes {num_batches} (gradient_accumulation_steps): no step is possible. Give "
                "more rows, or lower the two."
            )
        if batches and len(batches) < num_batches:  # Trainer would step at the next window, with both gradients summed
            logger.warning(
                f"the last {len(batches)} batches of a pass over the stream are left out: a step takes {num_batches} "
                "(gradient_accumulation_steps)."
            )
        if len(batches) < num_batches:
            return [], None

        def reduce(totals: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(totals.to(device), reduction="sum")

        return batches, count_window(batches, self.empty_samples, reduce)

    def window_counts(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> WindowCounts:
        """The window's counts in training; in evaluation those of the batch alone."""
        if isinstance(num_items_in_batch, WindowCounts):
            return num_items_in_batch
        return count_window([inputs], self.empty_samples)

    def loss_scale(self, num_items_in_batch: Any) -> int:
        """Factor on a window's loss: the number of processes, whose gradients are averaged, not summed."""
        return self.accelerator.num_processes if isinstance(num_items_in_batch, WindowCounts) else 1
