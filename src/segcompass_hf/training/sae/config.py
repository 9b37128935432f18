"""Settings of SAE pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from ..loop.resume import RobustTrainingArguments


@dataclass
class SaeTrainingConfig(RobustTrainingArguments, TrainingArguments):
    r"""Settings of [`SaeTrainer`]: those of [`~transformers.TrainingArguments`], and its own.

    Defaults are the paper's. `per_device_train_batch_size` counts tokens, `per_device_eval_batch_size` rows. Training
    ends after `train_tokens` tokens of all processes together, or after `max_steps`; where neither is set, after
    `num_train_epochs` passes, their tokens estimated from the first rows.

    Args:
        architecture (`str`, defaults to `"standard"`): `standard` (ReLU, the paper's), `gated`, `jumprelu`, `topk` or
            `batchtopk`. This and the next five describe the SAE that the trainer makes when it is given none.
        d_sae (`int`, defaults to 65536): Features.
        k (`int`, *optional*): Active features per token of `topk` and `batchtopk`; 32 when left out. Of `jumprelu` the
            number at which its thresholds start; they start at 0.01 when left out, and then need long to rise.
        normalize_activations (`str`, defaults to `"none"`): See [`SegCompassSaeConfig`]. Where image and text tokens
            differ much in norm, `"per_token"` is needed, or text is not learned.
        apply_b_dec_to_input (`bool`, defaults to `False`): Subtract `b_dec` before encoding.
        sae_layer (`int`, *optional*): Index into the VLM's `hidden_states`; when left out the SAE's own, the
            SegCompass model's, the paper's for LLaVA-1.5 (16) and Qwen2.5-VL (13), else half the depth.
        l1_coefficient (`float`, defaults to 5.0): Weight of the sparsity term; no use to `topk` and `batchtopk`.
        l1_warmup_ratio (`float`, defaults to 0.0): First share of the steps over which that weight grows from 0.
        decoder_norm (`str`, defaults to `"auto"`): `"unit"` keeps every decoder row at norm 1, `"free"` lets it be;
            `"auto"` is free for `standard`, whose loss weighs activations by it, and unit for the others. The norms of
            a given SAE move into its encoder first; a given top-k one, whose features would change, is free by
            `"auto"` unless its rows have norm 1.
        initial_b_dec (`str`, defaults to `"mean"`): A new SAE's `b_dec`: the mean of the first block, or `"zeros"`.
        dead_after_tokens (`int`, defaults to 1000000): Tokens without firing before a feature counts as dead.
        resample_every (`int`, *optional*): Steps between resamplings of dead features (`standard` only): they take the
            direction of badly rebuilt states. `topk` and `batchtopk` have an auxiliary loss for theirs.
        resample_until (`float`, defaults to 0.6): Share of the steps after which none is resampled any more.
        pair_loss (`str`, defaults to `"none"`): Makes words and the patches of what they name share features, see
            `training.sae.pair_losses`: `"shared_topk"` or `"contrastive"`. Needs rows in the row schema with masks.
        pair_weight (`float`, defaults to 1.0): Of that loss.
        pair_k (`int`, defaults to 8): Features that a word and its patch have in common at most (`shared_topk`).
        pair_batch (`int`, defaults to 512): Pairs of a step.
        pair_rows (`int`, defaults to 256): Rows whose pairs are in memory; every 64 steps they are replaced by the
            next, which costs their pass through the VLM.
        train_tokens (`int`, *optional*): Tokens to train on.
        buffer_tokens (`int`, defaults to 262144): Tokens mixed in memory, per process: times `d_in` times the bytes of
            the VLM's dtype, or of the cache's (2 GiB for 4,096 in bfloat16).
        rows_per_batch (`int`, defaults to 8): Rows of one pass through the VLM.
        max_length (`int`, *optional*): Tokens of a row at most, see [`RowEncoder`].
        shuffle_rows (`bool`, defaults to `True`): Shuffle a map-style data set in every epoch.
        drop_first_token (`bool`, defaults to `True`): Leave every row's first token out, an attention sink of outlying
            norm. The first tokens then keep their own state where reconstructions are spliced in.
        validation_share (`float`, defaults to 0.05): Every `1 / share`-th row is held out when there is no evaluation
            set; 0 for none. Rows of one image may fall on both sides.
        max_eval_rows (`int`, *optional*, defaults to 256): Rows of an evaluation at most, per process.
        cache_dir (`str`, *optional*): Keep one pass's activations there, in a folder or behind a URL that fsspec
            writes, and train on them. The same SAE comes of any number of processes that divides batch and buffer.
        cache_dtype (`str`, defaults to `"bfloat16"`): `bfloat16`, `float16` or `float32`.
        cache_max_tokens (`int`, *optional*): Tokens to cache, of all processes, to the end of a shard; needed for a
            stream without a length.
        cache_layers (`list[int]`, *optional*): Layers whose states a new cache keeps out of the same passes, so that
            runs with another `sae_layer` find theirs; the trained layer is one of them in any case.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "AdamW's."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 the share of them."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Down to a tenth, see kwargs."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Of the schedule; min_lr_rate 0.1 for the default one."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    per_device_train_batch_size: int = field(default=4096, metadata={"help": "Tokens of a batch."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Rows of an evaluation pass."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})

    architecture: Literal["standard", "gated", "jumprelu", "topk", "batchtopk"] = field(
        default="standard", metadata={"help": "Of a new SAE."}
    )
    d_sae: int = field(default=65_536, metadata={"help": "Features of a new SAE."})
    k: int | None = field(default=None, metadata={"help": "Active features per token (jumprelu: at the start)."})
    normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale", "per_token", "per_modality"] = field(
        default="none", metadata={"help": "What is done to a state before encoding."}
    )
    apply_b_dec_to_input: bool = field(default=False, metadata={"help": "Subtract b_dec before encoding."})
    sae_layer: int | None = field(default=None, metadata={"help": "Index into hidden_states, 0 = embeddings."})
    l1_coefficient: float = field(default=5.0, metadata={"help": "Weight of the sparsity term."})
    l1_warmup_ratio: float = field(default=0.0, metadata={"help": "Share of the steps over which it grows."})
    decoder_norm: Literal["auto", "free", "unit"] = field(default="auto", metadata={"help": "Of the decoder's rows."})
    initial_b_dec: Literal["mean", "zeros"] = field(default="mean", metadata={"help": "A new SAE's decoder bias."})
    dead_after_tokens: int = field(default=1_000_000, metadata={"help": "Tokens without firing that make it dead."})
    resample_every: int | None = field(default=None, metadata={"help": "Steps between resamplings (standard only)."})
    resample_until: float = field(default=0.6, metadata={"help": "Share of the steps after which there is none."})

    pair_loss: Literal["none", "shared_topk", "contrastive"] = field(
        default="none", metadata={"help": "Makes words and patches share features."}
    )
    pair_weight: float = field(default=1.0, metadata={"help": "Of that loss."})
    pair_k: int = field(default=8, metadata={"help": "Features that word and patch have in common at most."})
    pair_batch: int = field(default=512, metadata={"help": "Pairs of a step."})
    pair_rows: int = field(default=256, metadata={"help": "Rows whose pairs are in memory."})

    train_tokens: int | None = field(default=None, metadata={"help": "Tokens to train on, of all processes."})
    buffer_tokens: int = field(default=262_144, metadata={"help": "Tokens mixed in memory, per process."})
    rows_per_batch: int = field(default=8, metadata={"help": "Rows of one pass through the VLM."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a row at most."})
    shuffle_rows: bool = field(default=True, metadata={"help": "Shuffle the rows of a map-style data set."})
    drop_first_token: bool = field(default=True, metadata={"help": "Leave the attention sink out."})
    validation_share: float = field(default=0.05, metadata={"help": "Rows held out when there is no evaluation set."})
    max_eval_rows: int | None = field(default=256, metadata={"help": "Rows of an evaluation at most, per process."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder or URL of cached activations."})
    cache_dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Of the cached activations."}
    )
    cache_max_tokens: int | None = field(default=None, metadata={"help": "Tokens to cache, of all processes."})
    cache_layers: list[int] | None = field(default=None, metadata={"help": "Layers that a new cache keeps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        # The stream of tokens goes to its place by itself; skipping batches would harvest all of them again.
        self.ignore_data_skip = True
        for name in ("validation_share", "l1_warmup_ratio", "resample_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        if self.validation_share > 0.5:
            raise ValueError(
                f"validation_share={self.validation_share} holds out more than it trains on; at most 0.5."
            )
        counts = ("buffer_tokens", "rows_per_batch", "dead_after_tokens", "resample_every", "train_tokens")
        for name in (*counts, "pair_k", "pair_batch", "pair_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.resample_every is not None and self.architecture != "standard":
            raise ValueError(
                f"resample_every is for architecture='standard', got {self.architecture!r}; leave it out."
            )
        if self.train_tokens is not None and self.max_steps > 0:
            raise ValueError(f"set train_tokens ({self.train_tokens}) or max_steps ({self.max_steps}), not both.")

    @property
    def hold_out_every(self) -> int | None:
        """Every so manieth row is held out."""
        return round(1 / self.validation_share) if self.validation_share else None


__all__ = ["SaeTrainingConfig"]
