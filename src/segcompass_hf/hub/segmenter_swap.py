# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Another segmenter for a trained checkpoint: everything that reads the VLM stays, what reads the segmenter is new."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from ..configuration_segcompass import own_settings
from ..files import check_new_folder, staged_folder
from .composition import Composition, check_dtype_name, model_errors, read_parts

_KEPT = ("num_slots", "sae_layer", "ref_token_id", "think_start_token_id", "think_end_token_id", "image_token_id")


def swap_segmenter(
    checkpoint: str | os.PathLike,
    sam: str | os.PathLike,
    output: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Composition:
    """Put another segmenter into a trained checkpoint and save it with its processor, whole or not at all.

    Kept are the VLM, the SAE, the codebook, the slot encoder, the processor's side of the VLM and, of the slot mapper,
    what reads slots and reference states (the confidences with it): reasoning, concepts, slots and `slot_logits` stay
    what they were. New are the slot mapper's `embedding_modules`, which mean something for one segmenter's embeddings
    only. A `score_calibration` was fitted to masks of the former segmenter and goes; a concept dictionary is the SAE's
    and comes along. The new parts are to be trained: `train_segmentation.py --trainable masks`.

    Args:
        checkpoint (`str` or `os.PathLike`): Hub id or folder of a SegCompass checkpoint.
        sam (`str` or `os.PathLike`): Hub id or folder of a segmenter, or Segment Anything's own `.pth`.
        output (`str` or `os.PathLike`): Folder to make.
        dtype (`str`, *optional*): `float32`, `bfloat16` or `float16` for everything; the checkpoint's own when left
            out.
        max_shard_size (`int` or `str`): Of a weight file.

    Returns:
        [`Composition`]: its `new_modules` names what has to be trained.

    Raises:
        FileExistsError: `output` is not empty.
        OSError: A part cannot be found or read.
        ValueError: A part is something else, or its channels do not fit the checkpoint's `heatmap_heads`.
    """
    from ..processing_segcompass import SegCompassProcessor

    check_new_folder(output)
    check_dtype_name(dtype)
    parts = read_parts(checkpoint, sam, dtype)
    config = parts.whole_config
    if config is None:
        raise ValueError(
            f"{os.fspath(checkpoint)!r} is a {parts.vlm_config.model_type!r} model; another segmenter goes into a "
            "SegCompass checkpoint. Compose a new one from parts instead (--vlm)."
        )
    own = SegCompassProcessor.from_pretrained(parts.vlm)
    processor = SegCompassProcessor.from_parts(own, parts.pixels, own.num_slots, think_tags=own.think_tags)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same command makes the same new parts
        model, new_modules = _with_segmenter(parts, dtype)
    model.config.sam_config._name_or_path = ""  # may be a path of this machine
    with staged_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        _copy_dictionary(parts.vlm, folder)
    notes = [] if config.score_calibration is None else [_NO_CALIBRATION]
    return Composition.of(model, Path(output).expanduser(), sae_is_new=False, new_modules=new_modules, notes=notes)


_NO_CALIBRATION = (
    "the score calibration was fitted to masks of the former segmenter and is dropped; scores are plain confidences "
    "until `segcompass calibrate` fits another, after training."
)


def _with_segmenter(parts: Any, dtype: str | None) -> tuple[nn.Module, list[str]]:
    """The checkpoint's model around another segmenter, and the names of the modules that are new in it."""
    from ..modeling_segcompass import SegCompassForReasoningSegmentation

    with model_errors(parts.vlm):
        load: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        whole = SegCompassForReasoningSegmentation.from_pretrained(parts.vlm, **load)
        config = whole.config
        fields = own_settings(config) | {name: getattr(config, name) for name in _KEPT}
        model = SegCompassForReasoningSegmentation.from_pretrained_parts(
            whole.vlm, parts.sam, whole.sae, dtype=dtype, **fields
        )
    for name in ("codebook", "slot_encoder"):
        setattr(model, name, getattr(whole, name))
    new = model.slot_mapper.embedding_modules
    for name, module in whole.slot_mapper.named_children():
        if name not in new:
            setattr(model.slot_mapper, name, module)
    return model, [f"slot_mapper.{name}" for name in new]


def _copy_dictionary(checkpoint: str, folder: Path) -> None:
    """The concept dictionary of a checkpoint, where it has one."""
    from ..explain.dictionary.store import NUMBERS_FILE, TABLE_FILE

    for name in (NUMBERS_FILE, TABLE_FILE):
        found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


__all__ = ["swap_segmenter"]
