# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Models and micro-batches of the training-step benchmark: presets, random weights, and the two layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from train_step_formulations import StepInputs, loss_weights

from segcompass_hf import SegCompassConfig, SegCompassForReasoningSegmentation
from segcompass_hf.original_inputs_segcompass import duplicate_completion
from segcompass_hf.reading_segcompass import MaskTargets
from segcompass_hf.training.grpo.forward import JointTargets
from segcompass_hf.training.grpo.passes import Prompts

PAD, IMAGE, REF, THINK, END_THINK, FIRST_WORD = 0, 1, 2, 3, 4, 5
POLICY_DRIFT = 0.05  # noise on the trained VLM layers, as a share of their spread: policy and reference differ


@dataclass(frozen=True)
class Preset:
    """Shapes. `llava-7b` is LLaVA-1.5-7B with SAM's decoder; the others keep its proportions (see `proportions`).

    Args:
        width, depth, heads, feed_forward, vocabulary (`int`): Of the language model.
        clip_width, clip_depth (`int`): Of the vision tower; always 336 pixels in patches of 14, 576 image tokens.
        d_sae, d_slot (`int`): Features, and channels of the codebook.
        sam_width, sam_side (`int`): Channels and side of SAM's image embedding.
        prompt_tokens, completion_tokens (`int`): Of every row of workload (a), image tokens included.
        image_size (`int`): Pixels per side of the vision tower's input.
        batch_size (`int`): Completions per micro-batch.
        active (`int`): Concepts per token above the threshold.
        padded_prompt, padded_completion (`int`): Widths that the original's layout pads to in workload (b).
        group_size, group_prompt_tokens (`int`): Completions of the one prompt of workload (c), and its tokens.
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
    batch_size: int = 2
    active: int = 64
    group_size: int = 8
    group_prompt_tokens: int = 1200


PRESETS = {
    "llava-7b": Preset(4096, 32, 32, 11008, 32064, 1024, 24, 65536, 512, 256, 64, 1400, 2000),
    "cpu": Preset(384, 12, 3, 1032, 1127, 96, 9, 2304, 48, 96, 24, 1024, 512),
    "cpu-shallow": Preset(384, 4, 3, 1032, 376, 96, 3, 768, 48, 96, 24, 1024, 512),
    "tiny": Preset(
        32, 4, 2, 64, 64, 16, 2, 64, 32, 32, 4, 24, 24, prompt_tokens=14, completion_tokens=14, image_size=42,
        active=8, group_size=4, group_prompt_tokens=30,
    ),
}  # fmt: skip


def model_config(preset: Preset) -> SegCompassConfig:
    """A SegCompass of LLaVA's kind. SAM's image encoder, which no training step runs, has one narrow layer."""
    sam_image = 16 * preset.sam_side
    heads = max(1, preset.sam_width // 32)
    return SegCompassConfig(
        vlm_config={
            "model_type": "llava",
            "text_config": {
                "model_type": "llama",
                "vocab_size": preset.vocabulary,
                "hidden_size": preset.width,
                "intermediate_size": preset.feed_forward,
                "num_hidden_layers": preset.depth,
                "num_attention_heads": preset.heads,
                "num_key_value_heads": preset.heads,
                "max_position_embeddings": 4096,
                "pad_token_id": PAD,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": preset.clip_width,
                "intermediate_size": 4 * preset.clip_width,
                "num_hidden_layers": preset.clip_depth,
                "num_attention_heads": max(1, preset.clip_width // 64),
                "image_size": preset.image_size,
                "patch_size": 14,
            },
            "image_token_index": IMAGE,
        },
        sam_config={
            "vision_config": {
                "hidden_size": 32,
                "output_channels": preset.sam_width,
                "num_pos_feats": preset.sam_width // 2,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": sam_image,
                "patch_size": 16,
                "mlp_dim": 64,
                "global_attn_indexes": [0],
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


def make_inputs(
    model: nn.Module, preset: Preset, workload: Literal["a", "b", "c"], layout: Literal["original", "ours"]
) -> StepInputs:
    """A micro-batch, the same tokens in both layouts.

    Workload `a`: rows of equal length, no padding. Workload `b`: rows of differing length; the original's layout pads
    prompts and completions to fixed widths and its second pass reads the completion twice, the second time with its
    padding as tokens; ours pads to the longest row and reads everything once. Workload `c`: one prompt with its
    picture and objects, and a group of completions.
    """
    rows = _rows(preset, workload)
    widths = [max(len(row[part]) for row in rows) for part in (0, 1)]
    if workload == "b" and layout == "original":
        widths = [preset.padded_prompt, preset.padded_completion]
    ids = torch.full((len(rows), sum(widths)), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        span = slice(widths[0] - len(prompt), widths[0] + len(completion))
        ids[row, span], mask[row, span] = torch.cat([prompt, completion]), 1
    device, weight = model.device, model.codebook.weight
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        pictures = 1 if workload == "c" else len(rows)
        return torch.randn(pictures, *shape, generator=generator).to(weight).expand(len(rows), *shape)

    ids, mask = ids.to(device), mask.to(device)
    image = noise(3, preset.image_size, preset.image_size)
    second = {"input_ids": ids, "attention_mask": mask}
    if workload == "b" and layout == "original":
        names = ("input_ids", "attention_mask", "position_ids")
        second = dict(zip(names, duplicate_completion(ids, mask, ids[:, widths[0] :], PAD), strict=True))
    side = 4 * preset.sam_side
    objects = torch.full((len(rows),), 2) if workload == "c" else torch.tensor([1, 2] * len(rows))[: len(rows)]
    embeddings = noise(preset.sam_width, preset.sam_side, preset.sam_side)
    labels = (noise(model.config.num_slots, side, side) > 0).to(weight)
    sizes = torch.tensor([[16 * preset.sam_side, 12 * preset.sam_side]] * len(rows)).to(device)
    masks = MaskTargets(labels, objects.to(device), loss_weights=loss_weights(model), decode="matched")
    prompts = None
    if workload == "c":
        first = {"input_ids": ids[:1, : widths[0]], "attention_mask": mask[:1, : widths[0]], "pixel_values": image[:1]}
        prompts = Prompts(torch.zeros(len(rows), dtype=torch.long, device=device), first)
    return StepInputs(
        vlm=model.vlm_inputs(ids, attention_mask=mask, pixel_values=image),
        second=model.vlm_inputs(**second, pixel_values=image),
        completion_mask=mask[:, widths[0] :],
        advantages=torch.tensor([1.0, -0.5, 0.5, -1.0] * len(rows))[: len(rows)].to(device),
        targets=JointTargets(mask[:, widths[0] :], embeddings, sizes, masks, prompts=prompts),
    )


def _rows(preset: Preset, workload: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and completion of every row: words, the image's tokens, words; reasoning, then 4 `<REF_POS>`."""
    generator = torch.Generator().manual_seed(2)
    image_tokens = (preset.image_size // 14) ** 2
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


def proportions(preset: Preset) -> dict[str, float]:
    """Floating-point operations of one sample of workload (a), forward, by part; in units of one whole VLM pass."""
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
