# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which segmenters there are, how an image lies on their canvas, and what their models do not say."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig, SamImageProcessorPil, ViTImageProcessorPil

from .images_segcompass import resized_size, restore_map, soft_mask_targets

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class SegmenterKind:
    """What a segmenter's model and configuration do not say of it.

    Args:
        image_mean, image_std (`tuple[float, float, float]`): Of the pixels it was trained on, which are in [0, 1].
        fit (`str`, defaults to `"pad"`): How an image comes onto the square canvas: `"pad"` gives its longest side the
            canvas's length and pads at the bottom and right, `"stretch"` gives both sides that length.
        extra (`str`, *optional*): What the mask decoder reads beside the embeddings: `"levels"`, higher resolutions
            from the feature pyramid (such decoders also want an empty point beside a mask prompt), or `"vit"`, the
            image encoder's features after its first global attention.
    """

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    fit: Literal["pad", "stretch"] = "pad"
    extra: Literal["levels", "vit"] | None = None


# By `model_type`. Everything else is read off the model, its configuration or `MODEL_FOR_MASK_GENERATION_MAPPING`.
SEGMENTERS = {
    "sam": SegmenterKind(**_IMAGENET),
    "sam_hq": SegmenterKind(**_IMAGENET, extra="vit"),
    "mobile_sam": SegmenterKind(**_IMAGENET),
    "sam2": SegmenterKind(**_IMAGENET, fit="stretch", extra="levels"),
    "sam3_tracker": SegmenterKind(**_HALVES, fit="stretch", extra="levels"),
    "edgetam": SegmenterKind(**_IMAGENET, fit="stretch", extra="levels"),
}
# Models for videos, under whose configurations checkpoints are published: each holds one for images.
_OF_VIDEOS = {
    "sam2_video": "sam2",
    "edgetam_video": "edgetam",
    "sam3_video": "sam3_tracker",
    "sam3_tracker_video": "sam3_tracker",
}
_PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


@dataclass(frozen=True)
class Geometry:
    """How images lie on a segmenter's canvas, and what its pixels are.

    Args:
        canvas (`int`): Side of the segmenter's square input, in pixels.
        patch_size (`int`): Pixels of the canvas per cell of the image embedding, along a side.
        fit, image_mean, image_std: See [`SegmenterKind`].
    """

    canvas: int
    patch_size: int
    fit: Literal["pad", "stretch"]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding, in cells."""
        return self.canvas // self.patch_size

    @property
    def map_size(self) -> int:
        """Side of the heatmaps and of the low-resolution masks, in cells: 4x the image embedding."""
        return 4 * self.embedding_size

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) on the canvas of an image of `size` (height, width): its `reshaped_input_sizes`."""
        return resized_size(size, self.canvas, self.fit)

    def soft_mask_targets(self, masks: torch.Tensor) -> torch.Tensor:
        """Soft targets `(n, map_size, map_size)` of bool masks `(n, H, W)` of one image, see `soft_mask_targets`."""
        return soft_mask_targets(masks, self.canvas, self.map_size, self.fit)

    def restore_map(self, low_resolution: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A map `(h, w)` at its image's own `size` (height, width), see `restore_map`."""
        return restore_map(low_resolution, self.canvas, self.resized_size(size), size)

    def image_processor(self) -> SamImageProcessorPil | ViTImageProcessorPil:
        """What makes pixels of images, by PIL alone. `size` tells the fit, as in the segmenters' own processors."""
        statistics = {"image_mean": self.image_mean, "image_std": self.image_std}
        canvas, maps = ({"height": side, "width": side} for side in (self.canvas, self.map_size))
        if self.fit == "stretch":
            return ViTImageProcessorPil(size=canvas, mask_size=maps, **statistics)
        return SamImageProcessorPil(
            size={"longest_edge": self.canvas},
            pad_size=canvas,
            mask_size={"longest_edge": self.map_size},
            mask_pad_size=maps,
            **statistics,
        )


def segmenter_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a segmenter for images; of one for videos, that of the image part inside it."""
    kind = _OF_VIDEOS.get(config.model_type)
    if kind is None:
        return config
    source = getattr(config, "tracker_config", None) or config
    parts = {name: getattr(source, name).to_dict() for name in _PARTS}
    for name in _PARTS[1:]:
        del parts[name]["model_type"]  # of the video model
    image_config = AutoConfig.for_model(kind, **parts)
    image_config._attn_implementation = config._attn_implementation
    return image_config


def segmenter_kind(config: PretrainedConfig) -> SegmenterKind:
    """What [`SEGMENTERS`] says of a configuration.

    Raises:
        ValueError: It is no segmenter that takes mask prompts.
    """
    kind = SEGMENTERS.get(_OF_VIDEOS.get(config.model_type, config.model_type))
    if kind is None:
        hint = ""
        if config.model_type == "sam3":
            hint = (
                " Sam3Model finds what a text names; the tracker of the same checkpoint takes mask prompts: "
                "Sam3TrackerModel.from_pretrained('facebook/sam3')."
            )
        raise ValueError(
            f"this is a {config.model_type!r} model; expected a SAM or another segmenter that takes mask prompts "
            f"({', '.join(SEGMENTERS)}).{hint}"
        )
    return kind


def geometry_of(source: Any) -> Geometry:
    """The geometry of a segmenter's configuration, or of its image processor as `to_sam_image_processor` makes it.

    Raises:
        ValueError: As [`segmenter_kind`].
    """
    if isinstance(source, PretrainedConfig):
        kind, prompts = segmenter_kind(source), segmenter_config(source).prompt_encoder_config
        canvas, patch_size = (_side(size) for size in (prompts.image_size, prompts.patch_size))
        return Geometry(canvas, patch_size, kind.fit, kind.image_mean, kind.image_std)
    fit, edge = ("pad", "longest_edge") if source.size.get("longest_edge") else ("stretch", "height")
    canvas, map_size = source.size[edge], source.mask_size[edge]
    return Geometry(canvas, 4 * canvas // map_size, fit, tuple(source.image_mean), tuple(source.image_std))


def check_canvas(processor: Geometry, segmenter: Geometry) -> None:
    """Refuse images that would lie on the canvas in another way than a segmenter was trained on.

    Raises:
        ValueError: Another canvas, or images padded where they should be stretched, or the other way round.
    """
    if (processor.canvas, processor.fit) != (segmenter.canvas, segmenter.fit):
        raise ValueError(
            f"the processor resizes images to {processor.canvas} pixels but this segmenter takes {segmenter.canvas} "
            f"(fit {processor.fit!r} and {segmenter.fit!r}); pass the processor of the same checkpoint."
        )


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _own_statistics(source: str | os.PathLike) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std` as the image processor in an id or folder says them; nothing without one."""
    try:
        fields, _ = SamImageProcessorPil.get_image_processor_dict(source)
    except OSError:
        return {}
    return {name: tuple(fields[name]) for name in ("image_mean", "image_std") if fields.get(name)}


def to_sam_image_processor(source: Any) -> SamImageProcessorPil | ViTImageProcessorPil:
    """A segmenter's image processor, on PIL, from a processor, configuration, id or folder, or the canvas's side.

    Of an id or folder the mean and standard deviation of pixels are those of its own image processor, if there is one.

    Raises:
        ValueError: It is none of these, or the configuration of something else.
    """
    if isinstance(source, (str, os.PathLike)):
        geometry = geometry_of(AutoConfig.from_pretrained(source))
        return replace(geometry, **_own_statistics(source)).image_processor()
    source = getattr(source, "sam_image_processor", None) or getattr(source, "image_processor", source)
    if hasattr(source, "to_dict") and hasattr(source, "mask_size"):
        fields = source.to_dict()
        pads = "longest_edge" in fields["size"]
        return (SamImageProcessorPil if pads else ViTImageProcessorPil).from_dict(fields)
    if isinstance(source, int):
        kind = SEGMENTERS["sam"]
        return Geometry(source, 16, kind.fit, kind.image_mean, kind.image_std).image_processor()
    if not isinstance(source, PretrainedConfig):
        raise ValueError(
            f"sam_processor is a {type(source).__name__}; expected a segmenter's processor, config, path or canvas "
            "size."
        )
    return geometry_of(source).image_processor()


__all__ = [
    "SEGMENTERS",
    "Geometry",
    "SegmenterKind",
    "check_canvas",
    "geometry_of",
    "segmenter_config",
    "segmenter_kind",
    "to_sam_image_processor",
]
