# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny processors of VLM families whose processors differ from the four of `tiny`: other parts, orders and tokens."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from segcompass_hf import SegCompassProcessor

IMAGE = {"image_token": "<image>"}
VIDEO = IMAGE | {"video_token": "<video>"}
SQUARE = {"size": {"height": 28, "width": 28}}
SHORTEST = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
AREA = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, "patch_size": 7, "merge_size": 2}
TILES = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
CLIP = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
INTERN = {
    "image_token": "<IMG_CONTEXT>",
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
VISION = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


@dataclass(frozen=True)
class Family:
    """What a family's processor is built of.

    Args:
        image_processor (`str`): Class name of its image processor.
        patch_token (`str`): What stands for an image patch in the ids, by the family's source.
        placeholder (`str`): What the chat template writes for an image.
        image (`dict`): Arguments of the image processor.
        attributes (`dict[str, str]`): Attributes of the tokenizer and their tokens.
        tokens (`tuple[str, ...]`): Further special tokens.
        arguments (`dict`): What the processor takes besides its parts.
        package (`str`, *optional*): That it needs.
    """

    image_processor: str
    patch_token: str = "<image>"
    placeholder: str = "<image>"
    image: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    package: str | None = None


FAMILIES = {
    "AyaVisionProcessor": Family(
        "GotOcr2ImageProcessorPil",
        "<|IMG_PATCH|>",
        image=SQUARE,
        tokens=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE"),
        arguments={"patch_size": 14, "img_size": 28},
    ),
    "ChameleonProcessor": Family(
        "ChameleonImageProcessorPil",
        image={"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        attributes=IMAGE | {"boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        arguments={"image_seq_length": 4},
    ),
    "Cosmos3EdgeProcessor": Family(
        "Cosmos3EdgeImageProcessorPil",
        "<|image_pad|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        image=AREA,
        attributes=VISION,
    ),
    "Gemma4Processor": Family(
        "Gemma4ImageProcessorPil",
        "<|image|>",
        "<|image|>",
        image={"patch_size": 7, "max_soft_tokens": 70, "pooling_kernel_size": 3},
        attributes={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
    ),
    "GotOcr2Processor": Family(
        "GotOcr2ImageProcessorPil", "<imgpad>", "<img><imgpad></img>", image=SQUARE, tokens=("<img>", "</img>")
    ),
    "IdeficsProcessor": Family(
        "IdeficsImageProcessorPil", placeholder="", image={"image_size": 28}, tokens=("<fake_token_around_image>",)
    ),
    "InternVLProcessor": Family(
        "GotOcr2ImageProcessorPil",
        "<IMG_CONTEXT>",
        "<IMG_CONTEXT>",
        image=SQUARE,
        attributes=INTERN,
        arguments={"image_seq_length": 4},
    ),
    "LlavaNextVideoProcessor": Family(
        "LlavaNextImageProcessorPil", image=SHORTEST | TILES, attributes=VIDEO, arguments=CLIP
    ),
    "LlavaOnevisionProcessor": Family(
        "LlavaOnevisionImageProcessorPil",
        image=SQUARE | TILES,
        attributes=VIDEO,
        arguments={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "MiniCPMV4_6Processor": Family(
        "MiniCPMV4_6ImageProcessorPil",
        "<|image_pad|>",
        "<|image_pad|>",
        image={"scale_resolution": 56, "patch_size": 7},
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
    ),
    "Ovis2Processor": Family(
        "Ovis2ImageProcessorPil",
        "<IMG_ATOM>",
        image=SQUARE,
        tokens=("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        arguments={"image_seq_length": 4},
    ),
    "PaliGemmaProcessor": Family("SiglipImageProcessorPil", image=SQUARE | {"image_seq_length": 4}, attributes=IMAGE),
    "SmolVLMProcessor": Family(
        "SmolVLMImageProcessorPil",
        image={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        attributes=IMAGE,
        tokens=("<fake_token_around_image>", "<global-img>"),
        arguments={"image_seq_len": 4},
        package="num2words",
    ),
    "VideoLlavaProcessor": Family("VideoLlavaImageProcessor", image=SHORTEST, attributes=VIDEO),
}


def need(name: str) -> Family:
    """The row of a processor class; skips the test where this transformers, or a package, is not there."""
    family = FAMILIES[name]
    for needed in (name, family.image_processor):
        found = getattr(transformers, needed, None)
        if found is None or getattr(found, "is_dummy", False):
            pytest.skip(f"transformers {transformers.__version__} has no {needed} here")
    if family.package is not None:
        pytest.importorskip(family.package)
    return family


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """The tests' byte-level tokenizer with the family's tokens and a ChatML template."""
    backend = Tokenizer.from_str(tiny._trained_bpe())
    tokens = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>")
    named = dict.fromkeys((*tokens, family.patch_token, *family.attributes.values(), *family.tokens))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        sep_token="</s>",
        extra_special_tokens=family.attributes,
    )
    template = tiny.CHAT_TEMPLATES["qwen2_5_vl"]
    tokenizer.chat_template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", family.placeholder)
    return tokenizer


def image_processor_of(family: Family) -> Any:
    own = getattr(transformers, family.image_processor)(**family.image)
    if "image_seq_length" in family.image:
        own.image_seq_length = family.image["image_seq_length"]
    return own


def processor_of(name: str) -> SegCompassProcessor:
    """A `SegCompassProcessor` around the family's processor."""
    family = need(name)
    return SegCompassProcessor(
        image_processor_of(family),
        tokenizer_of(family),
        tiny.tiny_sam_image_processor(),
        vlm_processor_class=name,
        vlm_processor_kwargs=dict(family.arguments),
    )


def save_vlm(name: str, folder: Path, config: Any) -> None:
    """The folder of a VLM's repository, as far as its processor is concerned."""
    family = need(name)
    config.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    image_processor_of(family).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **family.arguments}))


def tiled_model_and_processor() -> tuple[Any, SegCompassProcessor]:
    """A random model around LLaVA-NeXT, whose tiles overlap a small whole picture and whose rows end in a token of
    their own, and its processor."""
    from segcompass_hf import SegCompassForReasoningSegmentation

    tokenizer = tiny.tiny_tokenizer("llava")
    processor = SegCompassProcessor(
        transformers.LlavaNextImageProcessorPil(**SHORTEST, **TILES),
        tokenizer,
        tiny.tiny_sam_image_processor(),
        vlm_processor_class="LlavaNextProcessor",
        vlm_processor_kwargs=dict(CLIP),
    )
    llava = tiny.tiny_vlm_config("llava")
    config = transformers.LlavaNextConfig(
        vision_config=llava.vision_config,
        text_config=llava.text_config,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        **TILES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SegCompassForReasoningSegmentation(tiny.tiny_config("llava", vlm_config=config)).eval()
        torch.nn.init.normal_(model.base_model.image_newline, std=0.1)  # left empty by the family
    return model, processor
