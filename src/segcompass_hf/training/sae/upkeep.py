"""What an SAE needs beside gradient steps: a count of dead features, fresh starts for them, unit decoder rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ...modeling_sae import SegCompassSae
from ...sae_activations_segcompass import smallest_kept

logger = logging.get_logger(__name__)

UNIT_TOLERANCE = 1e-2  # norms rounded to bfloat16 are within it
RESAMPLED_ENCODER_SCALE = 0.2  # of the mean encoder norm: small, so that a new feature does not shout the others down


class FiringCounts:
    """How often each feature fires, and for how many tokens it has been silent.

    Example:

    >>> counts = FiringCounts(d_sae=3)
    >>> counts.add(torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    >>> counts.add(torch.tensor([[0.1, 0.0, 0.0]]))
    >>> counts.silent_tokens.tolist(), counts.dead(after_tokens=3).tolist()
    ([0, 3, 1], [False, True, False])
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu"):
        self.silent_tokens = torch.zeros(d_sae, dtype=torch.long, device=device)  # since a feature fired last
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)  # tokens it fired on, since `restart`
        self.tokens = 0  # since `restart`

    def add(self, feature_acts: torch.Tensor, accelerator=None) -> None:
        """Count a batch `(tokens, d_sae)`, with `accelerator` those of all processes; all have as many tokens."""
        self.add_fired((feature_acts > 0).sum(0), feature_acts.shape[0], accelerator)

    def add_fired(self, fired: torch.Tensor, tokens: int, accelerator=None) -> None:
        """The same for a batch of so many tokens, from those that each feature fired on: `(d_sae,)`."""
        if accelerator is not None and accelerator.num_processes > 1:
            fired, tokens = accelerator.reduce(fired, "sum"), tokens * accelerator.num_processes
        self.silent_tokens = torch.where(fired > 0, 0, self.silent_tokens + tokens)
        self.fired += fired
        self.tokens += tokens

    def dead(self, after_tokens: int) -> torch.Tensor:
        """Features silent for at least so many tokens: bool `(d_sae,)`."""
        return self.silent_tokens >= after_tokens

    def restart(self) -> None:
        """Begin a new count of firings; silence goes on."""
        self.fired = torch.zeros_like(self.fired)
        self.tokens = 0

    def state_dict(self) -> dict:
        return {"silent_tokens": self.silent_tokens.cpu(), "fired": self.fired.cpu(), "tokens": self.tokens}

    def load_state_dict(self, state: dict) -> None:
        device = self.fired.device
        self.silent_tokens, self.fired = state["silent_tokens"].to(device), state["fired"].to(device)
        self.tokens = state["tokens"]


@torch.no_grad()
def remove_radial_gradient_(sae: SegCompassSae) -> None:
    """Take the part of the decoder's gradient along its rows away: at fixed norm it only disturbs Adam's averages."""
    gradient = sae.W_dec.grad
    if gradient is not None:
        directions = sae.decoder_directions
        gradient -= (gradient * directions).sum(-1, keepdim=True) * directions


@torch.no_grad()
def set_unit_norm_(sae: SegCompassSae) -> None:
    """Scale every decoder row to norm 1; a row of zeros stays."""
    sae.W_dec.copy_(sae.decoder_directions)


def keeps_unit_rows(sae: SegCompassSae, decoder_norm: str, is_new: bool) -> bool:
    """Whether decoder rows are kept at norm 1, by `SaeTrainingConfig.decoder_norm`.

    Args:
        sae ([`SegCompassSae`]): As it is before training.
        decoder_norm (`str`): `"auto"`, `"free"` or `"unit"`.
        is_new (`bool`): Whether it has learned nothing yet, so that its norms mean nothing.
    """
    weighs_by_norm = sae.config.architecture == "standard" and not sae.takes_top_k
    if decoder_norm == "free" or (decoder_norm == "auto" and weighs_by_norm):
        return False
    norms = sae.W_dec.detach().float().norm(dim=-1)  # (d_sae,)
    if is_new or _folds(sae) or bool(((norms - 1).abs() < UNIT_TOLERANCE).logical_or(norms == 0).all()):
        return True
    span = f"decoder rows of the given SAE have norms from {norms.min():.3g} to {norms.max():.3g}"
    if decoder_norm == "auto":
        logger.warning(f"{span}; setting them to 1 would change its features, so they are left free.")
        return False
    logger.warning(
        f"{span}; decoder_norm='unit' sets them to 1, which changes its features. Use decoder_norm='free' to go on "
        "from what it has learned."
    )
    return True


def fold_norms_(sae: SegCompassSae) -> None:
    """Move decoder norms into the encoder where that changes no reconstruction, see `fold_decoder_norms_`."""
    if _folds(sae):
        sae.fold_decoder_norms_()


def _folds(sae: SegCompassSae) -> bool:
    return not sae.takes_top_k and (sae.config.architecture != "standard" or sae.config.activation == "relu")


@torch.no_grad()
def resample_dead_features_(
    sae: SegCompassSae,
    dead: torch.Tensor,
    states: torch.Tensor,
    modality_ids: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> torch.Tensor:
    """Start dead features again from badly rebuilt states (Bricken et al. 2023, appendix on neuron resampling).

    A state is drawn for each with probability proportional to its squared error's square; the feature gets the
    direction of what was missed, at the mean decoder norm and a fifth of the mean encoder norm, and Adam's averages of
    its weights are forgotten.

    Args:
        sae ([`SegCompassSae`]): Architecture `standard`; changed in place.
        dead (`torch.Tensor` of shape `(d_sae,)`): bool.
        states (`torch.Tensor` of shape `(tokens, d_in)`): A batch; at most as many features start again.
        modality_ids (`torch.Tensor` of shape `(tokens,)`): 0 text, 1 image.
        optimizer (`torch.optim.Optimizer`): Holds the averages.
        generator (`torch.Generator`): Draws on the CPU, so that a resumed run draws the same.

    Returns:
        `torch.Tensor`: ids of the features that start again.
    """
    normalized, _ = sae.normalize(states, modality_ids)
    missed = normalized - sae.decode(sae.encode(states, modality_ids))  # (tokens, d_in)
    loss = missed.pow(2).sum(-1)
    features = dead.nonzero().squeeze(1)[: int((loss > 0).sum())]
    if features.numel() == 0:
        return features
    weights = loss.double().pow(2).cpu()
    chosen = torch.multinomial(weights / weights.sum(), len(features), generator=generator).to(states.device)
    directions = nn.functional.normalize(missed[chosen], dim=-1)  # (features, d_in)
    alive = ~dead
    norms = {name: _mean_norm(weight, alive) for name, weight in (("W_dec", sae.W_dec), ("W_enc", sae.W_enc.T))}
    sae.W_dec[features] = directions * norms["W_dec"]
    sae.W_enc[:, features] = (directions * norms["W_enc"] * RESAMPLED_ENCODER_SCALE).T
    sae.b_enc[features] = 0
    for parameter, index in _feature_rows(sae, features):
        state = optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value[index] = 0
    return features


def _mean_norm(rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    return (rows[alive] if alive.any() else rows).norm(dim=-1).mean()


def _feature_rows(sae: SegCompassSae, features: torch.Tensor) -> Iterator[tuple[nn.Parameter, object]]:
    yield sae.W_dec, features
    yield sae.W_enc, (slice(None), features)
    yield sae.b_enc, features


@torch.no_grad()
def smallest_kept_of_all(accelerator, activations: torch.Tensor, count: int, guess: torch.Tensor | float = 0.0):
    """[`smallest_kept`] of the batches of all processes together; `count` is one process's share, equal in all.

    Above the smallest of what the processes would keep alone lie at least as many as all keep: only those are sent.
    """
    own = smallest_kept(activations, count, guess)
    if (activations >= own).sum() < count:  # not so many are positive: then all that are positive count
        own = torch.zeros_like(own)
    bound = accelerator.gather(own.reshape(1)).amin()
    candidates = accelerator.pad_across_processes(activations[(activations >= bound) & (activations > 0)])  # with 0
    return smallest_kept(accelerator.gather(candidates), count * accelerator.num_processes)


class SaeUpkeep(TrainerCallback):
    """What happens around the optimiser's step of a [`SaeTrainer`]."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            sae = self.trainer.accelerator.unwrap_model(self.trainer.model)
            sae.smallest_kept = partial(smallest_kept_of_all, self.trainer.accelerator)
        if state.global_step == 0 and self.trainer.is_new_sae:
            self.trainer.start_from_data()
        elif state.global_step == 0 and self.trainer.unit_decoder:
            fold_norms_(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.unit_decoder:
            remove_radial_gradient_(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.unit_decoder:
            set_unit_norm_(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.accelerator.unwrap_model(self.trainer.model).__dict__.pop("smallest_kept", None)

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = self.trainer.passes
        every = args.resample_every
        if every and state.global_step % every == 0 and state.global_step <= args.resample_until * state.max_steps:
            self.trainer.resample()


__all__ = ["FiringCounts", "SaeUpkeep", "resample_dead_features_"]
