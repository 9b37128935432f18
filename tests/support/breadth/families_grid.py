# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""VLM families that keep a picture's shape: tokens for a grid of patches, more for a larger picture."""

from .building import Family
from .common_parts import IMAGE, TORCHVISION

VISION = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
VISION_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}
GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
GLM_PLACEHOLDER = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_IDS = {
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
AREA = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, "patch_size": 7, "merge_size": 2}
FRAMES = AREA | {"temporal_patch_size": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
GLM_MROPE = MROPE | {"partial_rotary_factor": 1.0}


def qwen(**more) -> Family:
    """The Qwens and their descendants: pictures keep their shape, patches are merged by two and two."""
    fields = {"placeholder": VISION_PLACEHOLDER, "image_token": "<|image_pad|>", "attributes": VISION, "image": FRAMES}
    fields["config"] = {"text_config.rope_parameters": MROPE}
    return Family(**(fields | more))


def glm(**more) -> Family:
    """GLM-4V and its descendants."""
    fields = {
        "placeholder": GLM_PLACEHOLDER,
        "image_token": "<|image|>",
        "attributes": GLM,
        "tokens": GLM_TOKENS,
        "ids": GLM_IDS,
        "image": FRAMES,
        "config": {"text_config.rope_parameters": GLM_MROPE},
    }
    return Family(**(fields | more))


GRID = {
    "cohere_compass": Family(
        placeholder="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        image_token="<|IMAGE_PAD|>",
        tokens=("<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"),
        image=FRAMES,
        ids={
            "video_token_id": "<|VIDEO_PAD|>",
            "vision_start_token_id": "<|VISION_START|>",
            "vision_end_token_id": "<|VISION_END|>",
        },
        config={"text_config.rope_parameters": {"full_attention": MROPE}},
    ),
    "cosmos3_edge": qwen(config={}, image=AREA | {"temporal_patch_size": 1}),
    "ernie4_5_vl_moe": Family(
        placeholder="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        image_token="<|IMAGE_PLACEHOLDER|>",
        attributes={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        image=AREA | {"temporal_patch_size": 1},
        config={"text_config.rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    ),
    "exaone4_5": qwen(config={}),
    "gemma4": Family(
        placeholder="<|image|>",
        attributes={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        tokens=("<|video|>",),
        image={"patch_size": 7, "max_soft_tokens": 140, "pooling_kernel_size": 2},
        config={
            "text_config.per_layer_config": {},
            "text_config.rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
            },
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 7,
                "pooling_kernel_size": 2,
                "position_embedding_size": 256,
            },
        },
    ),
    "glm46v": glm(),
    "glm4v": glm(),
    "glm4v_moe": glm(image_processor="Glm4vImageProcessorPil"),
    "glm5_next": glm(config={}),
    "glm_ocr": glm(processor="Glm46VProcessor", image_processor="Glm46VImageProcessorPil"),
    "glmga": glm(processor="Glm46VProcessor"),
    "hunyuan_vl": Family(
        placeholder="<img><image></img>",
        image_token="<image>",
        attributes=IMAGE | {"image_start_token": "<img>", "image_end_token": "</img>"},
        image=AREA | {"temporal_patch_size": 1},
        config={
            "text_config.head_dim": 16,
            "text_config.rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]},
            "im_start_id": 0,
            "im_end_id": 0,
            "im_newline_id": 0,
        },
    ),
    "hyperclovax_vision_v2": qwen(config={}),
    "kimi_k25": Family(
        placeholder="<|media_pad|>",
        attributes={"image_token": "<|media_pad|>", "video_token": "<|media_video|>"},
        image={"patch_size": 7},
        config={"text_config.head_dim": 8, "text_config.qk_head_dim": 16},
        needs=TORCHVISION,
    ),
    "lfm3_vl": qwen(config={}),
    "lighton_ocr": Family(
        placeholder="[IMG]",
        attributes={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        image={"size": {"longest_edge": 56}, "patch_size": {"height": 7, "width": 7}},
        arguments={"patch_size": 7, "spatial_merge_size": 2},
        config={"vision_config.image_size": 56, "vision_config.patch_size": 7},
    ),
    "mistral3": Family(
        placeholder="[IMG]",
        tokens=("[IMG_BREAK]", "[IMG_END]"),
        image={"size": {"longest_edge": 56}, "patch_size": {"height": 7, "width": 7}},
        arguments={"patch_size": 7, "spatial_merge_size": 2},
        config={"vision_config.image_size": 56, "vision_config.patch_size": 7},
        needs=TORCHVISION,
    ),
    "paddleocr_vl": Family(
        attributes={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        placeholder="<|IMAGE_PLACEHOLDER|>",
        image=AREA | {"temporal_patch_size": 1},
        config={"text_config.rope_parameters": MROPE},
    ),
    "qwen2_5_vl": qwen(),
    "qwen2_vl": qwen(),
    "qwen3_5": qwen(),
    "qwen3_5_moe": qwen(),
    "qwen3_vl": qwen(),
    "qwen3_vl_moe": qwen(image_processor="Qwen2VLImageProcessorPil"),
    "qwen4_exp": qwen(
        config={
            "text_config.rope_parameters": MROPE,
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 16,
            "text_config.indexer_budget": 256,
            "text_config.indexer_compress_ratio": 4,
            "text_config.hc_lowrank": 16,
        }
    ),
    "video_llama_3": qwen(
        image=AREA | {"merge_size": 1, "temporal_patch_size": 1}, config={"vision_config.patch_size": 7}
    ),
}
