# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Random models at real and at small shapes, and the tensors of their micro-batches; without trl and datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from segcompass_hf import SegCompassConfig, SegCompassForReasoningSegmentation

PAD, IMAGE, REF, THINK, END_THINK, FIRST_WORD = 0, 1, 2, 3, 4, 5
POLICY_DRIFT = 0.05  # noise on the trained VLM layers, as a share of their spread: policy and reference differ


@dataclass(frozen=True)
class Preset:
    """Shapes. `llava-7b` is LLaVA-1.5-7B and `qwen3-vl-8b` Qwen3-VL-8B, both with SAM's decoder and 576 image tokens;
    the others keep LLaVA's proportions (see `proportions`), and the tiny ones are for tests.

    Args:
        width, depth, heads, feed_forward, vocabulary (`int`): Of the language model.
        clip_width, clip_depth (`int`): Of the vision tower.
        d_sae, d_slot (`int`): Features, and channels of the codebook.
        sam_width, sam_side (`int`): Channels and side of SAM's image embedding.
        padded_prompt, padded_completion (`int`): Widths that the original's layout pads to in workload (b).
        prompt_tokens, completion_tokens (`int`): Of every row of workload (a), image tokens included.
        image_size, patch_size (`int`): Pixels per side of the vision tower's input and of its patches.
        merge (`int`): Patches per side of one image token.
        batch_size (`int`): Completions per micro-batch.
        active (`int`): Concepts per token above the threshold.
        group_size, group_prompt_tokens (`int`): Completions of the one prompt of workload (c), and its tokens.
        family (`str`): A key of `VLM_CONFIGS`.
        kv_heads (`int`, *optional*): Of the language model; `heads` when left out.
        sam_encoder_width, sam_encoder_depth (`int`): SAM's image encoder. No training step runs it; SAM ViT-H has
            1280 and 32.
    """

    width: int
    depth: int
    heads: int
    feed_forward: int
    vocabulary: int
    clip_width: int
    clip_depth: int
    d_sae: int
    d_slot: int
    sam_width: int
    sam_side: int
    padded_prompt: int
    padded_completion: int
    prompt_tokens: int = 676
    completion_tokens: int = 250
    image_size: int = 336
    patch_size: int = 14
    merge: int = 1
    batch_size: int = 2
    active: int = 64
    group_size: int = 8
    group_prompt_tokens: int = 1200
    family: str = "llava"
    kv_heads: int | None = None
    sam_encoder_width: int = 32
    sam_encoder_depth: int = 1


_TINY = {"prompt_tokens": 14, "completion_tokens": 14, "image_size": 42, "active": 8, "group_size": 4}
_TINY |= {"group_prompt_tokens": 30}
_QWEN = {"family": "qwen3_vl", "merge": 2}
PRESETS = {
    "llava-7b": Preset(4096, 32, 32, 11008, 32064, 1024, 24, 65536, 512, 256, 64, 1400, 2000),
    "qwen3-vl-8b": Preset(
        4096, 36, 32, 12288, 151936, 1152, 27, 65536, 512, 256, 64, 1400, 2000,
        kv_heads=8, image_size=768, patch_size=16, **_QWEN,
    ),
    "cpu": Preset(384, 12, 3, 1032, 1127, 96, 9, 2304, 48, 96, 24, 1024, 512),
    "cpu-shallow": Preset(384, 4, 3, 1032, 376, 96, 3, 768, 48, 96, 24, 1024, 512),
    "tiny": Preset(32, 4, 2, 64, 64, 16, 2, 64, 32, 32, 4, 24, 24, **_TINY),
    "tiny-qwen3-vl": Preset(
        32, 4, 2, 64, 64, 16, 2, 64, 32, 32, 4, 24, 24, kv_heads=1, patch_size=7, **_TINY, **_QWEN
    ),
}  # fmt: skip


def preset_of(name: str, depth: int | None = None) -> Preset:
    """A preset by its name, with so many layers of the language model where `depth` says so."""
    return PRESETS[name] if depth is None else replace(PRESETS[name], depth=depth)


def _text_config(preset: Preset) -> dict[str, Any]:
    return {
        "vocab_size": preset.vocabulary,
        "hidden_size": preset.width,
        "intermediate_size": preset.feed_forward,
        "num_hidden_layers": preset.depth,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads or preset.heads,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "eos_token_id": PAD,  # no text ends otherwise
    }


def _llava_config(preset: Preset) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **_text_config(preset)},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": preset.clip_width,
            "intermediate_size": 4 * preset.clip_width,
            "num_hidden_layers": preset.clip_depth,
            "num_attention_heads": max(1, preset.clip_width // 64),
            "image_size": preset.image_size,
            "patch_size": preset.patch_size,
        },
        "image_token_index": IMAGE,
    }


def _qwen3_vl_config(preset: Preset) -> dict[str, Any]:
    head_dim = preset.width // preset.heads
    side = 5 * head_dim // 32  # 20 of the 64 frequencies for the height and for the width each, the rest for time
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    rope["mrope_section"] = [head_dim // 2 - 2 * side, side, side]
    return {
        "model_type": "qwen3_vl",
        "text_config": {"head_dim": head_dim, "rope_parameters": rope, **_text_config(preset)},
        "vision_config": {
            "hidden_size": preset.clip_width,
            "intermediate_size": 4304 * preset.clip_width // 1152,
            "depth": preset.clip_depth,
            "num_heads": max(1, preset.clip_width // 72),
            "out_hidden_size": preset.width,
            "patch_size": preset.patch_size,
            "spatial_merge_size": preset.merge,
            "num_position_embeddings": (preset.image_size // preset.patch_size) ** 2,
            "deepstack_visual_indexes": sorted({int(preset.clip_depth * share) for share in (0.3, 0.6, 0.9)}),
        },
        "image_token_id": IMAGE,
        # There are no videos, and images need no marks around them here: no word is any of these.
        "video_token_id": PAD,
        "vision_start_token_id": PAD,
        "vision_end_token_id": PAD,
    }


VLM_CONFIGS = {"llava": _llava_config, "qwen3_vl": _qwen3_vl_config}


def model_config(preset: Preset) -> SegCompassConfig:
    """A SegCompass of the preset's family."""
    sam_image, depth = 16 * preset.sam_side, preset.sam_encoder_depth
    heads = max(1, preset.sam_width // 32)
    return SegCompassConfig(
        vlm_config=VLM_CONFIGS[preset.family](preset),
        sam_config={
            "vision_config": {
                "hidden_size": preset.sam_encoder_width,
                "output_channels": preset.sam_width,
                "num_pos_feats": preset.sam_width // 2,
                "num_hidden_layers": depth,
                "num_attention_heads": max(2, preset.sam_encoder_width // 80),
                "image_size": sam_image,
                "patch_size": 16,
                "mlp_dim": 4 * preset.sam_encoder_width,
                "global_attn_indexes": sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)}),
            },
            "prompt_encoder_config": {"hidden_size": preset.sam_width, "image_size": sam_image, "patch_size": 16},
            "mask_decoder_config": {
                "hidden_size": preset.sam_width,
                "mlp_dim": 8 * preset.sam_width,
                "num_attention_heads": heads,
                "iou_head_hidden_dim": preset.sam_width,
            },
        },
        sae_config={
            "d_in": preset.width,
            "d_sae": preset.d_sae,
            "normalize_activations": "per_token",
            "initializer_range": preset.width**-0.5,
        },
        sae_layer=preset.depth // 2,
        d_slot=preset.d_slot,
        num_slots=4,
        ref_token_id=REF,
        think_start_token_id=THINK,
        think_end_token_id=END_THINK,
    )


def build_model(preset: Preset, device: str, dtype: torch.dtype) -> nn.Module:
    """Random weights, frozen as in training, with about `preset.active` concepts per token."""
    torch.manual_seed(0)
    with torch.device(device):
        model = SegCompassForReasoningSegmentation(model_config(preset)).freeze_for_training().train()
    # transformers' SAM starts at 1e-10: unit gain, so that masks and gradients are worth comparing.
    for part in (model.sam, model.codebook, model.slot_encoder, model.slot_mapper):
        for name, weight in part.named_parameters():
            if weight.ndim >= 2 and "pos" not in name:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    # States of unit spread meet directions of unit length: the bias sets the share of features above the threshold.
    share = torch.tensor(1 - preset.active / preset.d_sae)
    model.sae.b_enc.data.fill_(model.config.concept_threshold - torch.distributions.Normal(0, 1).icdf(share).item())
    model.to(dtype)
    model.sam.shared_image_embedding.float()  # as `from_pretrained` keeps them
    return model


@torch.no_grad()
def let_policy_drift(model: nn.Module) -> None:
    """Move the trained layers of the VLM a little, as after some steps, so that the KL term is not zero."""
    for parameter in model.vlm.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter) * POLICY_DRIFT * parameter.std())


def token_rows(preset: Preset, workload: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and completion of every row: words, the image's tokens, words; reasoning, then 4 `<REF_POS>`."""
    generator = torch.Generator().manual_seed(2)
    image_tokens = (preset.image_size // preset.patch_size // preset.merge) ** 2
    rows, one_prompt = [], None
    prompt_tokens = preset.group_prompt_tokens if workload == "c" else preset.prompt_tokens
    for row in range(preset.group_size if workload == "c" else preset.batch_size):
        # In workload b texts are up to a quarter shorter, and the completions up to a fifth longer.
        part = row / max(preset.batch_size - 1, 1) if workload == "b" else 0.0
        words = round((prompt_tokens - image_tokens) * (1 - part / 4))
        length = round(preset.completion_tokens * (0.8 + 0.4 * part)) if workload == "b" else preset.completion_tokens
        text = torch.randint(FIRST_WORD, preset.vocabulary, (words + length,), generator=generator)
        prompt = torch.cat([text[: words // 2], torch.full((image_tokens,), IMAGE), text[words // 2 : words]])
        if workload == "c":
            prompt = one_prompt = prompt if one_prompt is None else one_prompt
        completion = text[words:]
        completion[0], completion[-6], completion[-5:-1] = THINK, END_THINK, REF
        rows.append((prompt, completion))
    return rows


def in_one_width(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], widths: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(rows, sum(widths))`: prompts end, and completions begin, behind the first width."""
    ids = torch.full((len(rows), sum(widths)), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        span = slice(widths[0] - len(prompt), widths[0] + len(completion))
        ids[row, span], mask[row, span] = torch.cat([prompt, completion]), 1
    return ids.to(device), mask.to(device)


Draw = Callable[..., torch.Tensor]


def drawing(model: nn.Module, rows: int, pictures: int | None = None) -> Draw:
    """What draws noise `(rows, *shape)`, always the same; with `pictures=1` all rows have the same."""
    generator, weight, pictures = torch.Generator().manual_seed(1), model.codebook.weight, pictures or rows

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(pictures, *shape, generator=generator).to(weight).expand(rows, *shape)

    return noise


def vlm_pictures(preset: Preset, draw: Draw) -> dict[str, torch.Tensor]:
    """The VLM's image inputs: pixels `(rows, 3, size, size)`; patches of all rows and their grids for the Qwens."""
    if preset.family == "llava":
        return {"pixel_values": draw(3, preset.image_size, preset.image_size)}
    side = preset.image_size // preset.patch_size
    patches = draw(side * side, 3 * 2 * preset.patch_size**2)  # every picture twice, as two frames
    grids = torch.tensor([[1, side, side]] * len(patches), device=patches.device)
    return {"pixel_values": patches.flatten(0, 1), "image_grid_thw": grids}


def token_kinds(preset: Preset, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Marks of image tokens, which the Qwens count positions by."""
    return {} if preset.family == "llava" else {"mm_token_type_ids": (ids == IMAGE).int()}


def mask_targets(preset: Preset, model: nn.Module, draw: Draw) -> dict[str, torch.Tensor]:
    """What `model.forward` takes for the segmentation loss beside `num_objects`."""
    embeddings = draw(preset.sam_width, preset.sam_side, preset.sam_side)
    side = 4 * preset.sam_side
    labels = (draw(model.config.num_slots, side, side) > 0).to(embeddings)
    sizes = torch.tensor([[16 * preset.sam_side, 12 * preset.sam_side]] * len(embeddings), device=embeddings.device)
    return {"image_embeddings": embeddings, "mask_labels": labels, "reshaped_input_sizes": sizes}


def supervised_inputs(model: nn.Module, preset: Preset) -> dict[str, torch.Tensor]:
    """Rows of workload (a) for `model(**inputs).loss`: language and segmentation losses of the completions."""
    rows = token_rows(preset, "a")
    ids, mask = in_one_width(rows, (preset.prompt_tokens, preset.completion_tokens), model.device)
    labels = ids.clone()
    labels[:, : preset.prompt_tokens] = -100
    draw = drawing(model, len(rows))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **token_kinds(preset, ids)}
    inputs |= vlm_pictures(preset, draw) | mask_targets(preset, model, draw)
    return inputs | {"num_objects": torch.tensor([1, 2] * len(rows), device=ids.device)[: len(rows)]}


def prompt_inputs(model: nn.Module, preset: Preset, batch_size: int) -> dict[str, torch.Tensor]:
    """Prompts of workload (a) with pictures for the VLM and for SAM, as `model.segment` takes them."""
    rows = [(prompt, prompt[:0]) for prompt, _ in token_rows(replace(preset, batch_size=batch_size), "a")]
    ids, mask = in_one_width(rows, (preset.prompt_tokens, 0), model.device)
    draw, side = drawing(model, batch_size), 16 * preset.sam_side
    sizes = torch.tensor([[side, side]] * batch_size, device=ids.device)
    inputs = {"input_ids": ids, "attention_mask": mask, **token_kinds(preset, ids), **vlm_pictures(preset, draw)}
    return inputs | {"sam_pixel_values": draw(3, side, side), "reshaped_input_sizes": sizes, "original_sizes": sizes}


def proportions(preset: Preset) -> dict[str, float]:
    """Floating-point operations of one sample of workload (a), forward, by part; in units of one whole VLM pass.

    Of LLaVA's kind only.
    """
    with FakeTensorMode():
        # Eager attention is counted; the fused kernels of a CPU are not.
        eager = {"attn_implementation": "eager"}
        model = SegCompassForReasoningSegmentation._from_config(model_config(preset), **eager).requires_grad_(False)
        tokens = preset.prompt_tokens + preset.completion_tokens
        states = torch.empty(1, tokens, preset.width)
        causal = torch.empty(1, 1, tokens, tokens, dtype=torch.bool)
        acts = torch.empty(1, tokens, preset.d_sae)
        image = torch.empty(1, preset.sam_width, preset.sam_side, preset.sam_side)
        heatmap = torch.empty(1, 1, 4 * preset.sam_side, 4 * preset.sam_side)
        pixels = torch.empty(1, 3, preset.image_size, preset.image_size)
        base, stage = model.base_model, model.mask_stage
        parts = {
            "vision tower": lambda: base.vision_tower(pixels),
            "decoder layers": lambda: base.language_model(inputs_embeds=states, attention_mask=causal),
            "head over all tokens": lambda: model.get_output_embeddings()(states),
            "SAE encode": lambda: model.sae.encode(states),
            "SAE decode": lambda: model.sae.decode(acts),
            "dense codebook": lambda: model.codebook.dense(acts),
            "slot encoder": lambda: model.slot_encoder(torch.empty(1, tokens, preset.d_slot)),
            "SAM's decoder, one slot": lambda: stage.decode(image, heatmap),
        }
        counts = {}
        for name, part in parts.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                part()
            counts[name] = counter.get_total_flops()
    whole = counts["vision tower"] + counts["decoder layers"] + counts["head over all tokens"]
    return {name: count / whole for name, count in counts.items()}
