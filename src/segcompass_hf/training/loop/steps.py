"""A step whose loss or gradient is not finite changes nothing, is counted, and after some in a row ends the run."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

_NAMES_SHOWN = 3  # parameters named in a warning
_DDP_PREFIX = "module."


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor sharded by FSDP2; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def nonfinite_names(named_tensors: list[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity, in the order given.

    Args:
        named_tensors (`list[tuple[str, torch.Tensor]]`): on any devices, floating point.
    """
    return [name for name, tensor in named_tensors if not bool(torch.isfinite(local_tensor(tensor)).all())]


def has_nonfinite_norm(tensors: list[torch.Tensor]) -> bool:
    """Whether the norm over all elements of this process overflows or holds a NaN; one pass over the memory."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        tensor = local_tensor(tensor)
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    norms = [torch.nn.utils.get_total_norm(group).cpu() for group in by_device.values()]
    return any(not math.isfinite(norm.item()) for norm in norms)


class NonFiniteStepsMixin:
    """Trainer part that skips optimizer steps whose loss or gradient is not finite, on all processes alike.

    Weights, optimizer state and learning-rate schedule stay as they are, as after an overflow under fp16, while
    `global_step` and the data move on. Looked at are the losses of the whole accumulation window and the gradients,
    before clipping, which would spread one NaN over all of them, and after it. [`JudgeStepsCallback`] calls
    `judge_step` before each step of the optimizer.
    """

    nonfinite_steps: int  # skipped steps since the first start of the run, kept across resumes
    nonfinite_in_row: int  # those at the end of it without a finite one between

    def _reset_nonfinite(self) -> None:
        self.nonfinite_steps, self.nonfinite_in_row = 0, 0
        self._window_losses: list[torch.Tensor] = []
        self._nonfinite_gradients: list[str] = []
        self._gradient_norm_overflows = False

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._window_losses.append(loss.detach())
        if self.accelerator.sync_gradients:  # the last micro-batch of a window
            self._inspect_gradients(model)
        return loss

    def _inspect_gradients(self, model) -> None:
        """Note the parameters with a non-finite gradient on this process; a pass by norms first, names only if bad."""
        named = [(n.removeprefix(_DDP_PREFIX), p.grad) for n, p in model.named_parameters() if p.grad is not None]
        self._gradient_norm_overflows = has_nonfinite_norm([gradient for _, gradient in named])
        self._nonfinite_gradients = nonfinite_names(named) if self._gradient_norm_overflows else []

    def judge_step(self, model) -> None:
        """Let the optimizer step, or keep it from stepping on all processes: called after clipping."""
        if not self._gradient_norm_overflows:  # once more: a subclass may have changed gradients, or another process
            self._inspect_gradients(model)
        losses = [loss.item() for loss in self._window_losses]
        losses = [loss for loss in losses if not math.isfinite(loss)]
        self._window_losses = []
        overflows = self._gradient_norm_overflows
        if self.is_deepspeed_enabled:  # it keeps the gradients to itself
            overflows = not math.isfinite(float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()))
        seen = torch.tensor([len(losses), int(overflows)], device=self.accelerator.device)
        bad_losses, bad_gradients = self.accelerator.reduce(seen, reduction="sum").tolist()
        if not bad_losses and not bad_gradients:
            self.nonfinite_in_row = 0
            if self._scaler() is None:
                self.optimizer._is_overflow = False  # accelerate resets it only where it has a scaler
            return
        what = self._describe(losses, self._nonfinite_gradients)
        self._count_nonfinite(model, what, in_row=bad_losses > 0 or not self._scale_is_being_lowered())
        self._skip_optimizer_step(overflow=bad_gradients > 0)

    def _describe(self, losses: list[float], gradients: list[str]) -> str:
        """What any process saw, in words; all processes get the same text."""
        seen = gather_object([(losses, gradients)])
        losses = [loss for part, _ in seen for loss in part]
        gradients = list(dict.fromkeys(name for _, part in seen for name in part))
        parts = []
        if losses:
            parts.append(f"the loss is {losses[0]}" + (f" in {len(losses)} forward passes" if len(losses) > 1 else ""))
        if gradients:
            more = f" and {len(gradients) - _NAMES_SHOWN} more" if len(gradients) > _NAMES_SHOWN else ""
            parts.append(f"non-finite gradients: {', '.join(gradients[:_NAMES_SHOWN])}{more}")
        return "; ".join(parts) or "the norm of the gradients overflows"

    def _count_nonfinite(self, model, what: str, in_row: bool) -> None:
        step, limit = self.state.global_step + 1, self._robust_setting("max_nonfinite_steps")
        self.nonfinite_steps += 1
        self.nonfinite_in_row += in_row
        logger.warning(
            f"step {step} is skipped, weights and optimizer stay as they are: {what} "
            f"({self.nonfinite_steps} skipped so far, {self.nonfinite_in_row} of at most {limit} in a row)."
        )
        self.check_weights_finite(model, f"after step {self.state.global_step}")
        if self.nonfinite_in_row >= limit:
            raise RuntimeError(
                f"{self.nonfinite_in_row} steps in a row, up to step {step}, were not finite ({what}); training stops "
                f"and the checkpoints in {self.args.output_dir} stay. Try a lower learning_rate or max_grad_norm, "
                "bf16 in place of fp16, or look at the rows of these steps; then resume from the last checkpoint. "
                "max_nonfinite_steps sets how many are allowed."
            )

    def check_weights_finite(self, model, when: str) -> None:
        """Raise where a trained weight is NaN or infinite on any process: no step recovers from that.

        Raises:
            RuntimeError: With the first names.
        """
        named = [(n.removeprefix(_DDP_PREFIX), p.detach()) for n, p in model.named_parameters() if p.requires_grad]
        bad = nonfinite_names(named) if has_nonfinite_norm([tensor for _, tensor in named]) else []
        count = torch.tensor([len(bad)], device=self.accelerator.device)
        if not self.accelerator.reduce(count, reduction="sum").item():
            return
        names = list(dict.fromkeys(gather_object(bad)))
        raise RuntimeError(
            f"{len(names)} trained weights are not finite {when}, such as {', '.join(names[:_NAMES_SHOWN])}; training "
            f"stops and saves nothing over the checkpoints in {self.args.output_dir}. Resume from the last one with a "
            "lower learning_rate or max_grad_norm."
        )

    def _scaler(self) -> Any:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _scale_is_being_lowered(self) -> bool:
        """Whether the loss is scaled for fp16 by more than 1: an overflow then only tells to scale it by less."""
        if self.is_deepspeed_enabled:
            return self.optimizer.step_was_skipped
        scaler = self._scaler()
        return scaler is not None and scaler.get_scale() > 1.0

    def _skip_optimizer_step(self, overflow: bool) -> None:
        """Replace the next call of `optimizer.step`, and say so to the schedule, which waits as after an overflow.

        An fp16 scaler lowers its scale where the gradients overflowed; left to itself it would see only those of its
        own process.
        """
        if self.is_deepspeed_enabled:
            self._stop_unless_deepspeed_skipped()
            return
        optimizer, scaler = self.optimizer, self._scaler()
        real_step = optimizer.step

        def skip(*args, **kwargs):
            optimizer.step = real_step
            optimizer._is_overflow = True
            if scaler is not None:
                scaler.update(scaler.get_scale() * (scaler.get_backoff_factor() if overflow else 1.0))

        optimizer.step = skip

    def _stop_unless_deepspeed_skipped(self) -> None:
        if not self.optimizer.step_was_skipped:
            raise RuntimeError(
                f"step {self.state.global_step + 1} was not finite and DeepSpeed has applied it: it steps inside "
                "backward, where it cannot be stopped. Resume from the last checkpoint, with "
                '"bf16": {"check_grad_overflow": true} in the DeepSpeed config so that such steps are skipped.'
            )


class JudgeStepsCallback(TrainerCallback):
    """Lets a [`NonFiniteStepsMixin`] look at every step before the optimizer takes it."""

    def __init__(self, trainer: NonFiniteStepsMixin):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.trainer.judge_step(model)
