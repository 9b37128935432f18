# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""VLM families that see a picture as one square, of as many tokens whatever its shape."""

from .building import Family
from .common_parts import CLIP_ARGUMENTS, IMAGE, SHORTEST, SQUARE, TIMM

FIXED = {
    "aria": Family(
        attributes=IMAGE,
        image={"max_image_size": 980},
        arguments={"size_conversion": {"980": 4}},
        config={
            "vision_config.image_size": 980,
            "vision_config.patch_size": 140,
            "projector_patch_to_query_dict": {49: 4},
        },
    ),
    "deepseek_vl": Family(attributes=IMAGE, image=SQUARE, arguments={"num_image_tokens": 4}),
    "deepseek_vl_hybrid": Family(
        attributes=IMAGE,
        image=SQUARE | {"high_res_size": {"height": 56, "width": 56}},
        arguments={"num_image_tokens": 4},
        config={"high_res_vision_config.image_size": 56},
    ),
    "gemma3": Family(
        placeholder="<start_of_image>",
        image_token="<image_soft_token>",
        attributes={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        image=SQUARE,
        arguments={"image_seq_length": 4},
        config={"mm_tokens_per_image": 4},
    ),
    "gemma3n": Family(
        placeholder="<image_soft_token>",
        image_token="<image_soft_token>",
        attributes={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
        image={"size": {"height": 64, "width": 64}},
        arguments={"image_seq_length": 4},
        config={
            "vision_soft_tokens_per_image": 4,
            "vision_config.architecture": "test_resnet",
            "vision_config.hidden_size": 96,
            "text_config.num_kv_shared_layers": 2,
            "audio_config.conf_num_hidden_layers": 1,
            "audio_config.conf_num_attention_heads": 2,
            "audio_config.sscp_conv_channel_size": [8, 8],
        },
        needs=TIMM,
    ),
    "got_ocr2": Family(
        placeholder="<img><imgpad></img>",
        image_token="<imgpad>",
        tokens=("<img>", "</img>"),
        image={"size": {"height": 256, "width": 256}},  # its processor writes 256 tokens, whatever the size
        config={
            "vision_config.image_size": 256,
            "vision_config.patch_size": 4,
            "vision_config.num_hidden_layers": 1,
            "vision_config.global_attn_indexes": [],
        },
    ),
    "janus": Family(
        attributes=IMAGE | {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        image=SQUARE,
        arguments={"num_image_tokens": 4},
    ),
    "llava": Family(attributes=IMAGE, bos=True, image=SHORTEST, arguments=CLIP_ARGUMENTS),
    "video_llava": Family(
        attributes=IMAGE | {"video_token": "<video>"},
        image=SHORTEST,
        arguments=CLIP_ARGUMENTS,
    ),
    "vipllava": Family(
        attributes=IMAGE,
        image=SHORTEST,
        arguments=CLIP_ARGUMENTS,
        config={"vision_feature_layer": [-2, -1]},
    ),
}
