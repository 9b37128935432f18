# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny random VLMs of families that differ where most are alike, fed with token ids and pixel tensors directly.

PaliGemma sees its prompt both ways, EXAONE 4.5 gets no positions while it writes, IDEFICS and Mllama look at the image
by cross-attention with a mask per token, BLIP-2 keeps its decoder two levels down.
"""

import tiny
import torch

VOCAB = 64
PAD, BOS, EOS, IMAGE, REF, THINK, UNTHINK, VIDEO, VISION_START, VISION_END = range(10)
FAMILIES = ("paligemma", "exaone4_5", "idefics", "mllama", "blip-2")
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.1,
}


def _paligemma():
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        text_config=TEXT | {"model_type": "gemma"},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCAB,
    )


def _exaone4_5():
    from transformers import Exaone4_5_Config

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_key_value_heads": 2}
    vision |= {"patch_size": 7, "out_hidden_size": 32, "window_size": 28, "fullatt_block_indexes": [1]}
    return Exaone4_5_Config(
        vision_config=vision | {"initializer_range": 0.1},
        text_config=TEXT | {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _idefics():
    from transformers import IdeficsConfig

    vision = {"embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "initializer_range": 0.1}
    return IdeficsConfig(
        vision_config=vision, **TEXT, cross_layer_interval=2, alpha_initializer="ones", alphas_initializer_range=0.5
    )


def _mllama():
    from transformers import MllamaConfig

    vision = {key: value for key, value in VISION.items() if key != "num_attention_heads"} | {"attention_heads": 2}
    vision |= {"num_global_layers": 1, "vision_output_dim": 96, "intermediate_layers_indices": [0, 1]}
    vision |= {"max_num_tiles": 4, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return MllamaConfig(
        vision_config=vision,
        text_config=TEXT | {"cross_attention_layers": [1], "rope_parameters": rope},
        image_token_index=VOCAB,
    )


def _blip_2():
    from transformers import Blip2Config

    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.1, "model_type": "opt"}
    qformer = {name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return Blip2Config(
        vision_config=VISION,
        qformer_config=qformer | {"num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": VOCAB},
        text_config=TEXT | opt,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


CONFIGS = {
    "paligemma": _paligemma,
    "exaone4_5": _exaone4_5,
    "idefics": _idefics,
    "mllama": _mllama,
    "blip-2": _blip_2,
}


def odd_vlm(family: str, seed: int = 0, vocab_size: int = VOCAB, **config_overrides):
    """The VLM alone; gates that start shut are opened. `config_overrides`: fields of its configuration."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CONFIGS[family]()
        config.get_text_config().vocab_size = vocab_size
        for name, value in config_overrides.items():
            setattr(config, name, value)
        vlm = AutoModelForImageTextToText.from_config(config)
        for weight in vlm.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
    vlm.generation_config.eos_token_id, vlm.generation_config.pad_token_id = EOS, PAD
    return vlm.eval()


def odd_model(family: str, **kwargs):
    """A composition around it, with heads that react."""
    from transformers import SamModel

    from segcompass_hf import SegCompassForReasoningSegmentation

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = SegCompassForReasoningSegmentation.from_pretrained_parts(
            odd_vlm(family),
            SamModel(tiny.tiny_sam_config()),
            sae_config={"d_in": 32, "d_sae": 64},
            sae_layer=2,
            d_slot=32,
            ref_token_id=REF,
            think_start_token_id=THINK,
            think_end_token_id=UNTHINK,
            concept_threshold=0.0,
            **kwargs,
        )
        for part in (model.sam, model.codebook, model.slot_encoder, model.slot_mapper):
            for name, weight in part.named_parameters():
                if weight.ndim >= 2 and "pos" not in name:
                    torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model.eval()


def odd_inputs(family: str, rows=(0, 1)) -> dict[str, torch.Tensor]:
    """Prompts of two lengths, padded on the left, each with its image, as the family's processor lays them out."""
    generator = torch.Generator().manual_seed(3)
    words = [torch.randint(10, VOCAB, (length,), generator=generator).tolist() for length in (5, 8)]
    images = torch.randn(2, 3, 28, 28, generator=generator)
    patches = torch.randn(2, 16, 3 * 2 * 7 * 7, generator=generator)
    front = {"paligemma": [IMAGE] * 4 + [BOS], "blip-2": [IMAGE] * 4 + [BOS], "mllama": [BOS], "idefics": [BOS]}
    front["exaone4_5"] = [BOS, VISION_START, *[IMAGE] * 4, VISION_END]
    prompts = [front[family] + words[row] for row in rows]
    width, rows = max(map(len, prompts)), list(rows)
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = (ids != PAD).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "sam_pixel_values": images_for_sam(rows)}
    if family == "exaone4_5":
        grid = torch.tensor([[1, 4, 4]] * len(rows))
        return inputs | {"pixel_values": patches[rows].flatten(0, 1), "image_grid_thw": grid}
    if family == "idefics":
        return inputs | {"pixel_values": images[rows, None], "image_attention_mask": mask[..., None]}
    if family == "mllama":
        tiles = torch.nn.functional.pad(images[rows, None, None], (0, 0, 0, 0, 0, 0, 0, 3))  # one of four is used
        seen = torch.zeros(*ids.shape, 1, 4, dtype=torch.long)
        seen[..., 0] = mask[..., None]
        return inputs | {
            "pixel_values": tiles,
            "aspect_ratio_ids": torch.ones(len(rows), 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]] * len(rows)),
            "cross_attention_mask": seen,
        }
    types = {"token_type_ids": torch.zeros_like(ids)} if family == "paligemma" else {}
    return inputs | types | {"pixel_values": images[rows]}


def images_for_sam(rows) -> torch.Tensor:
    side = tiny.SAM_CANVAS
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))[list(rows)]
