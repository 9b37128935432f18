# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image -> features; heatmaps as mask prompts -> low-resolution masks (step 5 of the method), for any segmenter."""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import MODEL_FOR_MASK_GENERATION_MAPPING, PretrainedConfig, PreTrainedModel

from .image_features_segcompass import ImageFeatures, parts_of
from .modeling_mobile_sam import MobileSamModel
from .offloading_segcompass import weights_at_hand
from .segmenters_segcompass import Geometry, geometry_of, segmenter_config, segmenter_kind

# By `model_type` and not by class of the configuration, of which remote code may hold several.
_OUR_CLASSES = {MobileSamModel.config_class.model_type: MobileSamModel}
PADDING_LOGIT = -50.0  # heatmap logit on the padded area, as the original feeds its prompt encoder


def segmenter_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class of a segmenter's configuration: ours, or the one that `AutoModelForMaskGeneration` knows.

    Raises:
        ValueError: As [`segmenter_kind`].
    """
    segmenter_kind(config)
    if config.model_type in _OUR_CLASSES:
        return _OUR_CLASSES[config.model_type]
    return MODEL_FOR_MASK_GENERATION_MAPPING[type(segmenter_config(config))]


def check_segmenter(segmenter: nn.Module) -> None:
    """Refuse a module that cannot stand behind the mask stage.

    Raises:
        ValueError: It is no segmenter that takes mask prompts; the message names the class to use where there is one.
    """
    expected = segmenter_class(segmenter.config)
    if not isinstance(segmenter, expected):
        raise ValueError(
            f"sam is a {type(segmenter).__name__}, which takes no single image and mask prompt; load the same "
            f"checkpoint as {expected.__name__}."
        )


def valid_area(reshaped_input_sizes: torch.Tensor, map_size: int | tuple[int, int], canvas: int) -> torch.Tensor:
    """
    Mark the part of a low-resolution map that shows the image and not the bottom/right padding.

    A side of `size` pixels on the canvas covers `ceil(size * map / canvas)` rows of the map; sizes beyond the canvas
    count as the whole canvas.

    Args:
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
            (height, width) in pixels of the resized image on SAM's canvas.
        map_size (`int` or `tuple[int, int]`):
            Height and width of the map.
        canvas (`int`):
            Side of SAM's square input in pixels.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, 1, height, width)`.
    """
    if reshaped_input_sizes.ndim != 2 or reshaped_input_sizes.shape[1] != 2:
        raise ValueError(
            f"reshaped_input_sizes has shape {tuple(reshaped_input_sizes.shape)}, expected (batch_size, 2) holding "
            "(height, width) in pixels; pass the processor's own tensor."
        )
    sides = (map_size, map_size) if isinstance(map_size, int) else map_size
    inside = []
    for sizes, side in zip(reshaped_input_sizes.unbind(1), sides, strict=True):
        filled = (sizes * side + canvas - 1) // canvas  # (batch_size,)
        inside.append(torch.arange(side, device=sizes.device) < filled[:, None])
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def positional_embeddings(segmenter: nn.Module) -> torch.Tensor:
    """`get_image_wide_positional_embeddings`, `(1, channels, h, w)`, in float32 whatever the dtype around it.

    The angles go through many turns: computed in bf16 (by autocast, or in a model cast to it) they are noise.
    """
    matrix = segmenter.shared_image_embedding.positional_embedding  # (2, channels / 2), a fixed random projection
    side = geometry_of(segmenter.config).embedding_size
    place = (torch.arange(side, device=matrix.device, dtype=torch.float32) + 0.5) / side * 2 - 1  # in (-1, 1)
    y, x = torch.meshgrid(place, place, indexing="ij")
    with torch.autocast(matrix.device.type, enabled=False):
        angles = 2 * math.pi * (torch.stack([x, y], dim=-1) @ matrix.float())  # (h, w, channels / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None]


class MaskStage:
    """
    The mask decoder behind one small interface: image -> features; features + heatmaps -> masks.

    It holds no weights of its own: the composition owns the segmenter, this class only calls it. What segmenters
    differ in stands in `SEGMENTERS`.

    Args:
        segmenter (`PreTrainedModel`):
            Of a class that [`segmenter_class`] knows. Its `dynamic_multimask_via_stability` is switched off: in
            evaluation it would put masks that never trained in the place of the one that did.

    Raises:
        ValueError: It takes no mask prompts.
    """

    def __init__(self, segmenter: nn.Module):
        self.segmenter, self.kind = segmenter, segmenter_kind(segmenter.config)
        for settings in (segmenter.mask_decoder, segmenter.config.mask_decoder_config):
            if getattr(settings, "dynamic_multimask_via_stability", False):
                settings.dynamic_multimask_via_stability = False

    @property
    def geometry(self) -> Geometry:
        """How images lie on the segmenter's canvas."""
        return geometry_of(self.segmenter.config)

    @property
    def canvas(self) -> int:
        """Side of the segmenter's square input in pixels."""
        return self.geometry.canvas

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding."""
        return self.geometry.embedding_size

    @property
    def map_size(self) -> int:
        """Side of the heatmaps and of the low-resolution masks: 4x the image embedding."""
        return self.geometry.map_size

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what `encode_image` returns of one image: of the embeddings, and of each extra part."""
        config, side = self.segmenter.config, self.embedding_size
        channels = config.mask_decoder_config.hidden_size
        extra = {
            "levels": [(channels // 8, 4 * side, 4 * side), (channels // 4, 2 * side, 2 * side)],
            "vit": [(side, side, getattr(config.vision_config, "hidden_size", 0))],
        }
        return [(channels, side, side), *extra.get(self.kind.extra, [])]

    @property
    def trains_encoder(self) -> bool:
        """Whether any parameter of the image encoder takes a gradient."""
        return any(parameter.requires_grad for parameter in self.segmenter.vision_encoder.parameters())

    def encoding_parameters(self) -> dict[str, nn.Parameter]:
        """What takes part in `encode_image` outside the image encoder, by name within the segmenter."""
        names = ("mask_decoder.conv_s0.", "mask_decoder.conv_s1.", "no_memory_embedding")
        return {name: weight for name, weight in self.segmenter.named_parameters() if name.startswith(names)}

    def valid_area(self, reshaped_input_sizes: torch.Tensor) -> torch.Tensor:
        """See [`valid_area`]; `(batch_size, 1, map_size, map_size)` for this segmenter."""
        return valid_area(reshaped_input_sizes, self.map_size, self.canvas)

    def encode_image(self, sam_pixel_values: torch.Tensor) -> torch.Tensor | ImageFeatures:
        """
        Args:
            sam_pixel_values (`torch.Tensor` of shape `(batch_size, 3, canvas, canvas)`):
                Normalised images, laid on the canvas.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, h, w)`, or [`ImageFeatures`] where the decoder reads more;
            without graph when the encoder is frozen.
        """
        segmenter = self.segmenter
        first = next(module for module in segmenter.vision_encoder.modules() if isinstance(module, nn.Conv2d))
        encode = inspect.unwrap(type(segmenter).get_image_embeddings)  # transformers puts it under `no_grad`
        with (
            weights_at_hand(segmenter, recurse=False),
            torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder),
        ):
            found = encode(segmenter, sam_pixel_values.to(first.weight.dtype))
        if self.kind.extra == "levels":  # from high to low resolution
            return ImageFeatures(found[-1], tuple(found[:-1]))
        if self.kind.extra == "vit":
            embeddings, layers = found
            return ImageFeatures(embeddings, (layers[0],))
        return found

    def as_inputs(self, features: torch.Tensor | ImageFeatures) -> dict[str, Any]:
        """Features as the arguments that the segmenter's own `forward` has for them."""
        embeddings, *extra = parts_of(features)
        if self.kind.extra == "levels":
            return {"image_embeddings": [*extra, embeddings]}
        if self.kind.extra == "vit":
            return {"image_embeddings": embeddings, "intermediate_embeddings": extra}
        return {"image_embeddings": embeddings}

    def decode(
        self,
        image_embeddings: torch.Tensor | ImageFeatures,
        heatmap_logits: torch.Tensor,
        valid_area: torch.Tensor | None = None,
        pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Turn heatmaps into masks, every slot on its own.

        Args:
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, height, width)` or [`ImageFeatures`]):
                What `encode_image` returned.
            heatmap_logits (`torch.Tensor` of shape `(batch_size, num_slots, 4 * height, 4 * width)`):
                Mask prompts, logits.
            valid_area (`torch.BoolTensor` of shape `(batch_size, 1, 4 * height, 4 * width)`, *optional*):
                False on padding, where the prompt is set to -50; nothing is padding when missing.
            pairs (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                Sample and slot indices, each of shape `(num_pairs,)`: decode only these (training decodes only matched
                slots).

        Returns:
            `torch.Tensor` of mask logits, `(batch_size, num_slots, 4 * height, 4 * width)`, or
            `(num_pairs, 4 * height, 4 * width)` with `pairs`.
        """
        batch_size, num_slots, *map_size = heatmap_logits.shape
        if image_embeddings.shape[0] != batch_size or map_size != [4 * side for side in image_embeddings.shape[-2:]]:
            raise ValueError(
                f"heatmap_logits {tuple(heatmap_logits.shape)} do not go with image_embeddings "
                f"{tuple(image_embeddings.shape)}: expected the same batch size and maps of 4x the embedding's size."
            )
        if len(parts_of(image_embeddings)) != len(self.feature_shapes):
            raise ValueError(
                f"image_embeddings hold {len(parts_of(image_embeddings))} tensors, but the mask decoder of "
                f"{type(self.segmenter).__name__} reads {len(self.feature_shapes)}; pass what encode_image of the "
                "same model returned."
            )
        if valid_area is not None:
            heatmap_logits = heatmap_logits.masked_fill(~valid_area, PADDING_LOGIT)
        if pairs is None:
            image_embeddings = image_embeddings.repeat_interleave(num_slots, dim=0)
            return self._decode_flat(image_embeddings, heatmap_logits.flatten(0, 1)).view(
                batch_size, num_slots, *map_size
            )
        samples, slots = (index.to(heatmap_logits.device) for index in pairs)
        if samples.numel() == 0:
            # One throw-away map keeps the decoder in the graph (zero gradients): DDP waits for every parameter.
            return self._decode_flat(image_embeddings[:1], heatmap_logits[:1, 0])[:0]
        return self._decode_flat(image_embeddings[samples], heatmap_logits[samples, slots])

    def _decode_flat(self, image_embeddings: torch.Tensor | ImageFeatures, prompts: torch.Tensor) -> torch.Tensor:
        """Masks `(n, H, W)` of `n` prompts `(n, H, W)` over the features of as many images."""
        mask_decoder = self.segmenter.mask_decoder
        with weights_at_hand(self.segmenter.shared_image_embedding):
            positional = positional_embeddings(self.segmenter)
        sparse, dense = self._embed_prompts(prompts)
        dtype, cast = _one_dtype(mask_decoder)
        embeddings, *extra = (part.to(dtype) for part in parts_of(image_embeddings))
        inputs = {
            "image_embeddings": embeddings,
            "image_positional_embeddings": positional.to(dtype).expand(prompts.shape[0], -1, -1, -1),
            "sparse_prompt_embeddings": None if sparse is None else sparse.to(dtype),
            "dense_prompt_embeddings": dense.to(dtype),
            "multimask_output": False,
        }
        if self.kind.extra == "levels":
            inputs["high_resolution_features"] = extra
        elif self.kind.extra == "vit":
            inputs |= {"intermediate_embeddings": extra, "hq_token_only": False}
        with weights_at_hand(mask_decoder):
            decoded = functional_call(mask_decoder, cast, kwargs=inputs) if cast else mask_decoder(**inputs)
        return decoded[0].reshape(prompts.shape)  # from (n, 1, 1, H, W)

    def _embed_prompts(self, prompts: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Sparse (`None` with mask prompts alone) and dense embeddings of mask prompts `(n, H, W)`."""
        prompt_encoder, points, labels, read = self.segmenter.prompt_encoder, None, None, ()
        if self.kind.extra == "levels":  # their own `forward` adds an empty point where there is none
            points = torch.zeros(prompts.shape[0], 1, 1, 2, device=prompts.device)
            labels = torch.full(points.shape[:3], -1, dtype=torch.int32, device=prompts.device)
            read = (prompt_encoder.not_a_point_embed,)  # its weight, without calling it
        with weights_at_hand(*read):
            return prompt_encoder(
                input_points=points,
                input_labels=labels,
                input_boxes=None,
                input_masks=prompts[:, None].to(prompt_encoder.mask_embed.conv1.weight.dtype),
            )

    def unused_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """
        Names (within the segmenter) and parameters outside the image encoder that training must freeze.

        Mask prompts never use points, boxes, quality scores and the other three masks, so their parameters get no
        gradient or only zeros: DistributedDataParallel would wait for them and weight decay shrink them. The
        positional matrix is used, but it is a fixed random projection (a buffer in the original, a parameter in
        SAM's). What takes part in encoding images gets a gradient only where the image encoder trains.
        """
        unused = (
            "shared_image_embedding.",
            "prompt_encoder.shared_embedding.",
            "prompt_encoder.point_embed.",
            "prompt_encoder.no_mask_embed.",
            "mask_decoder.iou_prediction_head.",
            "mask_decoder.pred_obj_score_head.",
        )
        if self.kind.extra != "levels":
            unused += ("prompt_encoder.not_a_point_embed.",)  # the others put the empty point into every prompt
        if not self.trains_encoder:
            unused += tuple(self.encoding_parameters())
        elif self._drops_last_level:
            unused += ("no_memory_embedding",)
        single_mask = "mask_decoder.output_hypernetworks_mlps."
        for name, parameter in self.segmenter.named_parameters():
            if name.startswith(unused) or (name.startswith(single_mask) and not name.startswith(f"{single_mask}0.")):
                yield name, parameter

    @property
    def _drops_last_level(self) -> bool:
        """Whether the feature pyramid has a level more than the decoder reads (SAM 3's): the memory goes there."""
        vision = self.segmenter.config.vision_config
        return len(getattr(vision, "scale_factors", None) or ()) > len(getattr(vision, "backbone_feature_sizes", ()))


def _one_dtype(module: nn.Module) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
    """The widest dtype of a module's weights, and by name those that must be cast to it: QLoRA trainers turn what
    trains to bf16 and leave its frozen neighbours as they are."""
    parameters = dict(module.named_parameters())
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) == 1:
        return dtypes.pop(), {}
    widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    return widest, {name: value.to(widest) for name, value in parameters.items() if value.dtype != widest}
