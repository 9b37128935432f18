# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""VLM families of other designs: encoder-decoders, cross-attention, image states in front of the text."""

from .building import Family
from .common_parts import IMAGE, SHORTEST, SQUARE, TORCHVISION

CODES = tuple(f"IMGIMG{first}{second}Z" for first in "ABCDEFGHIJ" for second in "ABCDEFGHIJ")  # digits as letters

OTHER = {
    "blip": Family(
        placeholder="",
        image=SQUARE,
        note="its text reads the picture by cross-attention, and the prompt holds no token for it.",
    ),
    "blip-2": Family(
        placeholder="",
        image_token="<image>",
        tokens=("<image>",),
        image=SQUARE,
        arguments={"num_query_tokens": 4},
        ids={"image_token_index": "<image>"},
    ),
    "chameleon": Family(
        attributes=IMAGE | {"boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        tokens=CODES,
        image={"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        arguments={"image_seq_length": 4},
        ids={"vocabulary_map": {token: token for token in ("<image>", *CODES)}},
        config={
            "vq_config.num_embeddings": len(CODES),
            "vq_config.latent_channels": 32,
            "vq_config.base_channels": 32,
            "vq_config.resolution": 32,
        },
    ),
    "florence2": Family(
        placeholder="",
        image_token="<image>",
        attributes=IMAGE,
        image=SHORTEST | {"image_seq_length": 2},
        config={
            "vision_config.patch_size": [7, 3, 3, 3],
            "vision_config.num_groups": [2, 2, 2, 2],
            "vision_config.depths": [1, 1, 1, 1],
        },
        note="an encoder-decoder: prompt and answer pass different layers. It is refused when the model is composed.",
    ),
    "fuyu": Family(
        placeholder="",
        image_token="|SPEAKER|",
        tokens=("|NEWLINE|",),
        needs=TORCHVISION,
        note="transformers' PIL image processor of this family fails by itself.",
    ),
    "git": Family(
        placeholder="",
        image=SHORTEST,
        note="it puts the picture's states in front of the text, without tokens for them.",
    ),
    "idefics": Family(
        attributes=IMAGE,
        tokens=("<fake_token_around_image>",),
        bos=True,
        image={"image_size": 28},
        arguments={"image_size": 28},
    ),
    "instructblip": Family(
        placeholder="",
        image_token="<image>",
        tokens=("<image>",),
        image=SQUARE,
        arguments={"num_query_tokens": 4},
        ids={"image_token_index": "<image>"},
        note="its processor needs a second tokenizer, for the Q-Former. It is refused when the processor is made.",
    ),
    "kosmos-2": Family(
        processor="Kosmos2Processor",
        placeholder="",
        image_token="<image>",
        tokens=("<blank>", *(f"<place_{index}>" for index in range(64))),
        unknown="<blank>",  # the image's tokens are those behind it
        image=SHORTEST,
        arguments={"num_patch_index_tokens": 4},
        config={"latent_query_num": 64, "vision_config.patch_size": 14},
        note="its image tokens are 64 different ids, which are those of words too: they count as text in concepts "
        "(composing warns), and `explain` finds no picture.",
    ),
    "kosmos-2.5": Family(
        processor="Kosmos2_5Processor",
        placeholder="",
        image_token="<|img|>",
        attributes={"image_token": "<|img|>", "boi_token": "<image>", "eoi_token": "</image>"},
        image={"max_patches": 16},
        arguments={"num_image_tokens": 4},
        config={
            "latent_query_num": 4,
            "vision_config.num_hidden_layers": 1,
            "vision_config.num_attention_heads": 1,
            "text_config.init_std": 0.5,  # else the queries see all patches as one
        },  # of 4096 patches, whatever the size
    ),
    "mllama": Family(
        placeholder="<|image|>",
        tokens=("<|python_tag|>",),
        bos=True,
        image=SQUARE,
        config={
            "vision_config.num_global_layers": 1,
            "vision_config.intermediate_layers_indices": [0, 1],
            "vision_config.vision_output_dim": 96,
            "text_config.cross_attention_layers": [1, 3],
        },
    ),
    "paligemma": Family(
        attributes=IMAGE, bos=True, image=SQUARE | {"image_seq_length": 4}, config={"text_config.num_image_tokens": 4}
    ),
    "phi4_multimodal": Family(
        placeholder="<|image|>",
        attributes={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        vlm_class="Phi4MultimodalForCausalLM",
        processor="Phi4MultimodalProcessor",
        image_processor="Phi4MultimodalImageProcessor",
        needs=TORCHVISION,
        note="transformers does not count it among the image-text-to-text models.",
    ),
    "pix2struct": Family(
        placeholder="",
        image={"max_patches": 16, "is_vqa": False},
        note="an encoder-decoder without `input_ids` in the prompt. It is refused when the model is composed.",
    ),
}
