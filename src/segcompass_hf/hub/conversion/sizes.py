# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sizes read off the weights of original checkpoints, which have no configuration file of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import SamConfig

from ...configuration_mobile_sam import DECODER_NORM_EPS, MobileSamConfig, MobileSamVisionConfig
from .files import shorten

SAM_HEADS = 8  # of every published Segment Anything mask decoder; the weights do not tell
SAM_NORM_EPS = DECODER_NORM_EPS  # of the original's mask decoder; transformers' default is another
_ARCHITECTURES = {"standard": {"b_enc"}, "jumprelu": {"b_enc", "threshold"}, "gated": {"b_gate", "r_mag", "b_mag"}}


def sae_fields(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`d_in`, `d_sae` and architecture of an SAE, from `W_enc`, `W_dec`, ... (no prefix).

    Raises:
        ValueError: Weights are missing, too many, or do not fit together.
    """
    _require(weights, ["W_enc", "W_dec", "b_dec"], "SAE", "sae.*")
    own = set(weights) - {"W_enc", "W_dec", "b_dec", "finetuning_scaling_factor"}
    architecture = next((name for name, names in _ARCHITECTURES.items() if names == own), None)
    if architecture is None:
        raise ValueError(
            f"the SAE holds {sorted(weights)}; expected W_enc, W_dec, b_dec and b_enc (standard), b_enc and threshold "
            "(jumprelu), or b_gate, r_mag and b_mag (gated)."
        )
    d_in, d_sae = _shape(weights, "W_enc", 2, "SAE")
    if tuple(weights["W_dec"].shape) != (d_sae, d_in):
        raise ValueError(
            f"the SAE's W_enc is {(d_in, d_sae)} and its W_dec {tuple(weights['W_dec'].shape)}; expected "
            f"{(d_sae, d_in)}: they are of two different SAEs."
        )
    scaled = "finetuning_scaling_factor" in weights
    return {"d_in": d_in, "d_sae": d_sae, "architecture": architecture, "finetuning_scaling_factor": scaled}


def head_fields(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Fields of [`SegCompassConfig`] that the query book and the heatmap head show.

    Args:
        weights (`Mapping[str, torch.Tensor]`): `query_book.*` and `heatmap_head.*`.
    """
    slots, last = "query_book.slot_queries", "heatmap_head.fuser"
    _require(weights, [slots, "query_book.codebook.weight", "heatmap_head.q_proj.weight"], "side file", "...")
    _, num_slots, d_slot = _shape(weights, slots, 3, "query book")
    layers = {name.split(".")[3] for name in weights if name.startswith("query_book.encoder.layers.")}
    refine = f"{last}.0.weight" in weights
    fuser = f"{last}.0.weight" if refine else f"{last}.weight"
    _require(weights, [fuser, "query_book.encoder.layers.0.linear1.weight"], "side file", "...")
    return {
        "num_slots": num_slots,
        "d_slot": d_slot,
        "slot_encoder_layers": len(layers),
        "slot_encoder_ff_mult": _shape(weights, "query_book.encoder.layers.0.linear1.weight", 2, "slots")[0] // d_slot,
        "heatmap_heads": _shape(weights, fuser, 4, "heatmap head")[1],
        "heatmap_fuser": "refine" if refine else "plain",
    }


def sam_config_of(weights: Mapping[str, torch.Tensor], overrides: Mapping[str, Any] | None = None) -> SamConfig:
    """The configuration of an original Segment Anything model (ViT-B, L, H, or any other of these sizes).

    Args:
        weights (`Mapping[str, torch.Tensor]`): `image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`.
        overrides (`Mapping`, *optional*): Fields that the weights do not show, nested as in [`SamConfig`].
    """
    encoder = {name.removeprefix("image_encoder."): w for name, w in weights.items() if name.startswith("image_enc")}
    mask_conv, tokens = "prompt_encoder.mask_downscaling.3.weight", "mask_decoder.mask_tokens.weight"
    needed = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "neck.0.weight"]
    _require(encoder, needed, "SAM image encoder", "image_encoder.*")
    _require(weights, [mask_conv, tokens], "SAM", "prompt_encoder.*, mask_decoder.*")
    width, _, patch_size, _ = _shape(encoder, "patch_embed.proj.weight", 4, "SAM image encoder")
    side, depth = _embedding_side(encoder), len({n.split(".")[1] for n in encoder if n.startswith("blocks.")})
    dim = _shape(encoder, "neck.0.weight", 4, "SAM image encoder")[0]
    canvas = side * patch_size
    vision = {
        "hidden_size": width,
        "output_channels": dim,
        "num_pos_feats": dim // 2,
        "num_hidden_layers": depth,
        "image_size": canvas,
        "patch_size": patch_size,
        "mlp_dim": _shape(encoder, "blocks.0.mlp.lin1.weight", 2, "SAM image encoder")[0],
        "use_abs_pos": "pos_embed" in encoder,
        **_attention_fields(encoder, width, side, depth),
    }
    prompt = {
        "hidden_size": dim,
        "image_size": canvas,
        "patch_size": patch_size,
        "mask_input_channels": _shape(weights, mask_conv, 4, "SAM prompt encoder")[0],
    }
    return SamConfig(**_with_overrides(vision, prompt, _decoder_fields(weights, dim), overrides))


def mobile_sam_config_of(
    weights: Mapping[str, torch.Tensor], overrides: Mapping[str, Any] | None = None
) -> MobileSamConfig:
    """The configuration of a published MobileSAM, whatever the size of its TinyViT.

    Args:
        weights (`Mapping[str, torch.Tensor]`): `image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`.
        overrides (`Mapping`, *optional*): Fields that the weights do not show, nested as in [`MobileSamConfig`]: the
            canvas (1024 pixels) and the strides between stages.
    """
    encoder = {name.removeprefix("image_encoder."): w for name, w in weights.items() if name.startswith("image_enc")}
    what, mask_conv = "MobileSAM image encoder", "prompt_encoder.mask_downscaling.3.weight"
    _require(weights, [mask_conv, "mask_decoder.mask_tokens.weight"], "MobileSAM", "prompt_encoder.*, mask_decoder.*")
    found = (re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in encoder)
    blocks = {(int(match[1]), int(match[2])) for match in found if match}  # (stage, layer)
    stages = range(1 + max((stage for stage, _ in blocks), default=0))
    dims = [_shape(encoder, "patch_embed.seq.2.c.weight", 4, what)[0]]
    dims += [_shape(encoder, f"layers.{stage}.downsample.conv1.c.weight", 4, what)[0] for stage in stages[:-1]]
    biases = [_shape(encoder, f"layers.{stage}.blocks.0.attn.attention_biases", 2, what) for stage in stages[1:]]
    defaults, dim = MobileSamVisionConfig(), _shape(encoder, "neck.0.weight", 4, what)[0]
    vision = {
        "embed_dims": dims,
        "depths": [sum(of == stage for of, _ in blocks) for stage in stages],
        "num_heads": [defaults.num_heads[0], *(heads for heads, _ in biases)],
        "window_sizes": [defaults.window_sizes[0], *(math.isqrt(offsets) for _, offsets in biases)],
        "expand_ratio": _shape(encoder, "layers.0.blocks.0.conv1.c.weight", 4, what)[0] / dims[0],
        "mlp_ratio": _shape(encoder, "layers.1.blocks.0.mlp.fc1.weight", 2, what)[0] / dims[1],
        "output_channels": dim,
    }
    prompt = {"mask_input_channels": _shape(weights, mask_conv, 4, "MobileSAM prompt encoder")[0]}
    return MobileSamConfig(**_with_overrides(vision, prompt, _decoder_fields(weights, dim), overrides))


def _decoder_fields(weights: Mapping[str, torch.Tensor], dim: int) -> dict[str, Any]:
    """Fields of `SamMaskDecoderConfig`."""
    transformer = [name for name in weights if name.startswith("mask_decoder.transformer.layers.")]
    return {
        "hidden_size": dim,
        "mlp_dim": _shape(weights, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2, "SAM mask decoder")[0],
        "num_hidden_layers": len({name.split(".")[3] for name in transformer}),
        "num_attention_heads": SAM_HEADS,
        "num_multimask_outputs": len(weights["mask_decoder.mask_tokens.weight"]) - 1,
        "iou_head_hidden_dim": _shape(weights, "mask_decoder.iou_prediction_head.layers.0.weight", 2, "SAM")[0],
        "layer_norm_eps": SAM_NORM_EPS,
    }


def _with_overrides(vision: dict, prompt: dict, decoder: dict, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    fields = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    for name, value in (overrides or {}).items():
        fields[name] = {**fields[name], **value} if isinstance(fields.get(name), dict) else value
    return fields


def _embedding_side(encoder: Mapping[str, torch.Tensor]) -> int:
    """Side of the image embedding in patches."""
    if "pos_embed" in encoder:
        return _shape(encoder, "pos_embed", 4, "SAM image encoder")[1]
    return max(_windows(encoder).values())


def _windows(encoder: Mapping[str, torch.Tensor]) -> dict[int, int]:
    """Side of what each block attends to, in patches: its relative positions go from `1 - side` to `side - 1`."""
    names = {int(name.split(".")[1]): name for name in encoder if name.endswith(".attn.rel_pos_h")}
    return {block: (len(encoder[name]) + 1) // 2 for block, name in names.items()}


def _attention_fields(encoder: Mapping[str, torch.Tensor], width: int, side: int, depth: int) -> dict[str, Any]:
    windows = _windows(encoder)
    if len(windows) != depth:
        raise ValueError(
            f"{depth - len(windows)} of SAM's {depth} blocks have no relative positions (attn.rel_pos_h), from which "
            "their window and heads are read; expected a Segment Anything ViT-B, L or H."
        )
    head_dim = encoder["blocks.0.attn.rel_pos_h"].shape[1]
    narrow = {window for window in windows.values() if window != side}
    if len(narrow) > 1:
        raise ValueError(f"SAM's blocks have windows of several sizes: {sorted(narrow)}; expected one.")
    return {
        "num_attention_heads": width // head_dim,
        "use_rel_pos": True,
        "window_size": narrow.pop() if narrow else 0,
        "global_attn_indexes": [block for block, window in sorted(windows.items()) if window == side],
        "qkv_bias": "blocks.0.attn.qkv.bias" in encoder,
    }


def _require(weights: Mapping[str, Any], names: list[str], what: str, expected: str) -> None:
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(
            f"the {what} lacks {shorten(missing)} ({len(weights)} weights: {shorten(sorted(weights))}); expected "
            f"{expected} of an original checkpoint: check which file was passed."
        )


def _shape(weights: Mapping[str, torch.Tensor], name: str, dimensions: int, what: str) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"the {what} lacks {name}; check which file was passed.")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{name} has shape {shape}; expected {dimensions} dimensions: check which file was passed.")
    return shape


__all__ = ["SAM_HEADS", "SAM_NORM_EPS", "head_fields", "mobile_sam_config_of", "sae_fields", "sam_config_of"]
