# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What every trainer is given: a model as a module, folder or id, and the processor that belongs to it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..loading_segcompass import load_part
from ..segmenters_segcompass import check_canvas


def load_model(model: nn.Module | str | os.PathLike, **options: Any) -> nn.Module:
    """A model given as such, or the SegCompass or VLM of a folder or id.

    Args:
        model (`nn.Module` or `str` or `os.PathLike`): A module is returned as it is.
        options: For `from_pretrained`. Weights are loaded in float32 where `dtype` is left out: a training step is
            smaller than the distance between two bfloat16 numbers.
    """
    if isinstance(model, nn.Module):
        return model
    return load_part(AutoModelForImageTextToText, model, **{"dtype": torch.float32, **options})


def load_processor(processing_class: Any, model: nn.Module, needed: type | None = None) -> Any:
    """The processor given, or the one in the folder or repository that the model was loaded from.

    Args:
        processing_class (`ProcessorMixin`, *optional*): Returned as it is.
        model (`nn.Module`): A SegCompass, a VLM, or adapters around one.
        needed (`type`, *optional*): Class that the loaded one must be of.

    Raises:
        ValueError: The model was not loaded from anywhere, what lies there is no such processor, or the processor
            prepares images for another segmenter, or does not know where the image tokens of a model with
            `heatmap_concepts` lie. It is told, in place, to say it.
    """
    model = base_model(model)
    if processing_class is None:
        processing_class = _processor_of(model, needed)
    if hasattr(model, "mask_stage") and hasattr(processing_class, "geometry"):
        check_canvas(processing_class.geometry, model.mask_stage.geometry)
        processing_class.use_image_token_grids(model.config.heatmap_concepts)
    return processing_class


def _processor_of(model: nn.Module, needed: type | None) -> Any:
    """The one in the folder or repository that a model was loaded from."""
    path, what = getattr(model.config, "_name_or_path", ""), "processor" if needed is None else needed.__name__
    if not path:
        raise ValueError(
            f"processing_class is None and this {type(model).__name__} was not loaded from a folder or id that could "
            f"hold one; pass the {what} of the model."
        )
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"processing_class is None and {path} holds no processor that loads: {error}") from error
    if needed is not None and not isinstance(processor, needed):
        raise ValueError(
            f"processing_class is None and {path} holds a {type(processor).__name__}, not a {what}; make one by "
            f"{what}.from_parts({str(path)!r}), and embed its tokens in a bare VLM "
            "(segcompass_hf.token_rows_segcompass.add_tokens)."
        )
    return processor


def base_model(model: nn.Module) -> nn.Module:
    """The model under a PEFT wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_segcompass(model: nn.Module) -> None:
    """Refuse, with a `TypeError`, what has no segmentation heads."""
    core = base_model(model)
    if not hasattr(core, "slot_mapper"):
        raise TypeError(
            f"got a {type(core).__name__}, not a SegCompassForReasoningSegmentation; its from_pretrained_parts "
            "makes one from a VLM, a SAM and an SAE."
        )


__all__ = ["base_model", "check_segcompass", "load_model", "load_processor"]
