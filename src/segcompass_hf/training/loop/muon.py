"""Muon for the hidden weight matrices with AdamW for everything else, as one optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

ADAMW_RATIO = 0.5  # AdamW's learning rate over Muon's, as in the recipe of the bundled checkpoint
_NOT_HIDDEN = ("embed", "lm_head", "slot_queries", "codebook", "position")


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 pays here: on CPUs without its instructions a matrix product takes 50 times as long in it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with its Newton-Schulz iteration in float32 and matrices of a shape at once."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        updates = []
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = self.state[parameter]["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        settings = (group[name] for name in ("ns_coefficients", "ns_steps", "eps"))
        directions = _orthogonalize(torch.stack(updates).float(), *settings)
        rate = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5  # "match_rms_adamw"
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction.to(parameter.dtype), alpha=rate)


def _orthogonalize(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float):
    """Bring the singular values of `(count, rows, columns)` near 1: `X <- a X + (b A + c A^2) X` with `A = X X^T`."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on 2-D hidden weights, `torch.optim.AdamW` on embeddings, vectors and convolutions.

    Learning-rate schedulers see the groups of both. Muon's update is scaled to the root mean square of an AdamW
    update, so that one order of magnitude fits both.

    Args:
        groups (`Iterable[dict]`): each `{"named_parameters": [(name, parameter), ...], "muon_lr": float,
            "adamw_lr": float}`; parameters without `requires_grad` are left out.
        weight_decay (`float`): decoupled, of both; vectors and embeddings are not decayed.
        betas (`tuple[float, float]`): of AdamW.
    """

    def __init__(self, groups: Iterable[dict], weight_decay: float = 0.02, betas: tuple[float, float] = (0.9, 0.98)):
        muon, adamw = [], []
        for group in groups:
            named = [(name, p) for name, p in group["named_parameters"] if p.requires_grad]
            hidden = [p for name, p in named if self._is_hidden(name, p)]
            # Rows of an embedding may be frozen one by one (added tokens): decay would shrink the frozen ones.
            plain = [p for name, p in named if p.dim() <= 1 or "embed" in name or "lm_head" in name]
            known = {id(p) for p in (*hidden, *plain)}
            matrices = [p for _, p in named if id(p) not in known]
            if hidden:
                muon.append({"params": hidden, "lr": group["muon_lr"]})
            if matrices:
                adamw.append({"params": matrices, "lr": group["adamw_lr"], "weight_decay": weight_decay})
            if plain:
                adamw.append({"params": plain, "lr": group["adamw_lr"], "weight_decay": 0.0})
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            kind = torch.optim.Muon if has_fast_bfloat16() else Float32Muon
            self.parts.append(kind(muon, lr=1e-3, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if adamw:
            self.parts.append(torch.optim.AdamW(adamw, lr=1e-3, betas=betas))
        if not self.parts:
            raise ValueError("no parameter requires a gradient; unfreeze something before making the optimiser.")
        super().__init__([dict(group) for part in self.parts for group in part.param_groups], {})
        # The scheduler writes into these very dictionaries.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @staticmethod
    def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() == 2 and min(parameter.shape) >= 16 and not any(part in name for part in _NOT_HIDDEN)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def muon_with_factors(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    factors: Mapping[str, float] | None = None,
) -> MuonWithAdamW:
    """[`MuonWithAdamW`] with a learning rate per part of a model, as `parameter_groups` does for other optimisers.

    Args:
        named_parameters (`Iterable[tuple[str, nn.Parameter]]`): Of the model; frozen ones are left out.
        learning_rate (`float`): Muon's, of everything no factor names; AdamW's is `ADAMW_RATIO` of it.
        weight_decay (`float`): See [`MuonWithAdamW`].
        factors (`Mapping[str, float]`, *optional*): Prefix of parameter names -> factor on both learning rates; the
            longest prefix that fits wins.

    Raises:
        ValueError: no parameter starts with one of the prefixes.
    """
    named, factors = list(named_parameters), dict(factors or {})
    unknown = [prefix for prefix in factors if not any(name.startswith(prefix) for name, _ in named)]
    if unknown:
        raise ValueError(f"no parameter starts with {unknown}; prefixes are the model's own, such as {named[0][0]!r}.")
    groups: dict[float, list] = {}
    for name, parameter in named:
        prefix = max((p for p in factors if name.startswith(p)), key=len, default=None)
        groups.setdefault(factors.get(prefix, 1.0), []).append((name, parameter))
    rates = {factor: learning_rate * factor for factor in groups}
    return MuonWithAdamW(
        (
            {"named_parameters": groups[factor], "muon_lr": rate, "adamw_lr": rate * ADAMW_RATIO}
            for factor, rate in rates.items()
        ),
        weight_decay=weight_decay,
    )
