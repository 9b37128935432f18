"""Where SAE training starts from: a frozen VLM, the layer to read, and a new SAE."""

from __future__ import annotations

import torch
from torch import nn

from ...configuration_segcompass import SegCompassSaeConfig, default_sae_layer
from ...modeling_sae import SegCompassSae
from .config import SaeTrainingConfig

DEFAULT_K = 32  # active features per token of a new top-k SAE
THRESHOLD_TOKENS, THRESHOLD_FEATURES = 8192, 2048  # sample and chunk when thresholds are fitted: 64 MiB in float32
MIN_THRESHOLD = 0.01


def new_sae(vlm: nn.Module, layer: int, args: SaeTrainingConfig) -> SegCompassSae:
    """A [`SegCompassSae`] for a VLM's layer, as the settings describe it."""
    takes_top_k = args.architecture in ("topk", "batchtopk")
    config = SegCompassSaeConfig(
        d_in=vlm.config.get_text_config().hidden_size,
        d_sae=args.d_sae,
        architecture=args.architecture,
        k=(args.k or DEFAULT_K) if takes_top_k else None,
        normalize_activations=args.normalize_activations,
        apply_b_dec_to_input=args.apply_b_dec_to_input,
        layer=layer,
        l1_coefficient=args.l1_coefficient,
    )
    sae = SegCompassSae(config)
    # Where nothing limits them, so many features are active at first that their sum is far longer than the state.
    is_limited = takes_top_k or (args.architecture == "jumprelu" and args.k is not None)
    spread_directions_(sae, args.seed, encoder_norm=1.0 if is_limited else min(1.0, 2 * config.d_in / config.d_sae))
    return sae


def choose_layer(vlm: nn.Module, sae: SegCompassSae | None, args: SaeTrainingConfig) -> int:
    """The layer to read, from the settings, the SAE, the SegCompass model or the VLM's family, in this order."""
    own = None if sae is None else sae.config.layer
    if own is not None and args.sae_layer is not None and own != args.sae_layer:
        raise ValueError(f"the SAE was trained on layer {own} and sae_layer is {args.sae_layer}; leave sae_layer out.")
    candidates = (args.sae_layer, own, getattr(vlm.config, "sae_layer", None))
    config = getattr(vlm, "vlm", vlm).config
    layer = next((layer for layer in candidates if layer is not None), None)
    layer = default_sae_layer(config) if layer is None else layer
    depth = config.get_text_config().num_hidden_layers
    if not 0 <= layer <= depth:
        raise ValueError(f"sae_layer is an index into hidden_states, 0 to {depth} for this VLM, got {layer}.")
    return layer


def frozen(vlm: nn.Module, device: torch.device) -> nn.Module:
    """The VLM in eval mode, without gradients, on a device (unless it has been placed or quantised when loaded)."""
    is_placed = getattr(vlm, "hf_device_map", None) or getattr(vlm, "is_quantized", False)
    vlm = vlm if is_placed else vlm.to(device)
    return vlm.eval().requires_grad_(False)


@torch.no_grad()
def start_from_data_(
    sae: SegCompassSae, states: torch.Tensor, modality_ids: torch.Tensor, args: SaeTrainingConfig
) -> None:
    """Fit a new SAE to a sample: statistics of `per_modality`, `b_dec` as the mean, JumpReLU's thresholds by `k`.

    Args:
        states (`torch.Tensor` of shape `(tokens, d_in)`): A sample.
        modality_ids (`torch.Tensor` of shape `(tokens,)`): 0 text, 1 image.
        args ([`SaeTrainingConfig`]): `initial_b_dec` and `k` are read.
    """
    if sae.config.normalize_activations == "per_modality":
        sae.fit_modality_statistics_(states, modality_ids)
    if args.initial_b_dec == "mean":
        total, chunk = 0.0, 4096
        for part, modalities in zip(states.split(chunk), modality_ids.split(chunk), strict=True):
            total = total + sae.normalize(part, modalities)[0].double().sum(0)
        sae.b_dec.copy_(total / len(states))
    if sae.config.architecture == "jumprelu" and args.k is not None:
        normalized, _ = sae.normalize(states[:THRESHOLD_TOKENS], modality_ids[:THRESHOLD_TOKENS])
        fit_thresholds_(sae, normalized, args.k)


@torch.no_grad()
def fit_thresholds_(sae: SegCompassSae, normalized: torch.Tensor, k: int) -> None:
    """Set every threshold so that its feature fires on a share `k / d_sae` of the tokens, and `k` features per token.

    Thresholds get a gradient only from activations close to them and move by little more than the learning rate a
    step: from their fixed start of 0.01 a short training does not bring them to where features are sparse.

    Args:
        normalized (`torch.Tensor` of shape `(tokens, d_in)`): A sample, normalised.
    """
    firing = max(1, round(len(normalized) * k / sae.config.d_sae))
    if sae.config.apply_b_dec_to_input:
        normalized = normalized - sae.b_dec
    for features in torch.arange(sae.config.d_sae, device=normalized.device).split(THRESHOLD_FEATURES):
        pre_activations = normalized @ sae.W_enc[:, features] + sae.b_enc[features]  # (tokens, features)
        largest = pre_activations.topk(min(firing + 1, len(normalized)), dim=0).values
        sae.threshold[features] = largest[-1].clamp_min(MIN_THRESHOLD)


@torch.no_grad()
def spread_directions_(sae: SegCompassSae, seed: int, encoder_norm: float) -> None:
    """Give a new SAE decoder rows of norm 1 in random directions; features read what they write, times a factor."""
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=-1)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(encoder_norm * directions.T)
