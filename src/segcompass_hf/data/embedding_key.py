# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What decides an image embedding: pixels, weights, and how pixels are prepared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..files import weights_digest

FORMAT = 1  # part of every key: a change of what is stored must not find what was stored before
_NO_MATTER = ("transformers_version", "dtype")  # fields of configurations; weights tell their dtype themselves


def image_key(image: Image.Image) -> str:
    """Of the pixels of an RGB image, 32 hexadecimal digits: the same for a file, its bytes and its array."""
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def describe_encoding(model: Any, processor: Any) -> dict[str, Any]:
    """All that decides an embedding beside the image, as json holds it.

    Args:
        model (`SegCompassForReasoningSegmentation`): Its segmenter encodes.
        processor (`SegCompassProcessor`): Prepares the images.
    """
    encoder, besides = model.sam.vision_encoder, model.mask_stage.encoding_parameters()
    return {
        "format": FORMAT,
        "encoder": type(encoder).__name__,
        "config": json.loads(json.dumps(what_matters(encoder.config.to_dict()), default=str)),
        "weights": weights_digest(encoder),
        "image_processor": json.loads(image_settings(processor)),
        **({"weights_besides": weights_digest(besides)} if besides else {}),
    }


def what_matters(config: Any) -> Any:
    """A configuration without what loading changes, and so those nested in it."""
    if not isinstance(config, dict):
        return config
    names = [name for name in config if not str(name).startswith("_") and name not in _NO_MATTER]
    return {name: what_matters(config[name]) for name in names}


def image_settings(processor: Any) -> str:
    """How a processor prepares images for the segmenter, as json."""
    image_processor = processor.sam_image_processor
    settings = {name: value for name, value in image_processor.to_dict().items() if not name.startswith("_")}
    settings |= {"class": type(image_processor).__name__, "canvas": processor.canvas_size}
    settings.pop("processor_class", None)
    return json.dumps(settings, sort_keys=True, default=str)


def change_counters(model: Any) -> list[tuple]:
    """Changes when a weight that decides an embedding is replaced, moved, or written to in place."""
    return tensor_counters(dict(model.sam.vision_encoder.named_parameters()) | model.mask_stage.encoding_parameters())


def tensor_counters(tensors: Mapping[str, torch.Tensor]) -> list[tuple]:
    """Changes when a tensor is replaced, moved, or written to in place."""
    return [
        (name, id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
        for name, tensor in tensors.items()
    ]
