# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of MobileSAM: SAM's prompt encoder and mask decoder behind a TinyViT image encoder."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig, SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig

STEM_STRIDE = 4  # pixels per cell after the two convolutions that every TinyViT starts with
DECODER_NORM_EPS = 1e-5  # of the mask decoder that the published weights were trained with; `SamConfig` says 1e-6


@strict
class MobileSamVisionConfig(PretrainedConfig):
    r"""Configuration of [`MobileSamVisionEncoder`], a TinyViT (https://arxiv.org/abs/2207.10666) with SAM's neck.

    The first stage is convolutional, the others attend within windows. The defaults are MobileSAM's TinyViT-5M.

    Args:
        image_size (`int`, defaults to 1024): Side of the canvas in pixels. No weight depends on it: 512 costs a
            quarter and finds small objects less well.
        num_channels (`int`, defaults to 3): Of the image.
        embed_dims (`list[int]`): Channels of each stage.
        depths (`list[int]`): Layers of each stage.
        num_heads (`list[int]`): Attention heads of each stage; that of the first is not read.
        window_sizes (`list[int]`): Side of the attention window of each stage, in cells; that of the first is not
            read.
        strides (`list[int]`): Of the downsampling after each stage but the last. TinyViT has `[2, 2, 2]`; MobileSAM
            keeps the last stage at 16 pixels per cell, as SAM's decoder expects.
        expand_ratio (`float`, defaults to 4.0): Inner width of the first stage's layers, in multiples of its channels.
        mlp_ratio (`float`, defaults to 4.0): The same of the MLPs of the other stages.
        hidden_act (`str`, defaults to `"gelu"`): Activation function.
        layer_norm_eps (`float`, defaults to 1e-5): Of the norms before attention and MLP.
        output_channels (`int`, defaults to 256): Channels of the image embedding.
        initializer_range (`float`, defaults to 0.02): Standard deviation of freshly initialised weights.
    """

    model_type = "mobile_sam_vision_model"
    base_config_key = "vision_config"

    image_size: int = 1024  # pixels
    num_channels: int = 3
    embed_dims: list[int] | tuple[int, ...] = (64, 128, 160, 320)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: list[int] | tuple[int, ...] = (7, 7, 14, 7)  # cells
    strides: list[int] | tuple[int, ...] = (2, 2, 1)
    expand_ratio: float | int = 4.0
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    output_channels: int = 256
    initializer_range: float = 0.02

    # What SAM's own neck, prompt encoder and image processor ask of a vision configuration.

    @property
    def hidden_size(self) -> int:
        """Channels that enter the neck."""
        return self.embed_dims[-1]

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the image embedding."""
        return STEM_STRIDE * math.prod(self.strides)

    @property
    def num_pos_feats(self) -> int:
        """Random frequencies of the positional encoding."""
        return self.output_channels // 2

    @property
    def scale(self) -> float:
        """Standard deviation of those frequencies in a new model."""
        return 1.0

    def validate_stages(self) -> None:
        lengths = [len(each) for each in (self.embed_dims, self.depths, self.num_heads, self.window_sizes)]
        if len(set(lengths)) > 1 or len(self.strides) != lengths[0] - 1:
            raise ValueError(
                "embed_dims, depths, num_heads and window_sizes have one entry per stage, and strides one less; got "
                f"{', '.join(map(str, lengths))} and {len(self.strides)}."
            )
        for stage, (dim, heads) in enumerate(zip(self.embed_dims, self.num_heads, strict=True)):
            if stage and dim % heads:
                raise ValueError(f"stage {stage} has {dim} channels, no multiple of its {heads} heads.")

    def validate_canvas(self) -> None:
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size is {self.image_size} pixels; expected a multiple of the {self.patch_size} pixels that a "
                "cell of the image embedding covers."
            )


@strict
class MobileSamConfig(SamConfig):
    r"""Configuration of [`MobileSamModel`].

    Args:
        vision_config ([`MobileSamVisionConfig`] or `dict`, *optional*): The image encoder.
        prompt_encoder_config (`SamPromptEncoderConfig` or `dict`, *optional*): SAM's; its canvas and the size of its
            cells are those of the image encoder.
        mask_decoder_config (`SamMaskDecoderConfig` or `dict`, *optional*): SAM's.

    Example:

    ```python
    >>> config = MobileSamConfig(vision_config={"image_size": 512})
    >>> config.prompt_encoder_config.image_embedding_size
    32
    ```
    """

    model_type = "mobile_sam"
    sub_configs_defaults = {
        "prompt_encoder_config": SamPromptEncoderConfig,
        "mask_decoder_config": SamMaskDecoderConfig,
        "vision_config": MobileSamVisionConfig,
    }
    sub_configs = dict(sub_configs_defaults)  # under the name that transformers 5.17 reads

    def __post_init__(self, **kwargs: Any) -> None:
        vision, prompt, decoder = self.vision_config, self.prompt_encoder_config, self.mask_decoder_config
        if not isinstance(vision, PretrainedConfig):
            vision = MobileSamVisionConfig(**(vision or {}))
        width = {"hidden_size": vision.output_channels}
        if not isinstance(prompt, PretrainedConfig):
            prompt = SamPromptEncoderConfig(**{**width, **(prompt or {})})
        if not isinstance(decoder, PretrainedConfig):
            decoder = SamMaskDecoderConfig(**{**width, "layer_norm_eps": DECODER_NORM_EPS, **(decoder or {})})
        self.vision_config: PretrainedConfig = vision
        self.prompt_encoder_config: PretrainedConfig = prompt
        self.mask_decoder_config: PretrainedConfig = decoder
        self.share_canvas()
        super().__post_init__(**kwargs)

    def share_canvas(self) -> None:
        """Hand the image encoder's canvas to the prompt encoder, which has copies of it, after it was changed: as by
        `from_pretrained(folder, vision_config={"image_size": 512})`."""
        vision, prompt = self.vision_config, self.prompt_encoder_config
        prompt.image_size, prompt.patch_size = vision.image_size, vision.patch_size
        prompt.image_embedding_size = vision.image_size // vision.patch_size

    def validate_widths(self) -> None:
        widths = {
            "image embeddings": self.vision_config.output_channels,
            "the prompt encoder": self.prompt_encoder_config.hidden_size,
            "the mask decoder": self.mask_decoder_config.hidden_size,
        }
        if len(set(widths.values())) > 1:
            got = ", ".join(f"{value} of {name}" for name, value in widths.items())
            raise ValueError(
                f"expected one width for all, got {got}; leave hidden_size out of prompt_encoder_config and "
                "mask_decoder_config."
            )


MobileSamConfig.register_for_auto_class()

__all__ = ["MobileSamConfig", "MobileSamVisionConfig"]
