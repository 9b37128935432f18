"""Where SAE training starts from: a frozen VLM, the layer to read, and a new SAE."""

from __future__ import annotations

import torch
from torch import nn

from ..configuration_segcompass import SegCompassSaeConfig, default_sae_layer
from ..modeling_sae import SegCompassSae
from .sae_config import SaeTrainingConfig

DEFAULT_K = 32  # active features per token of a new top-k SAE


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
    # So many features are active at first that their sum would be far longer than the state, except with top-k.
    spread_directions_(sae, args.seed, encoder_norm=1.0 if takes_top_k else min(1.0, 2 * config.d_in / config.d_sae))
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
    is_placed = getattr(vlm, "hf_device_map", None) or getattr(vlm, "is_quantized", False)
    vlm = vlm if is_placed else vlm.to(device)
    return vlm.eval().requires_grad_(False)


@torch.no_grad()
def start_from_data_(sae: SegCompassSae, states: torch.Tensor, modality_ids: torch.Tensor, b_dec: str) -> None:
    """Fit a new SAE to a sample: statistics of `per_modality`, and `b_dec` as the mean (`"mean"`) of the states.

    Args:
        states (`torch.Tensor` of shape `(tokens, d_in)`): A sample.
        modality_ids (`torch.Tensor` of shape `(tokens,)`): 0 text, 1 image.
    """
    if sae.config.normalize_activations == "per_modality":
        sae.fit_modality_statistics_(states, modality_ids)
    if b_dec == "mean":
        total, chunk = 0.0, 4096
        for part, modalities in zip(states.split(chunk), modality_ids.split(chunk), strict=True):
            total = total + sae.normalize(part, modalities)[0].double().sum(0)
        sae.b_dec.copy_(total / len(states))


@torch.no_grad()
def spread_directions_(sae: SegCompassSae, seed: int, encoder_norm: float) -> None:
    """Give a new SAE decoder rows of norm 1 in random directions; features read what they write, times a factor."""
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=-1)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(encoder_norm * directions.T)
