# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Parameter names of original SegCompass, Segment Anything and MobileSAM checkpoints <-> ours.

An original checkpoint's side file holds `{sae,query_book,heatmap_head,prompt_encoder,mask_decoder}.*`; ours hold
`{sae,codebook,slot_encoder,slot_mapper,sam}.*`. Two tensors change more than their name: the codebook is transposed (a
linear layer there, a table of rows here), and SAM's one positional matrix is stored twice by transformers.
"""

import re
from collections.abc import Mapping

import torch

from .files import shorten

# Segments of a dotted name, original -> ours; applied to whole segments only.
_SLOT_NAMES = (
    ("slot_queries", "slot_queries.weight"),
    ("encoder.layers", "layers"),
    ("self_attn.in_proj_weight", "qkv_proj.weight"),
    ("self_attn.in_proj_bias", "qkv_proj.bias"),
    ("self_attn.out_proj", "out_proj"),
    ("norm1", "attention_norm"),
    ("norm2", "feed_forward_norm"),
    ("linear1", "fc1"),
    ("linear2", "fc2"),
)
_MAPPER_NAMES = (
    ("querybook_proj", "slot_proj"),
    ("ref_fuse.0", "fuse_norm"),
    ("ref_fuse.1", "fuse_proj"),
    ("q_proj", "query_proj"),
    ("k_proj", "key_proj"),
    ("fuser", "head_fuser"),
    ("conf_head.0", "confidence_norm"),
    ("conf_head.1", "confidence_fc1"),
    ("conf_head.3", "confidence_fc2"),
)
_PROMPT_ENCODER_NAMES = (
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    ("point_embeddings", "point_embed"),
    ("mask_downscaling.0", "mask_embed.conv1"),
    ("mask_downscaling.1", "mask_embed.layer_norm1"),
    ("mask_downscaling.3", "mask_embed.conv2"),
    ("mask_downscaling.4", "mask_embed.layer_norm2"),
    ("mask_downscaling.6", "mask_embed.conv3"),
)
_TRANSFORMER_NORMS = tuple((f"norm{n}", f"layer_norm{n}") for n in range(1, 5)) + (
    ("norm_final_attn", "layer_norm_final_attn"),
)
_MASK_DECODER_NAMES = (
    ("output_upscaling.0", "upscale_conv1"),
    ("output_upscaling.1", "upscale_layer_norm"),
    ("output_upscaling.3", "upscale_conv2"),
) + _TRANSFORMER_NORMS
_NECK_NAMES = (
    ("neck.0", "neck.conv1"),
    ("neck.1", "neck.layer_norm1"),
    ("neck.2", "neck.conv2"),
    ("neck.3", "neck.layer_norm2"),
)
_IMAGE_ENCODER_NAMES = _NECK_NAMES + (  # it first: on the way back its norms must not be taken for those of the blocks
    ("patch_embed.proj", "patch_embed.projection"),
    ("blocks", "layers"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
)
_TINY_VIT_NAMES = _NECK_NAMES + (
    ("patch_embed.seq.0", "patch_embed.conv1"),
    ("patch_embed.seq.2", "patch_embed.conv2"),
    ("layers", "stages"),
    ("blocks", "layers"),
    ("attn.attention_biases", "attention.relative_position_bias"),
    ("attn", "attention"),
    ("norm", "layer_norm"),
)
_TINY_VIT_MARK = "image_encoder.patch_embed.seq.0.c.weight"
_CLASSIFIER = tuple(f"image_encoder.{part}." for part in ("norm_head", "head"))  # of TinyViT's training on ImageNet
_BATCH_NORM_EPS = 1e-5  # of every batch norm in MobileSAM
_MLP_SEGMENTS = ("output_hypernetworks_mlps", "iou_prediction_head")
_SHARED_POSITIONS = "shared_image_embedding.positional_embedding"
_PROMPT_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"


def _rename(name: str, table: tuple[tuple[str, str], ...], back: bool = False) -> str:
    for original, ours in table:
        old, new = (ours, original) if back else (original, ours)
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", lambda match, new=new: match.group(1) + new, name)
    return name


def _rename_mlp(name: str, back: bool = False) -> str:
    """SAM's MLPs: the original numbers `layers.0 .. layers.n`, transformers calls the ends `proj_in` and `proj_out`.

    Every MLP of Segment Anything has three layers, so the last is `layers.2`.
    """
    if not any(segment in name.split(".") for segment in _MLP_SEGMENTS):
        return name
    ours = {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"}
    table = {value: key for key, value in ours.items()} if back else ours
    prefix, kind, suffix = re.fullmatch(r"(.*)\.(layers\.\d+|proj_in|proj_out)\.(\w+)", name).groups()
    if kind not in table:
        raise ValueError(f"SAM MLP parameter {name!r} has no counterpart: expected three layers per MLP.")
    return f"{prefix}.{table[kind]}.{suffix}"


def convert_original_query_book_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename the original's query book (codebook and slot encoder).

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Without prefix: `codebook.weight` of shape `(d_slot, d_sae)`, `slot_queries`, `encoder.*`, `final_norm.*`.

    Returns:
        `dict[str, torch.Tensor]`: `codebook.weight` `(d_sae, d_slot)` and `slot_encoder.*`.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if name == "codebook.weight":
            converted[name] = tensor.t().contiguous()
        else:
            converted[f"slot_encoder.{_rename(name, _SLOT_NAMES)}"] = tensor
    return converted


def convert_original_heatmap_head_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the original's heatmap head (no prefix) to `slot_mapper.*`."""
    return {f"slot_mapper.{_rename(name, _MAPPER_NAMES)}": tensor for name, tensor in state_dict.items()}


def convert_original_sam_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename a Segment Anything or MobileSAM checkpoint, whole or in part, to `SamModel` or `MobileSamModel`.

    MobileSAM's batch norms are folded into its convolutions, and the classifier left over from the training of its
    image encoder, which segmentation never uses, is left out.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): `image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`.

    Returns:
        `dict[str, torch.Tensor]`: `vision_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`, and the positional
        matrix a second time as `shared_image_embedding.positional_embedding`.
    """
    encoder_names = _IMAGE_ENCODER_NAMES
    if has_tiny_vit(state_dict):
        encoder_names = _TINY_VIT_NAMES
        used = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_CLASSIFIER)}
        state_dict = fold_batch_norms(used)
    converted = {}
    for name, tensor in state_dict.items():
        part, _, rest = name.partition(".")
        if part == "image_encoder":
            converted[f"vision_encoder.{_rename(rest, encoder_names)}"] = tensor
        elif part == "prompt_encoder":
            converted[f"prompt_encoder.{_rename(rest, _PROMPT_ENCODER_NAMES)}"] = tensor
        elif part == "mask_decoder":
            converted[f"mask_decoder.{_rename_mlp(_rename(rest, _MASK_DECODER_NAMES))}"] = tensor
        else:
            raise ValueError(
                f"{name!r} is no Segment Anything parameter; expected image_encoder.*, prompt_encoder.* or "
                "mask_decoder.*; pass the state dict itself, without other models."
            )
    if _PROMPT_POSITIONS in converted:
        converted[_SHARED_POSITIONS] = converted[_PROMPT_POSITIONS].clone()
    return converted


def has_tiny_vit(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether published weights are those of MobileSAM, and not of Segment Anything with a ViT."""
    return _TINY_VIT_MARK in state_dict


def fold_batch_norms(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Make each pair `NAME.c` (a convolution without bias) and `NAME.bn` (its batch norm) one convolution `NAME`.

    With its statistics at rest a batch norm maps `y` to `gain (y - mean) + bias`, `gain = weight / sqrt(var + eps)`:
    the convolution's weights times `gain`, and the bias `bias - gain mean`. Computed in float64.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Other names are passed on.

    Raises:
        ValueError: A batch norm lacks tensors.
    """
    folded = dict(state_dict)
    for name in [name for name in state_dict if name.endswith(".c.weight")]:
        base = name.removesuffix(".c.weight")
        parts = [f"{base}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if missing := [part for part in parts if part not in state_dict]:
            raise ValueError(f"{base}.c lacks its batch norm's {shorten(missing)}; get the file again.")
        convolution, (weight, bias, mean, variance) = folded.pop(name), (folded.pop(part).double() for part in parts)
        folded.pop(f"{base}.bn.num_batches_tracked", None)  # counts steps of its training
        gain = weight / (variance + _BATCH_NORM_EPS).sqrt()  # (channels,)
        folded[f"{base}.weight"] = (convolution.double() * gain[:, None, None, None]).to(convolution.dtype)
        folded[f"{base}.bias"] = (bias - mean * gain).to(convolution.dtype)
    return folded


def convert_original_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename the side file of an original SegCompass checkpoint to `SegCompassForReasoningSegmentation`'s names.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            `{sae,query_book,heatmap_head,prompt_encoder,mask_decoder}.*`, with or without a leading `refseg.`.

    Returns:
        `dict[str, torch.Tensor]`: `{sae,codebook,slot_encoder,slot_mapper,sam}.*`.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        part, _, rest = name.removeprefix("refseg.").partition(".")
        parts.setdefault(part, {})[rest] = tensor
    known = {"sae", "query_book", "heatmap_head", "prompt_encoder", "mask_decoder", "image_encoder"}
    if unknown := sorted(parts.keys() - known):
        raise ValueError(f"unknown parts {unknown} in the checkpoint; expected some of {sorted(known)}.")
    converted = {f"sae.{name}": tensor for name, tensor in parts.get("sae", {}).items()}
    converted |= convert_original_query_book_state_dict(parts.get("query_book", {}))
    converted |= convert_original_heatmap_head_state_dict(parts.get("heatmap_head", {}))
    sam = {
        f"{part}.{name}": tensor
        for part in ("image_encoder", "prompt_encoder", "mask_decoder")
        for name, tensor in parts.get(part, {}).items()
    }
    return converted | {f"sam.{name}": tensor for name, tensor in convert_original_sam_state_dict(sam).items()}


def revert_to_original_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Inverse of [`convert_original_state_dict`]: our names -> the original's side file. Other parameters raise.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): `{sae,codebook,slot_encoder,slot_mapper,sam}.*`.

    Returns:
        `dict[str, torch.Tensor]`: `{sae,query_book,heatmap_head,prompt_encoder,mask_decoder,image_encoder}.*`.
    """
    sam_tables = {
        "vision_encoder": ("image_encoder", _IMAGE_ENCODER_NAMES),
        "prompt_encoder": ("prompt_encoder", _PROMPT_ENCODER_NAMES),
        "mask_decoder": ("mask_decoder", _MASK_DECODER_NAMES),
    }
    reverted = {}
    for name, tensor in state_dict.items():
        part, _, rest = name.partition(".")
        if part == "sae":
            reverted[name] = tensor
        elif name == "codebook.weight":
            reverted["query_book.codebook.weight"] = tensor.t().contiguous()
        elif part == "slot_encoder":
            reverted[f"query_book.{_rename(rest, _SLOT_NAMES, True)}"] = tensor
        elif part == "slot_mapper":
            reverted[f"heatmap_head.{_rename(rest, _MAPPER_NAMES, True)}"] = tensor
        elif name == f"sam.{_SHARED_POSITIONS}":
            continue  # the prompt encoder holds the same matrix
        elif part == "sam" and rest.split(".")[0] in sam_tables:
            ours, _, rest = rest.partition(".")
            original, table = sam_tables[ours]
            rest = _rename_mlp(rest, True) if ours == "mask_decoder" else rest
            reverted[f"{original}.{_rename(rest, table, True)}"] = tensor
        else:
            raise ValueError(
                f"{name!r} has no place in an original checkpoint's side file; expected {{sae,codebook,slot_encoder,"
                "slot_mapper,sam}.*, leave the VLM's weights out."
            )
    return reverted
