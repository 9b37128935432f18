# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""VLM families that cut a picture into tiles, most of them beside the whole of it."""

from .building import Family
from .common_parts import CLIP_ARGUMENTS, IMAGE, SHORTEST, SQUARE, TIMM, TORCHVISION

TILES = [[28, 56], [56, 28], [56, 56]]
INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def minicpm() -> Family:
    """MiniCPM-V: slices beside the whole picture."""
    return Family(
        placeholder="<|image_pad|>",
        attributes={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        image={"patch_size": 7, "scale_resolution": 56, "max_slice_nums": 2},
        config={
            "patch_size": 7,
            "image_size": 56,
            "vision_config.patch_size": 7,
            "vision_config.image_size": 56,
            "insert_layer_id": 0,
            "vision_config.insert_layer_id": 0,
        },
    )


TILED = {
    "aya_vision": Family(
        image_token="<|IMG_PATCH|>",
        tokens=("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE"),
        image=SQUARE,
        arguments={"patch_size": 7, "img_size": 28, "downsample_factor": 2},
        config={"vision_config.patch_size": 7},
    ),
    "cohere2_vision": Family(
        image_token="<|IMG_PATCH|>",
        placeholder="<|IMG_PATCH|>",
        attributes={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        image=SQUARE | {"patch_size": 2, "max_patches": 4},
        config={"vision_config.patch_size": 7},
        needs=TORCHVISION,
    ),
    "granite4_vision": Family(
        attributes=IMAGE,
        image=SHORTEST | {"image_grid_pinpoints": TILES},
        arguments={
            "patch_size": 7,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "downsample_rate": "1/2",
        },
        config={
            "image_grid_pinpoints": TILES,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "vision_config.hidden_size": 64,
            "vision_config.patch_size": 7,
            "qformer_config.hidden_size": 64,
            "qformer_config.encoder_hidden_size": 64,
        },
    ),
    "granite_docling": Family(
        attributes=IMAGE,
        tokens=("<fake_token_around_image>", "<global-img>"),
        image=SQUARE | {"max_patches": 4},
        arguments={"image_seq_len": 4},
        config={"vision_config.patch_size": 7, "vision_config.scale_factor": 2, "vision_config.use_fine_route": False},
    ),
    "idefics2": Family(
        tokens=("<fake_token_around_image>",),
        image={"size": {"longest_edge": 56, "shortest_edge": 28}},
        arguments={"image_seq_len": 4},
        config={"vision_config.image_size": 56},
    ),
    "idefics3": Family(
        image={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        arguments={"image_seq_len": 4},
        config={"vision_config.patch_size": 7},
    ),
    "internvl": Family(
        placeholder="<IMG_CONTEXT>",
        attributes=INTERN,
        image=SQUARE | {"max_patches": 4},
        arguments={"image_seq_length": 4},
        config={"vision_config.patch_size": [7, 7]},
    ),
    "lfm2_vl": Family(
        attributes=IMAGE
        | {
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        image={
            "tile_size": 28,
            "encoder_patch_size": 7,
            "min_image_tokens": 4,
            "max_image_tokens": 8,
            "max_num_patches": 32,
            "min_tiles": 1,
            "max_tiles": 2,
        },
        config={"vision_config.num_patches": 16, "vision_config.patch_size": 7},
        needs=TORCHVISION,
    ),
    "llama4": Family(
        placeholder="<|image|>",
        image_token="<|patch|>",
        tokens=("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        image=SQUARE | {"max_patches": 4},
        arguments={"patch_size": 7},
        config={"vision_config.patch_size": 7},
        note="transformers 5.24 fails by itself: its picture is in bfloat16 whatever the model is in.",
        needs=TORCHVISION,
    ),
    "llava_next": Family(
        attributes=IMAGE,
        image=SHORTEST | {"image_grid_pinpoints": TILES},
        arguments=CLIP_ARGUMENTS,
        config={"image_grid_pinpoints": TILES},
    ),
    "llava_next_video": Family(
        attributes=IMAGE | {"video_token": "<video>"},
        image=SHORTEST | {"image_grid_pinpoints": TILES},
        arguments=CLIP_ARGUMENTS,
        config={"image_grid_pinpoints": TILES},
    ),
    "llava_onevision": Family(
        attributes=IMAGE | {"video_token": "<video>"},
        image=SQUARE | {"image_grid_pinpoints": TILES},
        arguments={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        config={"image_grid_pinpoints": TILES},
    ),
    "minicpmv4_6": minicpm(),
    "minicpmv4_7": minicpm(),
    "molmo2": Family(
        placeholder="<|image|>",
        image_token="<im_patch>",
        tokens=(
            "<|image|>",
            "<|video|>",
            "<im_col>",
            "<im_start>",
            "<low_res_im_start>",
            "<frame_start>",
            "<im_end>",
            "<frame_end>",
            "<im_low>",
        ),
        ids={"image_patch_id": "<im_patch>"},
        config={"adapter_config.vision_feature_layer": [1, 0]},
        needs=TORCHVISION,
    ),
    "ovis2": Family(
        image_token="<IMG_ATOM>",
        tokens=("<image>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        image=SQUARE | {"max_patches": 4},
        arguments={"image_seq_length": 4},
        config={"vision_config.vocab_size": 37, "visual_indicator_token_ids": [0, 1, 2, 3, 4], "hidden_size": 32},
    ),
    "perception_lm": Family(
        attributes=IMAGE | {"video_token": "<video>"},
        image={"tile_size": 28, "max_num_tiles": 2},
        arguments={"patch_size": 7, "pooling_ratio": 2},
        config={
            "projector_pooling_ratio": 2,
            "vision_use_cls_token": True,
            "vision_config.architecture": "vit_pe_core_large_patch14_336",
            "vision_config.model_args": {
                "embed_dim": 64,
                "img_size": [28, 28],
                "patch_size": 7,
                "depth": 2,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [4, 4],
            },
        },
        needs=TIMM,
    ),
    "qianfan_ocr": Family(
        attributes=INTERN,
        tokens=("<image>",),
        image_token="<IMG_CONTEXT>",
        image=SQUARE | {"max_patches": 4},
        arguments={"image_seq_length": 4},
        config={"vision_config.patch_size": [7, 7]},
    ),
    "smolvlm": Family(
        tokens=("<fake_token_around_image>", "<global-img>", "<video>"),
        image={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        arguments={"image_seq_len": 4},
        config={"vision_config.patch_size": 7},
        needs=("num2words",),
    ),
    "step3p7": Family(
        placeholder="<im_patch>",
        tokens=("<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>"),
        image={"size": {"height": 112, "width": 112}, "patch_size": 56},
        config={"text_config.sliding_window": 64, "vision_config.image_size": 112},
        needs=TORCHVISION,
    ),
}
