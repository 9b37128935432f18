# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image -> SAM embeddings; heatmaps as mask prompts -> low-resolution masks (step 5 of the method)."""

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.func import functional_call

from .offloading_segcompass import weights_at_hand

PADDING_LOGIT = -50.0  # heatmap logit on the padded area, as the original feeds its prompt encoder


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


def positional_embeddings(sam: nn.Module) -> torch.Tensor:
    """SAM's `get_image_wide_positional_embeddings`, `(1, channels, h, w)`, in float32 whatever the dtype around it.

    The angles go through many turns: computed in bf16 (by autocast, or in a model cast to it) they are noise.
    """
    matrix = sam.shared_image_embedding.positional_embedding  # (2, channels / 2), a fixed random projection
    side = sam.config.prompt_encoder_config.image_embedding_size
    place = (torch.arange(side, device=matrix.device, dtype=torch.float32) + 0.5) / side * 2 - 1  # in (-1, 1)
    y, x = torch.meshgrid(place, place, indexing="ij")
    with torch.autocast(matrix.device.type, enabled=False):
        angles = 2 * math.pi * (torch.stack([x, y], dim=-1) @ matrix.float())  # (h, w, channels / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None]


class SamMaskStage:
    """
    The mask decoder behind one small interface: image -> embeddings; embeddings + heatmaps -> masks.

    It holds no weights of its own: the composition owns the SAM model, this class only calls it, so that another
    segmenter can stand in by offering the same methods.

    Args:
        sam (`SamModel`):
            transformers' SAM (any size).
    """

    def __init__(self, sam: nn.Module):
        self.sam = sam

    @property
    def canvas(self) -> int:
        """Side of SAM's square input in pixels."""
        return self.sam.config.vision_config.image_size

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding."""
        return self.sam.config.prompt_encoder_config.image_embedding_size

    @property
    def map_size(self) -> int:
        """Side of the heatmaps and of the low-resolution masks: 4x the image embedding."""
        return 4 * self.embedding_size

    def valid_area(self, reshaped_input_sizes: torch.Tensor) -> torch.Tensor:
        """See [`valid_area`]; `(batch_size, 1, map_size, map_size)` for this SAM."""
        return valid_area(reshaped_input_sizes, self.map_size, self.canvas)

    def encode_image(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            sam_pixel_values (`torch.Tensor` of shape `(batch_size, 3, canvas, canvas)`):
                Normalised, padded images.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`; without graph when the encoder is frozen.
        """
        encoder = self.sam.vision_encoder
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters())
        dtype = encoder.patch_embed.projection.weight.dtype
        with torch.set_grad_enabled(trains):
            return encoder(sam_pixel_values.to(dtype)).last_hidden_state

    def decode(
        self,
        image_embeddings: torch.Tensor,
        heatmap_logits: torch.Tensor,
        valid_area: torch.Tensor | None = None,
        pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Turn heatmaps into masks, every slot on its own.

        Args:
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                SAM features.
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

    def _decode_flat(self, image_embeddings: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Masks `(n, H, W)` of `n` prompts `(n, H, W)` over as many embeddings `(n, channels, h, w)`."""
        prompt_encoder, mask_decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        with weights_at_hand(self.sam.shared_image_embedding):
            positional = positional_embeddings(self.sam)
        sparse, dense = prompt_encoder(  # sparse is None with mask prompts alone
            input_points=None,
            input_labels=None,
            input_boxes=None,
            input_masks=prompts[:, None].to(prompt_encoder.mask_embed.conv1.weight.dtype),
        )
        dtype, cast = _one_dtype(mask_decoder)
        inputs = {
            "image_embeddings": image_embeddings.to(dtype),
            "image_positional_embeddings": positional.to(dtype).expand(prompts.shape[0], -1, -1, -1),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense.to(dtype),
            "multimask_output": False,
        }
        with weights_at_hand(mask_decoder):
            pred_masks, _ = functional_call(mask_decoder, cast, kwargs=inputs) if cast else mask_decoder(**inputs)
        return pred_masks.reshape(prompts.shape)  # from (n, 1, 1, H, W)

    def unused_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """
        Names (within SAM) and parameters outside the image encoder that training with mask prompts must freeze.

        Mask prompts never use points, boxes, quality scores and the other three masks, so their parameters get no
        gradient or only zeros: DistributedDataParallel would wait for them and weight decay shrink them. The
        positional matrix is used, but it is a fixed random projection (a buffer in the original, a parameter here).
        """
        unused = (
            "shared_image_embedding.",
            "prompt_encoder.shared_embedding.",
            "prompt_encoder.point_embed.",
            "prompt_encoder.not_a_point_embed.",
            "prompt_encoder.no_mask_embed.",
            "mask_decoder.iou_prediction_head.",
        )
        single_mask = "mask_decoder.output_hypernetworks_mlps."
        for name, parameter in self.sam.named_parameters():
            if name.startswith(unused) or (name.startswith(single_mask) and not name.startswith(f"{single_mask}0.")):
                yield name, parameter


def _one_dtype(module: nn.Module) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
    """The widest dtype of a module's weights, and by name those that must be cast to it: QLoRA trainers turn what
    trains to bf16 and leave its frozen neighbours as they are."""
    parameters = dict(module.named_parameters())
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) == 1:
        return dtypes.pop(), {}
    widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    return widest, {name: value.to(widest) for name, value in parameters.items() if value.dtype != widest}
