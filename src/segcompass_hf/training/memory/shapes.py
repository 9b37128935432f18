# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Shapes of published backbones, so that memory can be estimated without a network; weights are never needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ...configuration_segcompass import SegCompassConfig

_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
_QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]}


def _llava(width: int, depth: int, heads: int, feed_forward: int) -> dict[str, Any]:
    text = {"model_type": "llama", "vocab_size": 32064, "hidden_size": width, "intermediate_size": feed_forward}
    text |= {"num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": heads}
    text |= {"max_position_embeddings": 4096}
    return {"model_type": "llava", "text_config": text, "vision_config": _CLIP_L_336, "image_token_index": 32000}


def _qwen2_5_vl(
    width: int, depth: int, heads: int, kv_heads: int, feed_forward: int, vocab: int, tied: bool
) -> dict[str, Any]:
    text = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": feed_forward, "num_hidden_layers": depth}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_parameters": _MROPE}
    text |= {"tie_word_embeddings": tied}
    vision = _QWEN2_5_VISION | {"out_hidden_size": width}
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def _qwen3_vl(width: int, feed_forward: int, tied: bool, vision: dict[str, Any]) -> dict[str, Any]:
    text = {"vocab_size": 151936, "hidden_size": width, "intermediate_size": feed_forward, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied}
    text |= {"rope_parameters": _QWEN3_ROPE | {"mrope_interleaved": True}}
    vision = vision | {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304, "out_hidden_size": width}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


# Hub id -> configuration, as the checkpoints publish it.
VLM_SHAPES = {
    "llava-hf/llava-1.5-7b-hf": _llava(4096, 32, 32, 11008),
    "llava-hf/llava-1.5-13b-hf": _llava(5120, 40, 40, 13824),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, tied=False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(
        2560,
        9728,
        tied=True,
        vision={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
        4096,
        12288,
        tied=False,
        vision={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}


def _sam(width: int, depth: int, heads: int, full_attention: list[int]) -> dict[str, Any]:
    vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "mlp_dim": 4 * width}
    return {"model_type": "sam", "vision_config": vision | {"global_attn_indexes": full_attention}}


def _sam2(
    width: int,
    heads: int,
    blocks: list[int],
    full_attention: list[int],
    windows: tuple[int, ...] = (8, 4, 14, 7),
    background: int = 7,
) -> dict[str, Any]:
    widths = [width * 2**stage for stage in range(4)]
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": width, "num_attention_heads": heads}
    backbone |= {"blocks_per_stage": blocks, "embed_dim_per_stage": widths, "window_size_per_stage": list(windows)}
    backbone |= {"num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)]}
    backbone |= {"global_attention_blocks": full_attention}
    backbone |= {"window_positional_embedding_background_size": [background, background]}
    vision = {"model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": widths[::-1]}
    return {"model_type": "sam2", "vision_config": vision}


# Hub id -> configuration of the segmenter for images in it.
SAM_SHAPES = {
    "facebook/sam-vit-base": _sam(768, 12, 12, [2, 5, 8, 11]),
    "facebook/sam-vit-large": _sam(1024, 24, 16, [5, 11, 17, 23]),
    "facebook/sam-vit-huge": _sam(1280, 32, 16, [7, 15, 23, 31]),
    "facebook/sam2.1-hiera-tiny": _sam2(96, 1, [1, 2, 7, 2], [5, 7, 9]),
    "facebook/sam2.1-hiera-small": _sam2(96, 1, [1, 2, 11, 2], [7, 10, 13]),
    "facebook/sam2.1-hiera-base-plus": _sam2(112, 2, [2, 3, 16, 3], [12, 16, 20], background=14),
    "facebook/sam2.1-hiera-large": _sam2(144, 2, [2, 6, 36, 4], [23, 33, 43], windows=(8, 4, 16, 8)),
    "facebook/sam3": {"model_type": "sam3_tracker"},  # the published shape is the default
}


def vlm_config(name: str) -> PretrainedConfig:
    """Configuration of a VLM by Hub id (one of `VLM_SHAPES`) or by the folder of a checkpoint.

    Raises:
        ValueError: neither a known id nor a folder.
    """
    return _configuration(name, VLM_SHAPES, "VLM")


def sam_config(name: str) -> PretrainedConfig:
    """Configuration of a segmenter by Hub id (one of `SAM_SHAPES`) or by the folder of a checkpoint.

    Raises:
        ValueError: neither a known id nor a folder.
    """
    return _configuration(name, SAM_SHAPES, "SAM")


def composite_config(vlm: str, sam: str, **fields) -> SegCompassConfig:
    """[`SegCompassConfig`] of a model composed of a VLM and a SAM by name, with the ids of the added tokens set.

    Args:
        vlm, sam (`str`): See [`vlm_config`] and [`sam_config`].
        fields: Further fields of the configuration, such as `num_slots`.
    """
    vlm = vlm_config(vlm)
    last = vlm.get_text_config().vocab_size - 1  # which rows they are does not matter for memory
    added = {"ref_token_id": last, "think_start_token_id": last - 1, "think_end_token_id": last - 2}
    return SegCompassConfig(vlm_config=vlm, sam_config=sam_config(sam), **added, **fields)


def _configuration(name: str, shapes: dict[str, Any], kind: str) -> PretrainedConfig:
    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name)
    if name not in shapes:
        raise ValueError(f"no {kind} of known shape and no folder is called {name!r}; known are {', '.join(shapes)}.")
    shape = dict(shapes[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)
