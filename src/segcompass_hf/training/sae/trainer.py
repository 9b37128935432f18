"""SAE pre-training on the hidden states of any VLM."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, set_seed
from transformers.utils import logging

from ...data.readable_rows import UnreadableLog
from ...data.sequence_states import StateSource
from ...files import write_whole
from ...modeling_sae import SegCompassSae
from ...token_places import Name, target_names
from ..inputs import load_model, load_processor
from ..loop.means import MetricMeans
from ..loop.resume import RobustTrainerMixin
from .activations import ActivationHarvester, HarvestedTokens
from .buffer import ActivationBuffer, whole_batches
from .cache import ActivationCache, CacheShare
from .cache_filling import cache_key, estimate_tokens
from .config import SaeTrainingConfig
from .metrics import SaeEvaluation, density_histogram, density_shares, evaluate_rows
from .pair_buffer import PairBuffer
from .pair_losses import pair_loss
from .rows import RowEncoder, RowStream, _mix, held_out_every
from .start import choose_layer, frozen, new_sae, start_from_data_
from .upkeep import FiringCounts, SaeUpkeep, keeps_unit_rows, resample_dead_features_

logger = logging.get_logger(__name__)

START_TOKENS = 65_536  # from which a new SAE's statistics are taken


class SaeTrainer(RobustTrainerMixin, Trainer):
    """Trains a [`SegCompassSae`] on the states of one layer of a VLM, harvested while training.

    Differs from [`~transformers.Trainer`] in its data: rows of an image-text data set, in the row schema or
    interleaved (see [`RowEncoder`]), map-style or streaming, go through the VLM up to the layer, and batches of single
    tokens come out of an [`ActivationBuffer`] (filled from an [`ActivationCache`] with `args.cache_dir`). The VLM is
    frozen and no part of what is saved: `trainer.model` is the SAE. Several processes harvest rows of their own.
    Evaluation reports explained variance, L0, dead features and recovered cross-entropy. The saved folder is a
    [`SegCompassSae`] whose configuration names the layer.

    Args:
        model (`nn.Module` or `str`): Whose states are read, as what the other trainers are given: an
            `AutoModelForImageTextToText` model, a [`SegCompassForReasoningSegmentation`] (its VLM is used), or the id
            or folder of one.
        args ([`SaeTrainingConfig`], *optional*): Settings.
        train_dataset: Rows.
        eval_dataset (*optional*): Rows; when left out, every `1 / args.validation_share`-th row of `train_dataset` is
            held out.
        processing_class (*optional*): A [`SegCompassProcessor`] or the VLM's own processor; loaded from where the
            model comes from when left out.
        sae ([`SegCompassSae`], *optional*): To go on from; a new one by `args` when left out.
        names (`Callable`, defaults to [`target_names`]): Row -> its names, for `args.pair_loss`.
        state_source ([`StateSource`], *optional*): Gives the states to train on in place of the VLM, which still
            answers where its words are measured (evaluation) and for `args.pair_loss`. Experimental.
        kwargs: Further arguments of [`~transformers.Trainer`], such as `callbacks`.
    """

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: SaeTrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        sae: SegCompassSae | None = None,
        names: Callable[[dict], list[Name]] = target_names,
        state_source: StateSource | None = None,
        **kwargs: Any,
    ):
        if "vlm" in kwargs:  # by the name that this trainer once gave it, when `model` was the SAE
            model, sae = kwargs.pop("vlm"), model
        if model is None or isinstance(model, SegCompassSae) or train_dataset is None:
            raise ValueError(
                "SaeTrainer needs the model whose states it reads (an SAE to go on from is `sae`) and train_dataset, "
                f"got {type(model).__name__} and {type(train_dataset).__name__}."
            )
        args = args if args is not None else SaeTrainingConfig(output_dir="sae")
        set_seed(args.seed)  # before new weights are drawn
        model = load_model(model, dtype="auto")  # it does not train
        processing_class = load_processor(processing_class, model)
        layer = choose_layer(model, sae, args)
        vlm = getattr(model, "vlm", model)
        if args.n_gpu > 1:  # torch's DataParallel would split what belongs to features among the devices
            logger.warning(
                f"{args.n_gpu} GPUs are visible to one process and one is used; start with accelerate launch."
            )
            args._n_gpu = 1
        if args.train_tokens is not None:
            args.max_steps = max(1, args.train_tokens // _step_tokens(args))
        self.is_new_sae = sae is None
        sae = sae if sae is not None else new_sae(vlm, layer, args)
        if args.resample_every is not None and sae.config.architecture != "standard":
            raise ValueError(
                f"resample_every is for architecture='standard', got an SAE of architecture "
                f"{sae.config.architecture!r}; leave it out."
            )
        sae.config.layer = layer
        self.unit_decoder = keeps_unit_rows(sae, args.decoder_norm, self.is_new_sae)
        self.means = MetricMeans()
        # Rows held out of the training set are an evaluation set too; Trainer, which cannot see them, asks for one.
        shown = train_dataset if eval_dataset is None and args.validation_share else eval_dataset
        super().__init__(model=sae, args=args, train_dataset=train_dataset, eval_dataset=shown, **kwargs)
        self.eval_dataset = eval_dataset
        self.vlm = frozen(vlm, args.device)
        log = UnreadableLog(self._unreadable_file(), "rows")
        encoder = RowEncoder(processing_class, args.max_length, args.unreadable_rows, log)
        lock = getattr(model, "call_lock", None)
        self.harvester = ActivationHarvester(self.vlm, encoder, layer, args.drop_first_token, lock, state_source)
        self._make_streams(train_dataset, eval_dataset)
        self.buffer: ActivationBuffer | None = None  # made when training begins
        self.pairs = self._pair_buffer(names) if args.pair_loss != "none" else None
        self.firing = FiringCounts(sae.config.d_sae, args.device)
        self.last_batch: dict[str, torch.Tensor] | None = None
        self.add_callback(SaeUpkeep(self))

    def _make_streams(self, train_dataset: Any, eval_dataset: Any) -> None:
        args = self.args
        shared = {"rank": args.process_index, "world_size": args.world_size}
        hold_out = args.hold_out_every if eval_dataset is None else None
        if hold_out is not None:
            hold_out = held_out_every(train_dataset, hold_out, args.world_size)
        seed = args.data_seed if args.data_seed is not None else args.seed
        train = RowStream(train_dataset, hold_out, seed=seed if args.shuffle_rows else None, **shared)
        self.source = HarvestedTokens(self.harvester, train, args.rows_per_batch)
        self.eval_stream = None
        if eval_dataset is not None:
            self.eval_stream = RowStream(eval_dataset, **shared)
        elif hold_out is not None:
            self.eval_stream = RowStream(train_dataset, hold_out, part="held_out", **shared)
        if self.eval_stream is not None:
            self._check_evaluation_rows()

    def _check_evaluation_rows(self) -> None:
        """Know before training, not after it, that there is something to evaluate on."""
        encoder, rows = self.harvester.encoder, itertools.islice(self.eval_stream.rows(0), self.args.max_eval_rows)
        usable = torch.tensor(int(any(encoder([row]) is not None for row in rows)), device=self.args.device)
        if not self.accelerator.reduce(usable, "sum"):
            raise ValueError(
                "none of the rows to evaluate on can be read; the reasons are in the warnings before. Repair them, "
                "give another eval_dataset, hold out more (validation_share), or set validation_share=0."
            )

    def _pair_buffer(self, names: Callable[[dict], list[Name]]) -> PairBuffer:
        args = self.args
        sizes = (args.pair_batch, args.pair_rows, args.rows_per_batch)
        return PairBuffer(self.harvester, self.source.stream, names, *sizes, seed=args.seed)

    # Data

    def get_train_dataloader(self) -> ActivationBuffer:
        """An endless iterator of batches of tokens, which knows its place."""
        args, source, batch_tokens = self.args, self.source, self._train_batch_size
        if args.cache_dir is not None:
            block_tokens = whole_batches(args.buffer_tokens, batch_tokens)
            source = CacheShare(self._filled_cache(), args.process_index, args.world_size, block_tokens)
        self.buffer = ActivationBuffer(source, batch_tokens, args.buffer_tokens, args.seed, args.process_index)
        return self.buffer

    def _filled_cache(self) -> ActivationCache:
        args, key = self.args, cache_key(self.source)
        cache = ActivationCache(args.cache_dir, key, args.cache_dtype, layers=args.cache_layers or ())
        cache.fill(self.source, self.model.config.d_in, args.cache_max_tokens)
        return cache

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Steps from the tokens of the epochs asked for, cached or estimated, where steps are not given."""
        if args.max_steps <= 0:
            tokens = self._estimated_tokens()
            args.max_steps = max(1, tokens // _step_tokens(args))
            logger.warning(f"training for {args.max_steps:,} steps, about {tokens:,} tokens in all.")
        return super().set_initial_training_values(args, dataloader)

    @property
    def passes(self) -> float:
        """Passes over the data up to the current block; whole ones where the length is unknown."""
        epoch, start = self.buffer.place
        source = self.buffer.source
        length = source.num_tokens if isinstance(source, CacheShare) else source.stream.rows_per_epoch
        return epoch + start / length if length else float(epoch)

    def _estimated_tokens(self) -> int:
        source = self.source if self.buffer is None else self.buffer.source
        tokens = source.num_tokens if isinstance(source, CacheShare) else estimate_tokens(source)
        if tokens is None:
            raise ValueError("the data set is a stream without a length; set max_steps or train_tokens.")
        return round(tokens * self.args.num_train_epochs)

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:  # whatever ended it: no thread goes on with the VLM
            if self.buffer is not None:
                self.buffer.close()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        dead = self.firing.dead(self.args.dead_after_tokens)
        states, modality_ids = inputs["hidden_states"], inputs["modality_ids"]
        output = model(states, modality_ids=modality_ids, dead_features=dead, output_feature_acts=False)
        sae = self.accelerator.unwrap_model(model)
        # The warm-up of the sparsity term takes part of it away again.
        loss = output.loss - (1 - self._l1_share()) * sae.config.l1_coefficient * output.sparsity_loss
        if self.pairs is not None:
            paired = pair_loss(sae, self.pairs.next_batch(), self.args.pair_loss, self.args.pair_k)
            loss = loss + self.args.pair_weight * paired
            self.means.add("pair_loss", paired.detach())
        self.firing.add_fired(output.fired, len(states), self.accelerator)
        self._report(sae, inputs, output)
        self.last_batch = inputs
        return (loss, output) if return_outputs else loss

    def _l1_share(self) -> float:
        steps = self.args.l1_warmup_ratio * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / steps) if steps > 1 else 1.0

    @torch.no_grad()
    def _report(self, sae: SegCompassSae, inputs: Any, output: Any) -> None:
        normalized, normalization = sae.normalize(inputs["hidden_states"], inputs["modality_ids"])
        variance = (normalized - normalized.mean(0)).pow(2).sum()
        self.means.add("unexplained_variance", output.mse_loss.detach() * len(normalized), variance)
        self.means.add("mse", output.mse_loss)
        self.means.add("l0", output.fired.sum(), len(normalized))
        if output.auxiliary_loss is not None:
            self.means.add("auxiliary_loss", output.auxiliary_loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds explained variance, L0, dead features and the histogram of firing densities to training logs.

        The histogram counts the tokens since the last one; in full it goes to `feature_density.json`.
        """
        if "loss" in logs:
            means = self.means.pop(self.accelerator.num_processes)
            logs["explained_variance"] = 1 - means.pop("unexplained_variance", float("nan"))
            logs |= means
            logs["dead_features"] = self.firing.dead(self.args.dead_after_tokens).double().mean().item()
            shares = density_shares(self.firing.fired, self.firing.tokens)
            logs |= {f"feature_density/{name}": share for name, share in shares.items()}
            if self.args.should_save:
                self._write_density()
            self.firing.restart()
        super().log(logs, *args, **kwargs)

    def _write_density(self) -> None:
        record = {"step": self.state.global_step} | density_histogram(self.firing.fired, self.firing.tokens)
        write_whole(os.path.join(self.args.output_dir, "feature_density.json"), json.dumps(record, indent=1))

    @torch.no_grad()
    def start_from_data(self) -> None:
        """Fit a new SAE to the first block or its beginning: a cache's, or what the first process has harvested."""
        sae, source = self.accelerator.unwrap_model(self.model), self.buffer.source
        block = (source.first if isinstance(source, CacheShare) else self.buffer.block)(START_TOKENS)
        states, modality_ids = block.states.to(self.args.device), block.modality_ids.long().to(self.args.device)
        start_from_data_(sae, states, modality_ids, self.args)
        self._share_weights(sae)

    @torch.no_grad()
    def resample(self) -> None:
        """Start dead features again, the same ones on every process."""
        sae = self.accelerator.unwrap_model(self.model)
        generator = torch.Generator().manual_seed(_mix(self.args.seed, self.state.global_step))
        dead = self.firing.dead(self.args.dead_after_tokens)
        # of all processes, in the order in which one process would have had them
        states, modality_ids = (self.accelerator.gather(self.last_batch[n]) for n in ("hidden_states", "modality_ids"))
        features = resample_dead_features_(sae, dead, states, modality_ids, self.optimizer, generator)
        self.firing.silent_tokens[features] = 0
        self.means.add("resampled_features", float(len(features)))
        self._share_weights(sae)

    def _share_weights(self, sae: SegCompassSae) -> None:
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for tensor in [*sae.parameters(), *sae.buffers()]:
                tensor.copy_(broadcast(tensor.detach().clone()))

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of [`SaeEvaluation`] over the held-out rows, over all processes.

        Args:
            eval_dataset (*optional*): Other rows.
            metric_key_prefix (`str`, defaults to `"eval"`): Before every name.
        """
        args, stream = self.args, self.eval_stream
        if eval_dataset is not None:
            stream = RowStream(eval_dataset, rank=args.process_index, world_size=args.world_size)
        if stream is None:
            raise ValueError("there are no rows to evaluate on: pass eval_dataset, or set validation_share above 0.")
        sae = self.accelerator.unwrap_model(self.model)
        was_training = sae.training
        sae.eval()
        evaluation = SaeEvaluation()
        rows = itertools.islice(stream.rows(0), args.max_eval_rows)
        while taken := list(itertools.islice(rows, args.per_device_eval_batch_size)):
            evaluate_rows(evaluation, sae, self.harvester, taken)
        sae.train(was_training)
        metrics = self._over_processes(evaluation).metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _over_processes(self, evaluation: SaeEvaluation) -> SaeEvaluation:
        if self.accelerator.num_processes == 1:
            return evaluation
        parts = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(parts, evaluation)
        whole = SaeEvaluation()
        for part in parts:
            whole.merge(part)
        return whole

    def reads_images(self) -> tuple[nn.Module, Any]:
        return self.vlm, self.harvester.encoder.processor

    # Resuming

    def loop_state(self) -> dict[str, Any]:
        return super().loop_state() | {
            "sae_means": self.means.sums,
            "sae_buffer": self.buffer.state_dict(),
            "sae_firing": self.firing.state_dict(),
            "sae_pairs": None if self.pairs is None else self.pairs.state_dict(),
            "sae_processes": self.args.world_size,
        }

    def load_loop_state(self, state: dict[str, Any]) -> None:
        super().load_loop_state(state)
        if state["sae_processes"] != self.args.world_size:
            raise ValueError(
                f"the checkpoint was written by {state['sae_processes']} processes and this run has "
                f"{self.args.world_size}; each reads rows of its own, so the number must be the same."
            )
        self.means.sums = state["sae_means"]
        self.buffer.load_state_dict(state["sae_buffer"])
        self.firing.load_state_dict(state["sae_firing"])
        if self.pairs is not None:
            self.pairs.load_state_dict(state["sae_pairs"])

    def floating_point_ops(self, inputs: Any) -> int:
        return 6 * inputs["hidden_states"].shape[0] * sum(p.numel() for p in self.model.parameters())


def _step_tokens(args: SaeTrainingConfig) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


__all__ = ["SaeTrainer"]
