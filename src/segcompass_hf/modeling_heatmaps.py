# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Slots, reference states and SAM image embeddings -> heatmaps and slot confidences (step 4 of the method)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput

from .concept_grids_segcompass import ConceptGrid

HEATMAP_UPSCALE = 4  # SAM's mask prompts are 4x its image embedding, by the strides of its prompt encoder


@dataclass
class SlotMapperOutput(ModelOutput):
    """
    Output of the slot mapper.

    Args:
        heatmap_logits (`torch.Tensor` of shape `(batch_size, num_slots, 4 * height, 4 * width)`):
            One map per slot, logits, before padding is masked; `None` without an image.
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)`):
            Confidence that the slot holds an object, logits.
    """

    heatmap_logits: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None


class HeatmapConv(nn.Conv2d):
    """Convolution over score maps, initialised by its fan-in: with std 0.02 the maps would vanish."""

    def reset_parameters(self) -> None:
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            init.zeros_(self.bias)


class HeatmapBiasConv(HeatmapConv):
    """Last convolution of the heatmap; its bias starts low because most of an image is background."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int, bias_init: float):
        self.bias_init = bias_init  # nn.Conv2d.__init__ calls reset_parameters, which reads it
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.constant_(self.bias, self.bias_init)


class ConceptProjection(nn.Linear):
    """Concept embeddings of image tokens into the space of image embeddings; at first they say nothing."""

    def __init__(self, d_slot: int, sam_dim: int):
        super().__init__(d_slot, sam_dim, bias=False)

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)


class SlotMapper(nn.Module):
    """
    Project every slot onto the image.

    `q_k = SiLU(W LN([e_k ; P r_k]))`; heatmap of slot k: `fuse_h((W_q q_k)_h . (W_k v)_h / sqrt(d_head))`, heads h
    fused by two 3x3 convolutions (`"refine"`) or one 1x1 (`"plain"`), upsampled x4; confidence `c_k = MLP(LN(q_k))`.
    With `heatmap_concepts`, `v` is the image embedding plus `W_m m`, `m` the embedded concepts of the image tokens,
    placed where they lie ([`ConceptGrid`]).

    Args:
        config (`SegCompassConfig`):
            Reads `d_slot`, `heatmap_heads`, `heatmap_fuser`, `heatmap_bias_init` and `heatmap_concepts`.
        hidden_size (`int`):
            Width of the VLM's last hidden states.
        sam_dim (`int`):
            Channels of the SAM image embeddings.
    """

    def __init__(self, config, hidden_size: int, sam_dim: int):
        super().__init__()
        if sam_dim % config.heatmap_heads:
            raise ValueError(
                f"SAM embeddings have {sam_dim} channels and heatmap_heads is {config.heatmap_heads}: the heads must "
                "divide the channels evenly; choose another number of heads."
            )
        self.num_heads = config.heatmap_heads
        self.slot_proj = nn.Linear(config.d_slot, hidden_size, bias=False)
        self.fuse_norm = nn.LayerNorm(2 * hidden_size)
        self.fuse_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.query_proj = nn.Linear(hidden_size, sam_dim, bias=False)
        self.key_proj = HeatmapConv(sam_dim, sam_dim, kernel_size=1, bias=False)
        self.concept_proj = ConceptProjection(config.d_slot, sam_dim) if config.heatmap_concepts else None
        heads, bias = config.heatmap_heads, config.heatmap_bias_init
        if config.heatmap_fuser == "refine":
            self.head_fuser: nn.Module = nn.Sequential(
                HeatmapConv(heads, heads, kernel_size=3, padding=1),
                nn.SiLU(),
                HeatmapBiasConv(heads, 1, kernel_size=3, padding=1, bias_init=bias),
            )
        elif config.heatmap_fuser == "plain":
            self.head_fuser = HeatmapBiasConv(heads, 1, kernel_size=1, padding=0, bias_init=bias)
        else:
            raise ValueError(f"heatmap_fuser is {config.heatmap_fuser!r}; expected 'refine' or 'plain'.")
        self.confidence_norm = nn.LayerNorm(hidden_size)
        self.confidence_fc1 = nn.Linear(hidden_size, hidden_size // 2)
        self.confidence_fc2 = nn.Linear(hidden_size // 2, 1)

    @property
    def embedding_modules(self) -> tuple[str, ...]:
        """What means something for the embeddings of one segmenter only: the space in which slots and locations are
        compared, and what makes maps of their scores. The other modules read slots and reference states alone."""
        with_concepts = () if self.concept_proj is None else ("concept_proj",)
        return ("query_proj", "key_proj", *with_concepts, "head_fuser")

    def forward(
        self,
        reference_states: torch.Tensor,
        slots: torch.Tensor,
        image_embeddings: torch.Tensor | None = None,
        concept_grid: ConceptGrid | None = None,
    ) -> SlotMapperOutput:
        """
        Args:
            reference_states (`torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`):
                Last hidden states at the `<REF_POS>` tokens, zeros where one is missing.
            slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`):
                Concept slots.
            image_embeddings (`torch.Tensor` of shape `(batch_size, sam_dim, height, width)`, *optional*):
                SAM features; without them only the confidences are computed.
            concept_grid ([`ConceptGrid`], *optional*):
                Concepts of the image tokens; with image embeddings and `heatmap_concepts` only, and needed there.

        Returns:
            [`SlotMapperOutput`]
        """
        image_shape = slots.shape[:1] if image_embeddings is None else image_embeddings.shape
        if reference_states.shape[:2] != slots.shape[:2] or slots.shape[0] != image_shape[0]:
            raise ValueError(
                f"reference_states {tuple(reference_states.shape)}, slots {tuple(slots.shape)} and image_embeddings "
                f"{tuple(image_shape)} must agree in batch size, and the first two in the number of slots."
            )
        dtype = self.fuse_norm.weight.dtype  # a quantised linear layer's weight would be uint8
        fused = torch.cat([reference_states.to(dtype), self.slot_proj(slots.to(dtype))], dim=-1)
        slot_states = F.silu(self.fuse_proj(self.fuse_norm(fused)))  # (batch_size, num_slots, hidden_size)
        confidence = F.silu(self.confidence_fc1(self.confidence_norm(slot_states)))
        slot_logits = self.confidence_fc2(confidence).squeeze(-1)  # (batch_size, num_slots)
        if image_embeddings is None:
            return SlotMapperOutput(slot_logits=slot_logits)

        image_embeddings = image_embeddings.to(dtype)
        if self.concept_proj is not None:
            if concept_grid is None:
                raise ValueError(
                    "this model has heatmap_concepts: its slots look at the concepts of image tokens, and need a "
                    "concept_grid (`model.concept_grid`) beside the image embeddings."
                )
            concept_grid = concept_grid.to(image_embeddings.device)
            placed = concept_grid.place(self.concept_proj(concept_grid.embeddings.to(dtype)))  # (batch_size, ., h, w)
            image_embeddings = image_embeddings + placed
        scores = self._scores(slot_states, image_embeddings)
        heatmaps = self.head_fuser(scores.flatten(0, 1))  # (batch_size * num_slots, 1, height, width)
        heatmaps = F.interpolate(heatmaps, scale_factor=HEATMAP_UPSCALE, mode="bilinear", align_corners=False)
        heatmap_logits = heatmaps.view(*slots.shape[:2], *heatmaps.shape[-2:])
        return SlotMapperOutput(heatmap_logits=heatmap_logits, slot_logits=slot_logits)

    def _scores(self, slot_states: torch.Tensor, image_embeddings: torch.Tensor) -> torch.Tensor:
        """Scaled dot products of every slot with every location, per head: `(batch_size, num_slots, heads, h, w)`."""
        batch_size, num_slots, _ = slot_states.shape
        height, width = image_embeddings.shape[-2:]
        query = self.query_proj(slot_states).view(batch_size, num_slots, self.num_heads, -1).transpose(1, 2)
        key = self.key_proj(image_embeddings).view(batch_size, self.num_heads, -1, height * width)
        scores = query @ key / key.shape[2] ** 0.5  # (batch_size, heads, num_slots, height * width)
        return scores.transpose(1, 2).reshape(batch_size, num_slots, self.num_heads, height, width)
