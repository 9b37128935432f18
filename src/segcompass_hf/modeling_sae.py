# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sparse autoencoder: hidden states -> sparse feature activations (-> reconstruction, for its own training).

Parameter names and shapes are those of SAELens, so its weights load as they are.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_segcompass import SegCompassSaeConfig
from .sae_activations_segcompass import JumpRelu, Step, keep_top_k, smallest_kept
from .sparse_features_segcompass import SPARSE_FROM, FeaturePattern, decode_active, encode_active, largest_of_rows
from .weight_files_segcompass import check_nothing_left, check_weight_files

BATCHTOPK_THRESHOLD_MOMENTUM = 0.99  # of the running threshold that replaces batch top-k outside training
AUXILIARY_COEFFICIENT = 1 / 32  # of the dead features' loss, as in Gao et al. 2024
LAYER_NORM_EPS = 1e-5


@dataclass
class SegCompassSaeOutput(ModelOutput):
    """Output of [`SegCompassSae`].

    Args:
        loss (`torch.Tensor` of shape `()`): `mse_loss + l1_coefficient * sparsity_loss` (+ `auxiliary_loss`, for
            top-k times 1/32).
        reconstruction (`torch.Tensor` of shape `(..., d_in)`): In the space of the input; zero where masked.
        feature_acts (`torch.Tensor` of shape `(..., d_sae)`, *optional*): Feature activations; zero where masked.
        fired (`torch.LongTensor` of shape `(d_sae,)`): Unmasked tokens on which each feature is active.
        mse_loss (`torch.Tensor` of shape `()`): Squared error summed over `d_in`, mean over the tokens, measured
            after the input normalisation.
        sparsity_loss (`torch.Tensor` of shape `()`): Mean over the tokens of the decoder-weighted L1 norm (standard,
            gated) or of the number of active features (JumpReLU); 0 for top-k, which needs none.
        auxiliary_loss (`torch.Tensor` of shape `()`, *optional*): Gated: squared error of the gate's own
            reconstruction. Top-k and batch top-k with `dead_features`: squared error with which dead features rebuild
            what the living ones miss.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    feature_acts: torch.Tensor | None = None
    fired: torch.Tensor | None = None
    mse_loss: torch.Tensor | None = None
    sparsity_loss: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None


class SaeNormalization(NamedTuple):
    """How hidden states were normalised: `(hidden_states - shift) * scale`; `None` stands for no shift, no scale."""

    shift: torch.Tensor | None = None  # (..., d_in) or (..., 1)
    scale: torch.Tensor | None = None  # (..., 1)

    def undo(self, normalized: torch.Tensor) -> torch.Tensor:
        """Bring states `(..., d_in)` back to the space of the VLM."""
        hidden_states = self.undo_direction(normalized)
        return hidden_states if self.shift is None else hidden_states + self.shift

    def undo_direction(self, direction: torch.Tensor) -> torch.Tensor:
        """Bring a difference of states `(..., d_in)` back to the space of the VLM: scaled but not shifted."""
        return direction if self.scale is None else direction / self.scale


class SegCompassSae(PreTrainedModel):
    """Sparse autoencoder over the hidden states of a VLM: `h = act(x W_enc + b_enc)`, `x' = h W_dec + b_dec`.

    `x` is the normalised hidden state (`config.normalize_activations`), less `b_dec` with
    `config.apply_b_dec_to_input`. Architectures (`config.architecture`):

    - `standard`: `act` is ReLU (the paper's), tanh(ReLU) or top-k.
    - `gated`: `H(x W_enc + b_gate) * ReLU(exp(r_mag) * x W_enc + b_mag)` (arXiv 2404.16014).
    - `jumprelu`: `ReLU(z) * H(z - threshold)`, one threshold per feature (arXiv 2407.14435).
    - `topk`: the `k` largest pre-activations of each token, then ReLU (arXiv 2406.04093).
    - `batchtopk`: the `k * tokens` largest of a training batch; elsewhere those with `z >= topk_threshold`, the
      running mean of the smallest value kept, so that a token's features never depend on its batch (arXiv 2412.06410).

    Example:

    ```python
    >>> sae = SegCompassSae(SegCompassSaeConfig(d_in=16, d_sae=64))
    >>> feature_acts = sae.encode(torch.randn(2, 5, 16))  # (2, 5, 64)
    >>> reconstruction = sae.decode(feature_acts)  # (2, 5, 16)
    ```
    """

    config_class = SegCompassSaeConfig
    base_model_prefix = "sae"
    main_input_name = "hidden_states"
    # Without attention it has no say in how a model that holds it computes it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    smallest_kept = staticmethod(smallest_kept)  # of a batch; a trainer of several processes looks at all of theirs

    def __init__(self, config: SegCompassSaeConfig):
        super().__init__(config)
        d_in, d_sae = config.d_in, config.d_sae
        self.W_enc = nn.Parameter(torch.empty(d_in, d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if config.architecture == "gated":
            self.b_gate = nn.Parameter(torch.zeros(d_sae))
            self.r_mag = nn.Parameter(torch.zeros(d_sae))
            self.b_mag = nn.Parameter(torch.zeros(d_sae))
        else:
            self.b_enc = nn.Parameter(torch.zeros(d_sae))
        if config.architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.empty(d_sae))
        if config.architecture == "batchtopk":
            self.register_buffer("topk_threshold", torch.zeros(()))
        if config.finetuning_scaling_factor:
            self.finetuning_scaling_factor = nn.Parameter(torch.ones(d_sae))
        if config.normalize_activations == "per_modality":
            self.register_buffer("modality_mean", torch.zeros(2, d_in))  # rows: text, image
            self.register_buffer("modality_scale", torch.ones(2))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, SegCompassSae):
            return
        init.normal_(module.W_dec, mean=0.0, std=self.config.initializer_range)
        init.copy_(module.W_enc, module.W_dec.T)  # a feature starts by writing what it reads
        for name in ("b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "topk_threshold", "modality_mean"):
            if getattr(module, name, None) is not None:
                init.zeros_(getattr(module, name))
        for name in ("finetuning_scaling_factor", "modality_scale"):
            if getattr(module, name, None) is not None:
                init.ones_(getattr(module, name))
        if getattr(module, "threshold", None) is not None:
            init.constant_(module.threshold, 0.01)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load an SAE; see `PreTrainedModel.from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: Files are missing or pointers of git, or hold weights that the configuration
                has no place for (a scaling of features, a threshold): the features would be others.
        """
        check_weight_files(pretrained_model_name_or_path, kwargs.get("subfolder"))
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if kwargs.get("state_dict") is None:
            check_nothing_left(model, info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    @property
    def takes_top_k(self) -> bool:
        """Whether features compete for `config.k` places."""
        config = self.config
        return config.architecture in ("topk", "batchtopk") or (
            config.architecture == "standard" and config.activation == "topk"
        )

    @property
    def decoder_directions(self) -> torch.Tensor:
        """What each feature writes, as unit vectors of shape `(d_sae, d_in)` in the normalised space."""
        return F.normalize(self.W_dec, dim=-1)

    def normalize(
        self, hidden_states: torch.Tensor, modality_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, SaeNormalization]:
        """Normalise hidden states as `config.normalize_activations` says.

        `layer_norm` subtracts the mean and divides by the standard deviation of each token; `constant_norm_rescale`
        (SAELens' name) and `per_token` both set each token's norm to `sqrt(d_in)`; `per_modality` subtracts a fixed
        mean and multiplies by a fixed scale, one of each for text and for image tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., d_in)`): Hidden states of the VLM.
            modality_ids (`torch.LongTensor` of shape `(...)`, *optional*): 0 text, 1 image; for `per_modality`.

        Returns:
            `tuple[torch.Tensor, SaeNormalization]`: Normalised states `(..., d_in)`, in the dtype of the weights, and
            how to undo it.

        Raises:
            ValueError: The width is not `d_in`, or `per_modality` without `modality_ids`.
        """
        mode = self.config.normalize_activations
        if hidden_states.shape[-1] != self.config.d_in:
            raise ValueError(
                f"hidden states are {hidden_states.shape[-1]} wide but the SAE reads d_in={self.config.d_in}; "
                "use an SAE trained on this VLM."
            )
        hidden_states = hidden_states.to(self.W_enc.dtype)
        if mode == "none":
            return hidden_states, SaeNormalization()
        if mode == "layer_norm":
            shift = hidden_states.mean(dim=-1, keepdim=True)  # (..., 1)
            scale = 1 / (hidden_states.std(dim=-1, keepdim=True) + LAYER_NORM_EPS)  # (..., 1)
        elif mode == "per_modality":
            if modality_ids is None:
                raise ValueError(
                    'an SAE with normalize_activations="per_modality" needs modality_ids of shape '
                    f"{tuple(hidden_states.shape[:-1])} (0 text, 1 image), got None."
                )
            shift = self.modality_mean[modality_ids]  # (..., d_in)
            scale = self.modality_scale[modality_ids].unsqueeze(-1)  # (..., 1)
        else:
            shift = None
            norm = hidden_states.float().norm(dim=-1, keepdim=True)  # (..., 1), float16 would overflow
            # A zero state stays zero instead of turning into NaN.
            scale = (self.config.d_in**0.5 / norm.clamp_min(1e-12)).to(hidden_states.dtype)
        centred = hidden_states if shift is None else hidden_states - shift
        return centred * scale, SaeNormalization(shift, scale)

    def encode(self, hidden_states: torch.Tensor, modality_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Feature activations by the inference rule, token by token.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., d_in)`): Hidden states of the VLM.
            modality_ids (`torch.LongTensor` of shape `(...)`, *optional*): 0 text, 1 image; for `per_modality`.

        Returns:
            `torch.Tensor` of shape `(..., d_sae)`: `feature_acts`, 0 or more.
        """
        normalized, _ = self.normalize(hidden_states, modality_ids)
        return self._activate(self._project(normalized))

    def decode(self, feature_acts: torch.Tensor, normalization: SaeNormalization | None = None) -> torch.Tensor:
        """Reconstruct hidden states.

        Args:
            feature_acts (`torch.Tensor` of shape `(..., d_sae)`): Feature activations.
            normalization (`SaeNormalization`, *optional*): From [`~SegCompassSae.normalize`]; undone when given.

        Returns:
            `torch.Tensor` of shape `(..., d_in)`: In the space of the VLM when `normalization` is given, else in the
            normalised space.
        """
        if self.config.finetuning_scaling_factor:
            feature_acts = feature_acts * self.finetuning_scaling_factor
        reconstruction = F.linear(feature_acts, self.W_dec.T, self.b_dec)  # (..., d_in)
        return reconstruction if normalization is None else normalization.undo(reconstruction)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
        dead_features: torch.Tensor | None = None,
        output_feature_acts: bool = True,
    ) -> SegCompassSaeOutput:
        """Reconstruct hidden states and compute the SAE's training loss over the unmasked tokens.

        For `standard` it is the paper's: `||x - x'||^2 + l1_coefficient * sum_j h_j ||W_dec,j||`, averaged. For top-k
        and batch top-k, which give no gradient to features that never are among the largest, `dead_features` adds the
        auxiliary loss of Gao et al. 2024 (arXiv 2406.04093, appendix A.2): the `d_in / 2` largest dead features of
        each token rebuild the error `x - x'`.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., d_in)`): Hidden states of the VLM.
            attention_mask (`torch.Tensor` of shape `(...)`, *optional*): 1 for tokens that count; the others are never
                encoded.
            modality_ids (`torch.LongTensor` of shape `(...)`, *optional*): 0 text, 1 image; for `per_modality`.
            dead_features (`torch.BoolTensor` of shape `(d_sae,)`, *optional*): Features that have not fired for long;
                read by the top-k architectures only.
            output_feature_acts (`bool`, defaults to `True`): Without, `feature_acts` may be `None`: where the largest
                of many features are active, each token's few are then all that is computed with.

        Raises:
            ValueError: No token counts.
        """
        leading = hidden_states.shape[:-1]
        keep = torch.ones(leading, dtype=torch.bool, device=hidden_states.device)
        if attention_mask is not None:
            keep = attention_mask.bool()
        if not keep.any():
            raise ValueError(f"attention_mask of shape {tuple(leading)} keeps no token; at least one must be 1.")
        normalized, normalization = self.normalize(
            hidden_states[keep], None if modality_ids is None else modality_ids[keep]
        )  # (tokens, d_in)
        pre_activations, feature_acts = None, None
        if self.computes_with_few(normalized.device.type) and not normalized.requires_grad:
            pattern, values = self._active(normalized)
            reconstruction = self._decode_active(values, pattern)  # (tokens, d_in), normalised space
            fired = torch.bincount(pattern.features, minlength=self.config.d_sae)
            sparsity_loss, auxiliary_loss = reconstruction.new_zeros(()), None
            if output_feature_acts:
                places = pattern.tokens, pattern.features
                feature_acts = values.new_zeros(len(normalized), self.config.d_sae).index_put(places, values)
        else:
            pre_activations = self._project(normalized)  # (tokens, d_sae)
            feature_acts = self._activate(pre_activations, of_batch=self.training)
            reconstruction = self.decode(feature_acts)
            fired = (feature_acts > 0).sum(0)
            sparsity_loss, auxiliary_loss = self._penalties(pre_activations, feature_acts, normalized)
        mse_loss = (reconstruction - normalized).pow(2).sum(-1).mean()
        loss = mse_loss + self.config.l1_coefficient * sparsity_loss
        if auxiliary_loss is not None:
            loss = loss + auxiliary_loss
        elif self.takes_top_k and dead_features is not None:
            error = normalized - reconstruction
            auxiliary_loss = self._dead_feature_loss(normalized, pre_activations, error, dead_features)
            loss = loss + AUXILIARY_COEFFICIENT * auxiliary_loss
        return SegCompassSaeOutput(
            loss=loss,
            reconstruction=_scatter(normalization.undo(reconstruction), keep),
            feature_acts=None if feature_acts is None else _scatter(feature_acts, keep),
            fired=fired,
            mse_loss=mse_loss,
            sparsity_loss=sparsity_loss,
            auxiliary_loss=auxiliary_loss,
        )

    @torch.no_grad()
    def fold_decoder_norms_(self) -> "SegCompassSae":
        """Give every decoder row unit norm without changing any reconstruction, in place.

        Activations are multiplied by what the rows lose, so that `concept_threshold` compares like with like.

        Raises:
            ValueError: The activation is not positively homogeneous (tanh) or ranks features (top-k), so that the
                features would change.
        """
        architecture, activation = self.config.architecture, self.config.activation
        if self.takes_top_k or (architecture == "standard" and activation != "relu"):
            raise ValueError(
                f"decoder norms of architecture={architecture!r} with activation={activation!r} cannot be folded "
                "without changing its features; only standard with relu, gated and jumprelu can."
            )
        norm = self.W_dec.norm(dim=-1)  # (d_sae,)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.W_dec.div_(norm[:, None])
        self.W_enc.mul_(norm)
        for name in ("b_enc", "b_gate", "b_mag", "threshold"):
            if getattr(self, name, None) is not None:
                getattr(self, name).mul_(norm)
        return self

    @torch.no_grad()
    def fit_modality_statistics_(self, hidden_states: torch.Tensor, modality_ids: torch.Tensor) -> "SegCompassSae":
        """Set the `per_modality` mean and scale from a sample, in place: the mean norm becomes `sqrt(d_in)`.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., d_in)`): Unmasked hidden states.
            modality_ids (`torch.LongTensor` of shape `(...)`): 0 text, 1 image. A modality without tokens keeps its
                statistics.
        """
        if self.config.normalize_activations != "per_modality":
            raise ValueError(
                'modality statistics belong to normalize_activations="per_modality", this SAE has '
                f"{self.config.normalize_activations!r}."
            )
        for modality in modality_ids.unique().tolist():
            states = hidden_states[modality_ids == modality].float()  # (tokens, d_in)
            mean = states.mean(0)
            norm = (states - mean).norm(dim=-1).mean()
            self.modality_mean[modality] = mean
            self.modality_scale[modality] = self.config.d_in**0.5 / norm.clamp_min(1e-12)
        return self

    def _centred(self, normalized: torch.Tensor) -> torch.Tensor:
        """What the encoder multiplies: the states `(..., d_in)`, less `b_dec` where the configuration says so."""
        return normalized - self.b_dec if self.config.apply_b_dec_to_input else normalized

    def _project(self, normalized: torch.Tensor) -> torch.Tensor:
        """Pre-activations `(..., d_sae)`; for `gated` without a bias, since gate and magnitude have their own."""
        return F.linear(self._centred(normalized), self.W_enc.T, getattr(self, "b_enc", None))

    def _activate(self, pre_activations: torch.Tensor, of_batch: bool = False) -> torch.Tensor:
        """Feature activations `(..., d_sae)` by the inference rule; with `of_batch` batch top-k's are its batch's."""
        architecture, activation = self.config.architecture, self.config.activation
        if architecture == "gated":
            magnitude = F.relu(pre_activations * self.r_mag.exp() + self.b_mag)
            return magnitude * (pre_activations + self.b_gate > 0)
        if architecture == "jumprelu":
            return JumpRelu.apply(pre_activations, self.threshold)
        if architecture == "batchtopk":
            return F.relu(pre_activations) * (pre_activations >= self._least(pre_activations, of_batch))
        if architecture == "topk" or activation == "topk":
            return keep_top_k(pre_activations, self.config.k)
        feature_acts = F.relu(pre_activations)
        return feature_acts.tanh() if activation == "tanh-relu" else feature_acts

    @torch.no_grad()
    def _least(self, pre_activations: torch.Tensor, of_batch: bool) -> torch.Tensor:
        """Batch top-k: the least pre-activation that counts, `()`; of a batch that of its `k * tokens` largest.

        `topk_threshold` follows the batches.
        """
        if not of_batch:
            return self.topk_threshold
        smallest = self.smallest_kept(
            pre_activations.flatten(), self.config.k * len(pre_activations), self.topk_threshold
        )
        momentum = BATCHTOPK_THRESHOLD_MOMENTUM if self.topk_threshold > 0 else 0.0
        followed = smallest.to(self.topk_threshold.dtype).where(smallest.isfinite(), self.topk_threshold)
        self.topk_threshold.lerp_(followed, 1 - momentum)
        return smallest

    def computes_with_few(self, device_type: str) -> bool:
        """Whether a pass computes with the active features alone: faster than with all, where they are few enough."""
        return self.takes_top_k and self.config.d_sae >= self.config.k * SPARSE_FROM.get(device_type, torch.inf)

    def _active(self, normalized: torch.Tensor) -> tuple[FeaturePattern, torch.Tensor]:
        """Which features are active on which tokens, and their activations `(active,)`."""
        with torch.no_grad():
            if self.config.architecture == "batchtopk":
                pre_activations = self._project(normalized)
                active = (pre_activations >= self._least(pre_activations, self.training)) & (pre_activations > 0)
                pattern = FeaturePattern.of(active)
                found = pre_activations[pattern.tokens, pattern.features]
            else:
                values, features = largest_of_rows(self._project, normalized, self.config.k, self.config.d_sae)
                tokens, places = (values > 0).nonzero(as_tuple=True)
                pattern = FeaturePattern.sorted_by_token(
                    tokens, features[tokens, places], len(values), self.config.d_sae
                )
                found = values[tokens, places]
        return pattern, self._encode_active(found, normalized, pattern)

    def _encode_active(self, found: torch.Tensor, normalized: torch.Tensor, pattern: FeaturePattern) -> torch.Tensor:
        """Pre-activations `(active,)` of a pattern, found before, with their gradient in the encoder."""
        shift = self.b_dec if self.config.apply_b_dec_to_input else None
        return encode_active(found, self._centred(normalized).detach(), self.W_enc, self.b_enc, shift, pattern)

    def _decode_active(self, values: torch.Tensor, pattern: FeaturePattern) -> torch.Tensor:
        """The same as `decode` of the dense activations: `(tokens, d_in)`."""
        if self.config.finetuning_scaling_factor:
            values = values * self.finetuning_scaling_factor[pattern.features]
        return decode_active(values, self.W_dec, pattern) + self.b_dec

    def _penalties(
        self, pre_activations: torch.Tensor, feature_acts: torch.Tensor, normalized: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sparsity and auxiliary losses of the architecture, both `()`."""
        architecture = self.config.architecture
        if self.takes_top_k:
            return feature_acts.new_zeros(()), None
        if architecture == "jumprelu":
            return Step.apply(pre_activations, self.threshold).sum(-1).mean(), None
        decoder_norm = self.W_dec.norm(dim=-1)  # (d_sae,)
        if architecture == "standard":
            return (feature_acts * decoder_norm).sum(-1).mean(), None
        gate = F.relu(pre_activations + self.b_gate)  # (tokens, d_sae)
        # Through a frozen copy of the decoder, which would else learn to make up for the gate's shrunken values.
        reconstruction = F.linear(gate, self.W_dec.detach().T, self.b_dec.detach())
        return (gate * decoder_norm).sum(-1).mean(), (reconstruction - normalized).pow(2).sum(-1).mean()

    def _dead_feature_loss(
        self,
        normalized: torch.Tensor,
        pre_activations: torch.Tensor | None,
        error: torch.Tensor,
        dead_features: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error, `()`, with which the largest dead features of each token rebuild `error` `(tokens, d_in)`."""
        dead = dead_features.nonzero().squeeze(1)  # (num_dead,)
        if dead.numel() == 0:
            return error.new_zeros(())
        if pre_activations is None:
            of_dead = F.linear(self._centred(normalized), self.W_enc[:, dead].T, self.b_enc[dead])
        else:
            of_dead = pre_activations[:, dead]  # (tokens, num_dead)
        feature_acts = keep_top_k(of_dead, min(dead.numel(), max(1, self.config.d_in // 2)))
        rebuilt = feature_acts @ self.W_dec[dead]  # (tokens, d_in), without bias: an error has no mean to add
        return (rebuilt - error.detach()).pow(2).sum(-1).mean()


def _scatter(rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Put rows `(tokens, d)` back where `keep` `(...)` is true, zeros elsewhere: `(..., d)`."""
    if keep.all():
        return rows.view(*keep.shape, rows.shape[-1])
    return rows.new_zeros(*keep.shape, rows.shape[-1]).index_put((keep,), rows)


SegCompassSae.register_for_auto_class("AutoModel")

__all__ = ["SaeNormalization", "SegCompassSae", "SegCompassSaeOutput"]
