"""The parts of scenes-tiny: a word-level tokenizer, a tiny LLaVA and a tiny SAM, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2Model,
    SamConfig,
    SamModel,
)

from segcompass_hf import SegCompassProcessor
from segcompass_hf.data.scenes.drawing import GRID, IMAGE_SIZE
from segcompass_hf.data.scenes.instructions import words

HIDDEN_SIZE = 128
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower-cased, punctuation apart; other words become `<unk>`."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    vocabulary = {token: index for index, token in enumerate([*special, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=True,
    )
    fast.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>", "<REF_POS>")])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(num_slots: int = 4) -> SegCompassProcessor:
    """Processor of scenes-tiny: any image is squeezed to 112 x 112 for the VLM and padded to it for SAM."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor, SamImageProcessorPil

    side, pixels = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    vlm_processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, do_center_crop=False, **pixels),
        build_tokenizer(),
        patch_size=IMAGE_SIZE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    sam_processor = SamImageProcessorPil(
        size={"longest_edge": IMAGE_SIZE},
        pad_size=side,
        mask_size={"longest_edge": IMAGE_SIZE // 2},
        mask_pad_size={"height": IMAGE_SIZE // 2, "width": IMAGE_SIZE // 2},
        **pixels,
    )
    return SegCompassProcessor(
        vlm_processor.image_processor,
        vlm_processor.tokenizer,
        sam_processor,
        num_slots=num_slots,
        vlm_processor_kwargs={
            "patch_size": IMAGE_SIZE // GRID,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        instruction_template="{instruction}",
        chat_template=CHAT_TEMPLATE,
    )


def build_vlm(tokenizer: PreTrainedTokenizerFast, num_layers: int = 4) -> LlavaForConditionalGeneration:
    """A LLaVA of about 1.7 M parameters whose patches are the cells of the grid of Scenes.

    The scale of the initial weights matters at this size: with the library's 0.02 nothing is learned for long.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN_SIZE,
            intermediate_size=4 * HIDDEN_SIZE,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=IMAGE_SIZE // GRID,
            projection_dim=HIDDEN_SIZE,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=3 * HIDDEN_SIZE,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    vlm = LlavaForConditionalGeneration(config)
    for name, parameter in vlm.named_parameters():
        if "position_embedding" in name or "patch_embedding" in name:
            nn.init.trunc_normal_(parameter, std=0.05)
        elif parameter.dim() == 2:
            into_residual = "language_model" in name and ("o_proj" in name or "down_proj" in name)
            nn.init.trunc_normal_(parameter, std=0.03 if into_residual else 0.06)
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    return vlm


def build_sam() -> SamModel:
    """A SAM of about 0.7 M parameters: 112-pixel canvas, patches of 8, masks of 56 x 56."""
    config = SamConfig(
        vision_config={
            "hidden_size": 96,
            "output_channels": 64,
            "num_pos_feats": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "window_size": 0,
            "global_attn_indexes": [0, 1, 2, 3],
            "mlp_dim": 288,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": 64,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "mask_input_channels": 16,
        },
        mask_decoder_config={
            "hidden_size": 64,
            "mlp_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
            "layer_norm_eps": 1e-5,
        },
    )
    sam = SamModel(config)
    for name, parameter in sam.vision_encoder.named_parameters():
        if name == "pos_embed":
            nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=0.06)
    return sam


def build_sam2() -> Sam2Model:
    """A SAM 2 of about 0.6 M parameters over the same canvas: its first patches are of 2 pixels, so that its embedding
    and its masks have the size of [`build_sam`]'s."""
    channels, decoder_width = [16, 32, 96, 128], 64
    sides = [IMAGE_SIZE // stride for stride in (2, 4, 8)]  # 56, 28, 14
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": channels[0],
                "image_size": [IMAGE_SIZE, IMAGE_SIZE],
                "patch_kernel_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "blocks_per_stage": [1, 1, 3, 1],
                "embed_dim_per_stage": channels,
                "num_attention_heads_per_stage": [1, 2, 4, 4],
                "window_size_per_stage": [8, 4, 14, 7],
                "global_attention_blocks": [],
                "mlp_ratio": 3.0,
            },
            "backbone_channel_list": channels[::-1],
            "backbone_feature_sizes": [[side, side] for side in sides],
            "fpn_hidden_size": decoder_width,
        },
        prompt_encoder_config={"hidden_size": decoder_width, "image_size": IMAGE_SIZE, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": decoder_width,
            "mlp_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    )
    sam = Sam2Model(config)
    backbone = sam.vision_encoder.backbone
    for name, parameter in backbone.named_parameters():
        if name.startswith("pos_embed"):
            nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=0.06)
    return sam


SEGMENTERS: dict[str, Callable[[], PreTrainedModel]] = {"sam": build_sam, "sam2": build_sam2}


def normalize_pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scale `(batch, height, width, 3)` uint8 to `(batch, 3, height, width)` as an image processor does."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
