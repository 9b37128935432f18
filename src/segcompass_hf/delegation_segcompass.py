# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What generation, Trainer and TRL ask of a model is answered by the VLM inside ours."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_segcompass import SegCompassConfig
from .generation_segcompass import generate_and_feed_last, positions_without_padding
from .offloading_segcompass import execution_device
from .threads_segcompass import CallLock, one_call_at_a_time

logger = logging.get_logger(__name__)


class VlmDelegationMixin:
    """Delegates to `self.vlm`: a composite with a `generate` of its own would have to know every family's inputs.

    Its heir is a `PreTrainedModel` whose configuration holds the VLM's as `vlm_config`.
    """

    vlm: PreTrainedModel
    sam: PreTrainedModel
    config: SegCompassConfig
    call_lock: CallLock

    @property
    def base_model(self) -> nn.Module:
        """The VLM without its head (TRL's fused head runs it)."""
        return self.vlm.base_model

    @property
    def device(self) -> torch.device:
        """Where inputs go; of offloaded weights, which lie nowhere between calls, where they are computed with."""
        device = super().device
        return execution_device(self) or device if device.type == "meta" else device

    @property
    def generation_config(self):
        return self.vlm.generation_config if "vlm" in self._modules else None

    @generation_config.setter
    def generation_config(self, value):
        if "vlm" in self._modules:  # PreTrainedModel.__init__ sets it before the VLM exists
            self.vlm.generation_config = value

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs) -> None:
        """See `PreTrainedModel.set_attn_implementation`. Of one for all SAM keeps its own where it cannot follow."""
        if isinstance(attn_implementation, str):
            sam = supported_attention(type(self.sam), attn_implementation)
            names = dict.fromkeys(("", *self.config.sub_configs), attn_implementation)
            attn_implementation = {**names, "sam_config": sam}
        super().set_attn_implementation(attn_implementation, **kwargs)

    def adjust_generation_fn(self, *args, **kwargs):
        self.vlm.adjust_generation_fn(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head = self.vlm.get_output_embeddings()
        if head is not None and not hasattr(head, "bias"):
            head.bias = None  # PEFT's wrapper for trained rows has only a weight; TRL's fused head reads both
        return head

    def set_output_embeddings(self, value: nn.Module):
        self.vlm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        return self.vlm.resize_token_embeddings(*args, **kwargs)

    def enable_input_require_grads(self):
        """As in the parent, which adds its hooks once more whenever gradient checkpointing is switched back on: around
        every sampling of TRL, so that each pass of a long run would go through thousands of them."""
        self.disable_input_require_grads()
        super().enable_input_require_grads()

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        return self.vlm.prepare_inputs_for_generation(*args, **kwargs)

    @one_call_at_a_time
    def generate(self, *args, **kwargs):
        """Generate text with the VLM; image and video placeholders are never written. See `GenerationMixin`.

        A `generation_config` with `feed_last_token=True` passes the last token too, for whoever captures states; see
        [`generate_and_feed_last`].
        """
        sizes = ("original_sizes", "reshaped_input_sizes", "image_token_grids")
        for name in ("sam_pixel_values", "image_embeddings", *sizes):
            kwargs.pop(name, None)  # the processor makes them for the masks; text needs none
        config = kwargs.get("generation_config") or self.generation_config
        chosen = kwargs.pop("suppress_tokens", None) or config.suppress_tokens or []
        suppressed = sorted({*chosen, *self.vision_token_ids}) or None
        if "generation_config" in kwargs:  # mixed with single settings, transformers warns on every call
            kwargs["generation_config"] = copy.deepcopy(config)
            kwargs["generation_config"].suppress_tokens = suppressed
        else:
            kwargs["suppress_tokens"] = suppressed
        if getattr(config, "feed_last_token", False):
            return generate_and_feed_last(self.vlm, *args, **kwargs)
        with positions_without_padding(self.vlm, kwargs.get("attention_mask")):
            return self.vlm.generate(*args, **kwargs)

    @property
    def vision_token_ids(self) -> list[int]:
        """Ids that stand for image or video content, which text must never hold."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = [self.config.image_token_id, *(getattr(self.config.vlm_config, name, None) for name in names)]
        return sorted({i for i in ids if isinstance(i, int) and 0 <= i < self.config.vocab_size})


def supported_attention(model_class: type, requested: str | None) -> str | None:
    """The attention that a part computes where the whole is asked for one: its own where it cannot follow."""
    kind = next((kind for kind in ("flash", "flex") if kind in str(requested)), None)
    if kind is None or getattr(model_class, f"_supports_{kind}_attn"):
        return requested
    chosen = "sdpa" if model_class._supports_sdpa else "eager"
    logger.info("%s has no %s attention and computes %s.", model_class.__name__, kind, chosen)
    return chosen
