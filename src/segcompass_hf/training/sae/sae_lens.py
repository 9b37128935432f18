"""SAELens' files (`cfg.json` and `sae_weights.safetensors`) -> [`SegCompassSae`], and back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...configuration_segcompass import SegCompassSaeConfig
from ...files import whole_file, write_whole
from ...modeling_sae import SegCompassSae

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"  # of SAELens, whose layout of cfg.json is written
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


def save_sae_lens(sae: SegCompassSae, folder: str | os.PathLike, vlm: str | None = None) -> Path:
    """Write an SAE so that `sae_lens.SAE.load_from_disk(folder)` reads it, with the same features and reconstructions.

    What SAELens has no place for is folded in: a finetuning scaling factor goes into the decoder. A `batchtopk` SAE
    becomes a `jumprelu` one with its threshold on every feature, as SAELens itself saves them; it computes the same.
    `per_token` is what SAELens calls `constant_norm_rescale`.

    Args:
        sae ([`SegCompassSae`]): The autoencoder.
        folder (`str` or `os.PathLike`): Made when missing.
        vlm (`str`, *optional*): Id of the VLM, kept in the metadata.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: SAELens cannot express it: `per_modality` normalisation or the tanh activation.
    """
    config = sae.config
    if config.normalize_activations == "per_modality":
        raise ValueError(
            'an SAE with normalize_activations="per_modality" reads the modality of each token, which SAELens has no '
            "place for; train one with `per_token` to export it."
        )
    if config.architecture == "standard" and config.activation == "tanh-relu":
        raise ValueError("SAELens dropped the tanh-relu activation; there is no file to write that it would read.")
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in sae.state_dict().items()}
    scale = weights.pop("finetuning_scaling_factor", None)
    if scale is not None:
        weights["W_dec"] = weights["W_dec"] * scale[:, None]
    architecture = "topk" if sae.takes_top_k else config.architecture
    if config.architecture == "batchtopk":
        architecture = "jumprelu"
        # `z >= t` in floating point is `z > ` the number before t
        before = torch.nextafter(weights.pop("topk_threshold").float(), torch.tensor(-torch.inf))
        weights["threshold"] = before.to(weights["b_enc"].dtype).expand(config.d_sae).contiguous()
    normalization = config.normalize_activations
    settings = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "constant_norm_rescale" if normalization == "per_token" else normalization,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT_VERSION, "model_name": vlm, "hook_name": _hook_name(config.layer)},
    }
    if architecture == "topk":
        settings |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    folder = Path(folder)
    with whole_file(folder / WEIGHTS_FILE) as part:
        save_file(weights, part)
    write_whole(folder / CONFIG_FILE, json.dumps(settings, indent=1))
    return folder


def load_sae_lens(source: str | os.PathLike, subfolder: str | None = None, layer: int | None = None) -> SegCompassSae:
    """Read an SAE that SAELens wrote, of version 6 or before.

    Args:
        source (`str` or `os.PathLike`): Folder, or id of a Hub repository.
        subfolder (`str`, *optional*): Where in it `cfg.json` lies.
        layer (`int`, *optional*): Index into the VLM's `hidden_states`; when left out it is read off the hook's name
            (`blocks.15.hook_resid_post` is 16), and stays unset if that names no residual stream.

    Raises:
        ValueError: Of an architecture, activation or normalisation that [`SegCompassSae`] does not have.
    """
    folder = _local_folder(source, subfolder)
    settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    metadata = settings.get("metadata") or settings  # one flat dict before version 6
    architecture, activation = settings.get("architecture", "standard"), settings.get("activation_fn", "relu")
    activation = settings.get("activation_fn_str", activation)
    k = settings.get("k", (settings.get("activation_fn_kwargs") or {}).get("k"))
    if activation == "topk" and architecture == "standard":
        architecture, activation = "topk", "relu"
    normalization = settings.get("normalize_activations") or "none"
    _check(folder, architecture, activation, normalization, settings.get("reshape_activations") or "none")
    weights = load_file(folder / WEIGHTS_FILE)
    factor = weights.pop("scaling_factor", weights.pop("finetuning_scaling_factor", None))
    if settings.get("rescale_acts_by_decoder_norm"):
        weights = _fold_decoder_norm(weights)
    config = SegCompassSaeConfig(
        d_in=settings["d_in"],
        d_sae=settings["d_sae"],
        architecture=architecture,
        activation=activation if architecture == "standard" else "relu",
        k=None if k is None else round(k),
        normalize_activations=normalization,
        apply_b_dec_to_input=settings.get("apply_b_dec_to_input", True),
        finetuning_scaling_factor=factor is not None,
        layer=layer if layer is not None else _hook_layer(metadata.get("hook_name") or metadata.get("hook_point")),
    )
    sae = SegCompassSae(config)
    if factor is not None:
        weights["finetuning_scaling_factor"] = factor
    sae.to(weights["W_enc"].dtype).load_state_dict(weights)
    return sae.eval()


def _check(folder: Path, architecture: str, activation: str, normalization: str, reshape: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{folder} holds a {architecture!r} SAE; only {', '.join(ARCHITECTURES)} can be read.")
    if architecture == "standard" and activation not in ("relu", "tanh-relu"):
        raise ValueError(f"{folder} holds an SAE with the activation {activation!r}; relu and tanh-relu can be read.")
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{folder} holds an SAE with normalize_activations={normalization!r}, which needs statistics of its "
            "training data; fold them into the weights with SAELens (fold_activation_norm_scaling_factor or "
            "fold_activation_whitening), save it again and load that."
        )
    if reshape != "none":
        raise ValueError(f"{folder} holds an SAE of attention heads ({reshape}); it must read the residual stream.")


def _fold_decoder_norm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Top-k over activations times decoder norm, decoded through unit rows, with the norm in the encoder."""
    norm = weights["W_dec"].norm(dim=-1)  # (d_sae,)
    return weights | {
        "W_enc": weights["W_enc"] * norm,
        "b_enc": weights["b_enc"] * norm,
        "W_dec": weights["W_dec"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None],
    }


def _hook_name(layer: int | None) -> str | None:
    if layer is None:
        return None
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def _hook_layer(name: str | None) -> int | None:
    """Index into `hidden_states` of a hook: the names of TransformerLens, or of a decoder layer in transformers."""
    if match := re.search(r"blocks\.(\d+)\.hook_resid_(pre|post)$", name or ""):
        return int(match[1]) + (match[2] == "post")
    if match := re.search(r"layers\.(\d+)$", name or ""):
        return int(match[1]) + 1
    return None


def _local_folder(source: str | os.PathLike, subfolder: str | None) -> Path:
    folder = Path(source) / (subfolder or "")
    if (folder / CONFIG_FILE).is_file():
        return folder
    if Path(source).exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; it is not the folder of a SAELens SAE.")
    from huggingface_hub import hf_hub_download

    for name in (WEIGHTS_FILE, CONFIG_FILE):
        path: Any = hf_hub_download(str(source), name, subfolder=subfolder)
    return Path(path).parent


__all__ = ["load_sae_lens", "save_sae_lens"]
