# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""MobileSAM (https://arxiv.org/abs/2306.14289): transformers' SAM with a TinyViT as its image encoder.

Batch norms of the published weights are part of the convolutions here (`segcompass convert` folds them), so that no
training can move their statistics.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoderOutput,
    SamVisionNeck,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mobile_sam import MobileSamConfig, MobileSamVisionConfig


def to_windows(states: torch.Tensor, side: int) -> torch.Tensor:
    """Cut a map `(batch_size, height, width, channels)` into windows `(num_windows, side ** 2, channels)`.

    The map is padded with zeros at the bottom and right to a multiple of `side`; padding takes part in attention, as
    the published weights were trained.
    """
    height, width = states.shape[1:3]
    padded = F.pad(states, (0, 0, 0, -width % side, 0, -height % side))
    cut = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (batch_size, rows, side, columns, side, channels)
    return cut.transpose(2, 3).reshape(-1, side**2, states.shape[-1])


def from_windows(windows: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """The map `(batch_size, height, width, channels)` that [`to_windows`] cut."""
    rows, columns = -(-height // side), -(-width // side)
    cut = windows.view(-1, rows, columns, side, side, windows.shape[-1])
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `(n, heads, length, head_dim)` spelled out, which can return its weights."""
    scores = query @ key.transpose(-1, -2) * scaling + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class MobileSamPatchEmbeddings(nn.Module):
    """Pixels `(batch_size, 3, canvas, canvas)` to cells of 4 pixels, by two convolutions of stride 2."""

    def __init__(self, config: MobileSamVisionConfig):
        super().__init__()
        dim = config.embed_dims[0]
        self.conv1 = nn.Conv2d(config.num_channels, dim // 2, 3, stride=2, padding=1)
        self.activation = ACT2FN[config.hidden_act]
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.activation(self.conv1(pixel_values)))


class MobileSamConvLayer(GradientCheckpointingLayer):
    """Inverted bottleneck of the first stage: widen, filter each channel on its own, narrow; `(batch_size, dim, h, w)`
    to the same."""

    def __init__(self, config: MobileSamVisionConfig):
        super().__init__()
        dim = config.embed_dims[0]
        inner = int(dim * config.expand_ratio)
        self.conv1 = nn.Conv2d(dim, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.conv3 = nn.Conv2d(inner, dim, 1)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.conv2(self.activation(self.conv1(states))))
        return self.activation(states + self.conv3(inner))


class MobileSamVisionAttention(nn.Module):
    """Attention within a window, with a learned bias for each distance between two cells."""

    is_causal = False

    def __init__(self, config: MobileSamVisionConfig, stage: int):
        super().__init__()
        dim = config.embed_dims[stage]
        self.config = config
        self.num_heads = config.num_heads[stage]
        self.window_size = config.window_sizes[stage]
        self.scaling = (dim // self.num_heads) ** -0.5
        self.layer_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)  # query, key and value of the first head, then of the second, ...
        self.proj = nn.Linear(dim, dim)
        # [head, rows apart * window_size + columns apart]
        self.relative_position_bias = nn.Parameter(torch.zeros(self.num_heads, self.window_size**2))

    def position_bias(self) -> torch.Tensor:
        """What is added to the scores of a window's cells, `(1, num_heads, window_size ** 2, window_size ** 2)`."""
        places = torch.arange(self.window_size, device=self.relative_position_bias.device)
        apart = (places[:, None] - places).abs()  # (window_size, window_size)
        table = self.relative_position_bias.unflatten(1, (self.window_size, self.window_size))
        bias = table[:, apart[:, None, :, None], apart[None, :, None, :]]  # (heads, row, column, other row, column)
        return bias.flatten(3, 4).flatten(1, 2)[None]

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Windows `(num_windows, window_size ** 2, dim)` to the same, and the weights where they are computed."""
        heads = self.qkv(self.layer_norm(windows)).unflatten(-1, (self.num_heads, 3, -1))
        query, key, value = heads.permute(3, 0, 2, 1, 4)  # each (num_windows, num_heads, window_size ** 2, head_dim)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        bias = self.position_bias().to(query.dtype)
        attended, weights = attend(self, query, key, value, bias, scaling=self.scaling, dropout=0.0)
        return self.proj(attended.flatten(2)), weights


class MobileSamMLP(nn.Module):
    """Norm and two linear layers over the last dimension."""

    def __init__(self, config: MobileSamVisionConfig, dim: int):
        super().__init__()
        inner = int(dim * config.mlp_ratio)
        self.layer_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(dim, inner)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(self.layer_norm(states))))


class MobileSamVisionLayer(GradientCheckpointingLayer):
    """Attention within windows, a 3x3 convolution that lets them exchange, an MLP; `(batch_size, dim, h, w)` to the
    same."""

    def __init__(self, config: MobileSamVisionConfig, stage: int):
        super().__init__()
        dim = config.embed_dims[stage]
        self.attention = MobileSamVisionAttention(config, stage)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = MobileSamMLP(config, dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        side, cells = self.attention.window_size, states.permute(0, 2, 3, 1)  # (batch_size, h, w, dim)
        attended, _ = self.attention(to_windows(cells, side))
        cells = cells + from_windows(attended, side, *cells.shape[1:3])
        cells = self.local_conv(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (cells + self.mlp(cells)).permute(0, 3, 1, 2)


class MobileSamDownsampling(nn.Module):
    """From one stage's width and cells to the next's."""

    def __init__(self, config: MobileSamVisionConfig, stage: int):
        super().__init__()
        dim, next_dim = config.embed_dims[stage : stage + 2]
        self.conv1 = nn.Conv2d(dim, next_dim, 1)
        self.conv2 = nn.Conv2d(next_dim, next_dim, 3, stride=config.strides[stage], padding=1, groups=next_dim)
        self.conv3 = nn.Conv2d(next_dim, next_dim, 1)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.activation(self.conv2(self.activation(self.conv1(states)))))


class MobileSamVisionStage(nn.Module):
    """Layers of one width, and what leads to the next stage."""

    def __init__(self, config: MobileSamVisionConfig, stage: int):
        super().__init__()
        self.layers = nn.ModuleList(
            MobileSamVisionLayer(config, stage) if stage else MobileSamConvLayer(config)
            for _ in range(config.depths[stage])
        )
        is_last = stage == len(config.depths) - 1
        self.downsample = nn.Identity() if is_last else MobileSamDownsampling(config, stage)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states)
        return self.downsample(states)


class MobileSamVisionEncoder(SamPreTrainedModel):
    """Image -> embedding: TinyViT and SAM's neck.

    Args:
        config ([`MobileSamVisionConfig`]): The configuration.
    """

    config: MobileSamVisionConfig
    config_class = MobileSamVisionConfig
    _no_split_modules = ["MobileSamConvLayer", "MobileSamVisionLayer"]
    _can_record_outputs = {
        "hidden_states": [MobileSamConvLayer, MobileSamVisionLayer],
        "attentions": MobileSamVisionAttention,
    }

    def __init__(self, config: MobileSamVisionConfig):
        super().__init__(config)
        self.patch_embed = MobileSamPatchEmbeddings(config)
        self.stages = nn.ModuleList(MobileSamVisionStage(config, stage) for stage in range(len(config.depths)))
        self.neck = SamVisionNeck(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MobileSamVisionAttention):
            init.zeros_(module.relative_position_bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple | SamVisionEncoderOutput:
        """Embed images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, canvas, canvas)`): Normalised, padded images.

        Returns:
            `SamVisionEncoderOutput`: `last_hidden_state` of shape `(batch_size, output_channels, h, w)`.

        Raises:
            ValueError: The images are not of the canvas' size.
        """
        canvas = self.config.image_size
        if tuple(pixel_values.shape[1:]) != (self.config.num_channels, canvas, canvas):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (batch_size, "
                f"{self.config.num_channels}, {canvas}, {canvas}): resize and pad images to the canvas."
            )
        states = self.patch_embed(pixel_values)  # (batch_size, embed_dims[0], canvas / 4, canvas / 4)
        for stage in self.stages:
            states = stage(states)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(states.permute(0, 2, 3, 1)))


class MobileSamModel(SamModel):
    """A `SamModel` with another image encoder: prompts, decoder, methods and outputs are SAM's.

    Args:
        config ([`MobileSamConfig`]): The configuration.
    """

    config: MobileSamConfig
    config_class = MobileSamConfig
    _no_split_modules = MobileSamVisionEncoder._no_split_modules

    def __init__(self, config: MobileSamConfig):
        config.share_canvas()
        super(SamModel, self).__init__(config)  # past SamModel, which would build a ViT first
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = MobileSamVisionEncoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation  # it is no PreTrainedModel
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()


MobileSamModel.register_for_auto_class("AutoModel")

__all__ = ["MobileSamModel", "MobileSamVisionEncoder"]
