"""What an SAE keeps of the states it reads: explained variance, sparsity, the VLM's words when spliced through it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ...modeling_sae import SegCompassSae
from ...text_stack_segcompass import HiddenStateCapture
from ...vlm_inputs_segcompass import sequence_inputs
from ..vision import vision_read_once
from .activations import ActivationHarvester

MODALITIES = ("text", "image")
DENSITY_DECADES = range(-7, 0)  # log10 of the share of tokens a feature fires on


@dataclass
class StateErrors:
    """Running sums over tokens, in the SAE's normalised space, for the explained variance of a sample.

    `explained_variance = 1 - sum |x - x'|^2 / sum |x - mean(x)|^2`.

    Example:

    >>> errors = StateErrors()
    >>> errors.add(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    >>> errors.explained_variance()  # error 1, variance about the mean 1 + 1
    0.5
    """

    tokens: float = 0.0
    error: float = 0.0
    square: float = 0.0
    total: torch.Tensor | float = 0.0  # (d_in,) sum of the states

    def add(self, states: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """Add tokens: both `(tokens, d_in)`."""
        states, reconstruction = states.double(), reconstruction.double()
        self.tokens += len(states)
        self.error += (states - reconstruction).pow(2).sum().item()
        self.square += states.pow(2).sum().item()
        self.total = self.total + states.sum(0).cpu()

    def explained_variance(self) -> float:
        """NaN without two different tokens."""
        if not self.tokens:
            return math.nan
        variance = self.square - (self.total.pow(2).sum() / self.tokens).item()
        return 1 - self.error / variance if variance > 0 else math.nan

    def merge(self, other: StateErrors) -> None:
        """Add another's tokens."""
        for name in ("tokens", "error", "square", "total"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class SaeEvaluation:
    """Sums over evaluation rows, of one process or several; [`~SaeEvaluation.metrics`] turns them into numbers."""

    errors: dict[str, StateErrors] = field(default_factory=lambda: {name: StateErrors() for name in MODALITIES})
    active: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0.0))
    loss: float = 0.0
    fired: torch.Tensor | float = 0.0  # (d_sae,) tokens each feature fired on
    cross_entropy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("clean", "spliced", "zero"), 0.0))
    words: int = 0  # predicted text tokens

    def merge(self, other: SaeEvaluation) -> None:
        """Add what another process summed up."""
        for name in MODALITIES:
            self.errors[name].merge(other.errors[name])
            self.active[name] += other.active[name]
        for name in self.cross_entropy:
            self.cross_entropy[name] += other.cross_entropy[name]
        self.loss, self.fired, self.words = self.loss + other.loss, self.fired + other.fired, self.words + other.words

    def metrics(self) -> dict[str, float]:
        """The numbers; explained variance and L0 also by modality.

        Returns:
            `dict`: `loss`, `explained_variance`, `l0`, `dead_features` (share that never fired), `ce_clean`,
            `ce_spliced`, `ce_zero` (nats per token) and `ce_recovered = (zero - spliced) / (zero - clean)`.
        """
        both = StateErrors()
        for errors in self.errors.values():
            both.merge(errors)
        if not both.tokens:
            raise ValueError("the evaluation rows gave no token; are any of them readable?")
        metrics = {
            "loss": self.loss / both.tokens,
            "explained_variance": both.explained_variance(),
            "l0": sum(self.active.values()) / both.tokens,
            "dead_features": (self.fired == 0).double().mean().item(),
        }
        for name, errors in self.errors.items():
            if errors.tokens:
                metrics[f"explained_variance_{name}"] = errors.explained_variance()
                metrics[f"l0_{name}"] = self.active[name] / errors.tokens
        if self.words:
            ce = {name: total / self.words for name, total in self.cross_entropy.items()}
            metrics |= {f"ce_{name}": value for name, value in ce.items()}
            lost = ce["zero"] - ce["clean"]
            metrics["ce_recovered"] = (ce["zero"] - ce["spliced"]) / lost if lost else math.nan
        return metrics


@torch.no_grad()
def evaluate_rows(
    evaluation: SaeEvaluation, sae: SegCompassSae, harvester: ActivationHarvester, rows: list[tuple[int, dict]]
) -> None:
    """Add rows to an evaluation: the SAE on their states, and the VLM's cross-entropy on their text.

    Cross-entropy is that of every text token given those before it, three times over: as it is, with the
    reconstruction in place of the layer's states, and with zeros in place of them (Bricken et al. 2023). Tokens the
    SAE never sees (padding, a dropped first token) keep their states.

    Args:
        evaluation ([`SaeEvaluation`]): Added to.
        sae ([`SegCompassSae`]): In eval mode.
        harvester ([`ActivationHarvester`]): Its VLM, layer and choice of tokens.
        rows (`list`): Rows with their index.
    """
    with harvester.lock:
        _evaluate_rows(evaluation, sae, harvester, rows)


def _evaluate_rows(
    evaluation: SaeEvaluation, sae: SegCompassSae, harvester: ActivationHarvester, rows: list[tuple[int, dict]]
) -> None:
    inputs = harvester.encode(rows)
    if inputs is None:
        return
    counted, modality_ids = harvester.counted_tokens(inputs), harvester.modality_ids(inputs).long()
    if not counted.any():
        return
    clean: list[torch.Tensor] = []

    def remember(states, _):
        clean.append(states)
        return states

    def splice(states, _):
        rebuilt = output.reconstruction.to(states.dtype)
        return torch.where(counted.unsqueeze(-1), rebuilt, states)

    def ablate(states, _):
        return states.masked_fill(counted.unsqueeze(-1), 0)

    edits = (("spliced", splice), ("zero", ablate))
    with vision_read_once(harvester.vlm):
        sums = {"clean": _cross_entropy(harvester, inputs, remember)}
        output = sae(clean[0], attention_mask=counted, modality_ids=modality_ids)
        sums |= {name: _cross_entropy(harvester, inputs, edit) for name, edit in edits}
    for name, (total, _) in sums.items():
        evaluation.cross_entropy[name] += total
    evaluation.words += sums["clean"][1]
    evaluation.loss += output.loss.item() * int(counted.sum())
    normalized, _ = sae.normalize(clean[0][counted], modality_ids[counted])
    acts = output.feature_acts[counted]  # (tokens, d_sae)
    rebuilt = sae.decode(acts)
    evaluation.fired = evaluation.fired + (acts > 0).sum(0).double().cpu()
    for index, name in enumerate(MODALITIES):
        of_one = modality_ids[counted] == index
        evaluation.errors[name].add(normalized[of_one], rebuilt[of_one])
        evaluation.active[name] += (acts[of_one] > 0).sum().item()


def _cross_entropy(harvester: ActivationHarvester, inputs: dict[str, torch.Tensor], edit) -> tuple[float, int]:
    """Summed cross-entropy of the text tokens of a pass with edited states, and how many they are."""
    vlm, input_ids = harvester.vlm, inputs["input_ids"]
    with HiddenStateCapture(vlm, harvester.layer, edit=edit):
        logits = vlm(**sequence_inputs(vlm, inputs)).logits  # (rows, length, vocabulary)
    mask = inputs["attention_mask"].bool()
    is_word = mask[:, 1:] & mask[:, :-1] & (harvester.modality_ids(inputs)[:, 1:] == 0)
    total = F.cross_entropy(logits[:, :-1][is_word].float(), input_ids[:, 1:][is_word], reduction="sum")
    return total.item(), int(is_word.sum())


def density_shares(counts: torch.Tensor, tokens: int) -> dict[str, float]:
    """Share of the features in each decade of firing density, and of those that never fired.

    Args:
        counts (`torch.Tensor` of shape `(d_sae,)`): Tokens each feature fired on.
        tokens (`int`): Of so many.

    Example:

    >>> density_shares(torch.tensor([0, 1, 20, 50]), tokens=100)["1e-2"]  # 0.01 <= 1 / 100 < 0.1
    0.25
    """
    density = counts.double() / max(1, tokens)
    shares = {"never": (counts == 0).double().mean().item()}
    for decade in DENSITY_DECADES:
        low = 0.0 if decade == DENSITY_DECADES[0] else 10.0**decade
        high = 2.0 if decade == DENSITY_DECADES[-1] else 10.0 ** (decade + 1)
        inside = (density > 0) & (density >= low * (1 - 1e-9)) & (density < high * (1 - 1e-9))
        shares[f"1e{decade}"] = inside.double().mean().item()
    return shares


def density_histogram(counts: torch.Tensor, tokens: int, bins_per_decade: int = 4) -> dict:
    """The same in finer bins: `log10_edges`, `features` per bin, `never` and `tokens`, ready for json."""
    first, last = DENSITY_DECADES[0], DENSITY_DECADES[-1] + 1
    fired = counts[counts > 0].double() / max(1, tokens)
    bins = (last - first) * bins_per_decade
    histogram = torch.histc(fired.log10().clamp(first, last), bins=bins, min=first, max=last)
    return {
        "tokens": tokens,
        "never": int((counts == 0).sum()),
        "log10_edges": [first + i / bins_per_decade for i in range(bins + 1)],
        "features": [int(n) for n in histogram],
    }


__all__ = ["SaeEvaluation", "StateErrors", "density_histogram", "density_shares", "evaluate_rows"]
