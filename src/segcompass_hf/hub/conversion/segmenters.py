# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Segmenters from the files that their authors published: Segment Anything and MobileSAM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import SamModel, SamProcessor

from ...files import check_new_folder, staged_folder
from ...loading_segcompass import _cast_sam
from ...modeling_mobile_sam import MobileSamModel
from ...segmenters_segcompass import to_sam_image_processor
from .files import StoredTensor, check_state_dict, read_torch_file
from .from_original import check_weights
from .keys import convert_original_sam_state_dict, has_tiny_vit
from .sizes import mobile_sam_config_of, sam_config_of


def load_original_sam(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> SamModel:
    """Segment Anything from its published `.pth` as transformers' `SamModel`, or MobileSAM as a [`MobileSamModel`].

    Args:
        path (`str` or `os.PathLike`): The file; which of the two it holds is seen from the names of its weights.
        config (`Mapping`, *optional*): Fields of `SamConfig` or [`MobileSamConfig`] that the weights do not show,
            nested; `{"vision_config": {"image_size": 512}}` gives MobileSAM another canvas than 1024 pixels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, holds more than tensors, or not exactly the weights of such a model.
    """
    weights = check_state_dict(read_torch_file(path), path)
    converted = convert_original_sam_state_dict(weights)
    is_mobile = has_tiny_vit(weights)
    model_class, config_of = (MobileSamModel, mobile_sam_config_of) if is_mobile else (SamModel, sam_config_of)
    try:
        sam_config = config_of(weights, config)
    except StrictDataclassError as error:
        raise ValueError(f"{path} and the fields given do not fit together: {error.__cause__ or error}") from error
    with torch.device("meta"):
        empty = model_class(sam_config)
    check_weights(empty, {name: StoredTensor.of(tensor, str(path)) for name, tensor in converted.items()})
    # not load_state_dict: parameters it assigns would be drawn anew when the model becomes part of another
    return model_class.from_pretrained(
        None, config=sam_config, state_dict=converted, dtype=weights["mask_decoder.mask_tokens.weight"].dtype
    )


def is_segmenter_file(path: str | os.PathLike) -> bool:
    """Whether a path is a file with an image encoder, as segmenters are published, rather than of the original
    SegCompass code."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    weights = read_torch_file(path)
    return isinstance(weights, Mapping) and any(str(name).startswith("image_encoder.") for name in weights)


def convert_original_sam(
    source: str | os.PathLike,
    output: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    **config_kwargs: Any,
) -> Path:
    """Convert a published segmenter to a folder for `from_pretrained_parts(vlm, sam=FOLDER)` and the Auto classes.

    Args:
        source (`str` or `os.PathLike`): `sam_vit_*.pth` or `mobile_sam.pt`.
        output (`str` or `os.PathLike`): Folder to make; holds the model, and a `SamProcessor` for its canvas.
        dtype (`torch.dtype` or `str`, *optional*): Cast all weights but the positional matrices.
        max_shard_size (`int` or `str`): Of a weight file.
        config_kwargs: See `config` of [`load_original_sam`].

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: `output` is not empty.
        FileNotFoundError, ValueError: See [`load_original_sam`].
    """
    check_new_folder(output)
    model = load_original_sam(source, config_kwargs)
    if dtype is not None:
        _cast_sam(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    with staged_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        SamProcessor(to_sam_image_processor(model.config)).save_pretrained(folder)
    return Path(output).expanduser()


__all__ = ["convert_original_sam", "is_segmenter_file", "load_original_sam"]
