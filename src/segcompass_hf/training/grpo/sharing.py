# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a VLM's prompts can be computed once for all completions behind them: tried once, on a piece of a batch."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

from ...text_stack_segcompass import decoder_layers
from .passes import PolicyPass, Prompts, SharedPass, shared_pass, whole_pass
from .reference import without_dropout

logger = logging.get_logger(__name__)

# Largest difference that counts as rounding, as a share of the values' size. Wrong masks or positions, or gradients
# that do not reach the prompt, make it 0.1 and more.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}  # norms and rotations stay in single precision
HALF_PRECISION_ROUNDING = 5e-2


class PromptSharing:
    """The policy's pass over a micro-batch, by [`shared_pass`] where the VLM can do it, else by [`whole_pass`].

    The first micro-batch in which completions share a prompt decides: states and gradients of one completion of each
    prompt must be the same both ways. Training and evaluation decide for themselves, since gradient checkpointing is
    of training alone. What cannot be shared is said once in each, with the reason.
    """

    def __init__(self):
        self.works: dict[bool, bool] = {}  # by whether the model is in training mode

    def __call__(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], prompts: Prompts | None, traced: bool
    ) -> PolicyPass | SharedPass:
        """The pass; arguments as of [`shared_pass`]."""
        written = None if prompts is None else inputs["attention_mask"][:, prompts.length :]
        if prompts is not None and model.training not in self.works and written.any():
            reason = reason_against_sharing(model, inputs, prompts)
            self.works[model.training] = reason is None
            if reason is not None:
                logger.warning(
                    "Prompts are computed anew for each of their completions, which takes several times as long and "
                    f"as much memory: {reason}."
                )
        if prompts is None or not self.works.get(model.training):
            return whole_pass(model, inputs, traced)
        return shared_pass(model, inputs, prompts, traced)


def reason_against_sharing(model: nn.Module, inputs: dict[str, torch.Tensor], prompts: Prompts) -> str | None:
    """Why prompts cannot be computed once for their completions, or `None` where they can.

    Args:
        model, inputs, prompts: As of [`shared_pass`].
    """
    if model.config.concept_input == "duplicated":
        return 'concept_input="duplicated" reads concepts from sequences that hold their completion twice'
    vlm = type(model.vlm).__name__
    try:
        with torch.enable_grad(), without_dropout(list(decoder_layers(model.vlm))):
            differences = trial_differences(model, inputs, prompts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # families fail in ways of their own
        return f"{vlm} does not go on behind kept prompts ({type(error).__name__}: {error})"
    allowed = ROUNDING.get(_computed_in(inputs["input_ids"].device, model.dtype), HALF_PRECISION_ROUNDING)
    wrong = [f"{name} by {value:.1e}" for name, value in differences.items() if not value <= allowed]
    return f"{vlm} then computes something else ({', '.join(wrong)} of their size)" if wrong else None


def trial_differences(model: nn.Module, inputs: dict[str, torch.Tensor], prompts: Prompts) -> dict[str, float]:
    """How far a shared pass is from one over whole sequences, of the longest completion of every prompt.

    Args:
        model, inputs, prompts: As of [`shared_pass`].

    Returns:
        `dict[str, float]`: Of states after the SAE's layer, of last states, and of the gradients that last states of
        completions have in the former, prompts and completions apart; as shares of the values' norms.
    """
    length = prompts.length
    is_of = prompts.rows == torch.arange(len(prompts.inputs["input_ids"]), device=prompts.rows.device)[:, None]
    rows = (is_of * (1 + inputs["attention_mask"][:, length:].sum(1))).argmax(1)  # one of every prompt
    alone = {**prompts.inputs, **{name: inputs[name][rows] for name in ("input_ids", "attention_mask")}}
    is_token = alone["attention_mask"].bool()
    in_prompt, in_completion = is_token[:, :length], is_token[:, length:]
    num_written = in_completion.shape[1]

    def read(last_states: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        last_states = last_states[:, -num_written:][in_completion]
        weights = torch.arange(last_states.numel(), device=last_states.device).cos().view_as(last_states)
        return last_states.detach(), torch.autograd.grad((last_states * weights).sum(), leaves)

    whole = whole_pass(model, alone, cut=_leaf)
    states = whole.layer_states
    last_states, (gradient,) = read(whole.last(num_written), [states])
    expected = last_states, states[is_token], gradient[:, :length][in_prompt], gradient[:, length:][in_completion]
    del whole  # before the next one is there
    shared = shared_pass(model, inputs, prompts, cut=_leaf)
    leaves = [shared.prompts.layer_states, shared.completions.layer_states]
    states = torch.cat([leaves[0], leaves[1][rows]], 1)
    last_states, gradients = read(shared.last(num_written + 1)[rows], leaves)
    found = last_states, states[is_token], gradients[0][in_prompt], gradients[1][rows][in_completion]
    names = "last states", "states of the SAE's layer", "gradients in prompts", "gradients in completions"
    return {name: _relative(*pair) for name, *pair in zip(names, found, expected, strict=True)}


def _leaf(states: torch.Tensor) -> torch.Tensor:
    return states.detach().requires_grad_()


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _computed_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
