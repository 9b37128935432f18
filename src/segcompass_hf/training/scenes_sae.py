"""Stage 5 of scenes-tiny: a sparse autoencoder on the hidden states that its language model has at the SAE layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback

from .sae.pair_buffer import PairBlock
from .sae.pair_losses import PairLoss, pair_loss
from .scenes_batches import SceneCollator, SceneSamples
from .scenes_trainers import RecipeTrainer

PAIRS = 512  # of a step, with a pair loss
_PER_FEATURE = ("b_enc", "b_gate", "b_mag", "r_mag", "threshold")  # which there are depends on the architecture


@torch.no_grad()
def harvest(
    vlm,
    tokenizer,
    layer: int,
    num_scenes: int,
    seed: int,
    batch_size: int = 64,
    kinds: tuple[str, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of every token, padding and the start token left out.

    The start token is left out because its state is a constant of outlying norm.

    Returns:
        `tuple`: states `(tokens, hidden_size)` float32 and their token ids `(tokens,)`.
    """
    vlm.eval()
    states, ids = [], []
    scenes, collate = SceneSamples(num_scenes, seed=seed, kinds=kinds), SceneCollator(tokenizer)
    loader = DataLoader(scenes, batch_size, collate_fn=collate, num_workers=1)
    for batch in loader:
        inputs = {name: batch[name].to(vlm.device) for name in ("input_ids", "attention_mask", "pixel_values")}
        hidden = vlm.base_model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer]
        keep = (batch["attention_mask"] == 1) & (batch["input_ids"] != tokenizer.bos_token_id)
        states.append(hidden.float().cpu()[keep])
        ids.append(batch["input_ids"][keep])
    return torch.cat(states), torch.cat(ids)


class StateDataset(TensorDataset):
    """Rows of hidden states and, where given, of modalities (0 text, 1 image), as dictionaries."""

    names = ("hidden_states", "modality_ids")

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in zip(self.names, self.tensors, strict=False)}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self[torch.as_tensor(indices)]


@torch.no_grad()
def sae_report(
    sae, states: torch.Tensor, modality_ids: torch.Tensor | None = None, chunk: int = 8192
) -> dict[str, float]:
    """Explained variance (1 - FVU), L0 and share of features that never fire, over `states` `(tokens, d_in)`."""
    error, fired, active = 0.0, torch.zeros(sae.config.d_sae), 0.0
    modalities = [None] * len(states) if modality_ids is None else modality_ids.split(chunk)
    parts = list(zip(states.split(chunk), modalities, strict=False))
    normalized = torch.cat([sae.normalize(*part)[0] for part in parts])
    for raw, part in zip(parts, normalized.split(chunk), strict=True):
        acts = sae.encode(*raw)
        error += (sae.decode(acts) - part).pow(2).sum().item()
        fired += (acts > 0).float().sum(0).cpu()
        active += (acts > 0).float().sum().item()
    total = (normalized - normalized.mean(0)).pow(2).sum().item()
    return {
        "explained_variance": 1 - error / total,
        "l0": active / len(states),
        "dead_features": (fired == 0).float().mean().item(),
    }


class SceneSaeTrainer(RecipeTrainer):
    """The paper's loss, its L1 weight ramped up over the first 15 % of the steps; dead features are started again.

    A feature that did not fire for `resample_every` steps takes the direction of a badly reconstructed state
    (Bricken et al. 2023, "Towards Monosemanticity", appendix on resampling).

    Args:
        resample_every (`int`): Steps.
        pairs ([`PairBlock`], *optional*): Words and patches to add a pair loss for, see `sae_pairs`.
        pair_loss (`str`): `shared_topk` or `contrastive`.
        pair_weight (`float`): Of that loss.
        pair_k (`int`): Features of a pair (`shared_topk`).
    """

    def __init__(
        self,
        *args,
        resample_every: int = 250,
        pairs: PairBlock | None = None,
        pair_loss: PairLoss = "none",
        pair_weight: float = 1.0,
        pair_k: int = 8,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.resample_every = resample_every
        self.pairs, self.pair_loss, self.pair_weight, self.pair_k = pairs, pair_loss, pair_weight, pair_k
        self.final_l1 = self.model.config.l1_coefficient
        self.fired = torch.zeros(self.model.config.d_sae)
        self.add_callback(_Resample(self))

    def create_optimizer(self, model=None):
        parameters = (model if model is not None else self.model).parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ramp = min(1.0, (self.state.global_step + 1) / (0.15 * self.state.max_steps))
        self.model.config.l1_coefficient = self.final_l1 * ramp
        output = model(**inputs)
        self.model.config.l1_coefficient = self.final_l1
        active = output.feature_acts.detach() > 0
        self.fired += active.float().sum(0).cpu()
        self.report(mse=output.mse_loss, l0=active.float().sum(-1).mean())
        self.last_states, self.last_reconstruction = inputs["hidden_states"], output.reconstruction.detach()
        return output.loss + self._pair_loss() if self.pairs is not None else output.loss

    def _pair_loss(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.state.global_step)  # the same draw after a resume
        batch = self.pairs.draw(PAIRS, generator)
        loss = pair_loss(self.model, batch, self.pair_loss, self.pair_k)
        self.report(pair_loss=loss)
        return self.pair_weight * loss

    @torch.no_grad()
    def resample(self) -> None:
        """Give dead features the directions of badly reconstructed states, and forget their optimiser state."""
        sae = self.model
        dead = (self.fired == 0).nonzero()[:, 0]
        self.fired.zero_()
        error = self.last_states - self.last_reconstruction
        weights = error.pow(2).sum(-1)
        dead = dead[: len(weights)]
        if not len(dead):
            return
        chosen = error[torch.multinomial(weights.float(), len(dead))]
        direction = chosen / chosen.norm(dim=-1, keepdim=True)
        sae.W_dec[dead] = direction * sae.W_dec.norm(dim=1).mean()
        sae.W_enc[:, dead] = (direction * 0.3 * sae.W_enc.norm(dim=0).mean()).t()
        for name in _PER_FEATURE:
            if getattr(sae, name, None) is not None:
                getattr(sae, name)[dead] = 0
        for parameter, index in self._rows(dead):
            for name in ("exp_avg", "exp_avg_sq"):
                if name in self.optimizer.state.get(parameter, {}):
                    self.optimizer.state[parameter][name][index] = 0
        self.report(resampled=float(len(dead)))

    def _rows(self, features: torch.Tensor) -> Iterator[tuple[torch.nn.Parameter, object]]:
        yield self.model.W_dec, features
        yield self.model.W_enc, (slice(None), features)
        for name in _PER_FEATURE:
            if getattr(self.model, name, None) is not None:
                yield getattr(self.model, name), features


class _Resample(TrainerCallback):
    def __init__(self, trainer: SceneSaeTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.resample_every == 0 and state.global_step < 0.6 * state.max_steps:
            self.trainer.resample()

    def on_train_end(self, args, state, control, **kwargs):
        tensors = self.trainer.train_dataset.tensors
        step = max(1, len(tensors[0]) // 20_000)
        self.trainer.log(sae_report(self.trainer.model, *(tensor[::step].to(args.device) for tensor in tensors)))
