# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A VLM's vision encoder: where it is, and how a frozen one is spared work that it has done before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers.utils import logging

from ..data.encoder_calls import leaves, rebuilt, replaced_forward
from ..data.readable_rows import ReadableRows
from ..data.vision_cache import VisionCache
from ..text_stack_segcompass import HiddenStateCapture
from ..vlm_inputs_segcompass import sequence_inputs
from .embeddings import DifferentImages

logger = logging.get_logger(__name__)

VISION_ENCODERS = ("vision_tower", "visual", "vision_model", "vision_encoder")  # attributes of a VLM's base model


def vision_encoder(vlm: nn.Module) -> nn.Module | None:
    """The part of a VLM that gets the pixels; `None` where the family keeps it under a name that is not known here."""
    return next((getattr(vlm.base_model, name) for name in VISION_ENCODERS if hasattr(vlm.base_model, name)), None)


@contextmanager
def kept_vision(trainer: Any, vlm: nn.Module, processor: Any) -> Iterator[None]:
    """Within, what a trainer's frozen vision encoder makes of images is kept in `args.embedding_cache_dir`, and read.

    What all images of the training rows will take is announced first, measured on one of them.

    Args:
        trainer (`transformers.Trainer`): Without the setting nothing happens.
        vlm (`PreTrainedModel`): That the trainer's rows go through.
        processor: Prepares the images; a [`SegCompassProcessor`] for the announcement.

    Raises:
        OSError: The disk is too small; nothing has been trained.
    """
    folder = trainer.args.embedding_cache_dir
    if folder is None:
        yield
        return
    encoder = vision_encoder(vlm)
    if encoder is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        reason = "FSDP or DeepSpeed shares its weights" if encoder is not None else "it is not found"
        logger.warning(f"vision cache: the VLM's vision encoder is run at every step, because {reason}.")
        yield
        return
    with VisionCache(folder, encoder) as cache:
        rows = trainer.train_dataset
        rows = rows.dataset if isinstance(rows, ReadableRows) else rows
        if hasattr(processor, "picture_inputs") and hasattr(rows, "__len__") and not isinstance(rows, IterableDataset):
            steps_it = any(module is vlm for module in trainer.model.modules())  # accelerate casts what is stepped
            precision = trainer.accelerator.autocast() if steps_it else nullcontext()
            with torch.random.fork_rng(), torch.no_grad(), precision:
                _announce(cache, vlm, processor, DifferentImages(rows))
        yield


def _announce(cache: VisionCache, vlm: nn.Module, processor: Any, images: DifferentImages) -> None:
    image = next(iter(images), None)
    if image is None:  # of rows in another schema, or whom no row can be read: others name it
        return
    inputs = processor.picture_inputs(image).to(vlm.device)
    cache.keeps = False  # with rounding of its own: alone, not in a batch of training
    for _ in range(2):  # the first pass shows what is read, the second how much that is
        before = cache.bytes_served
        with HiddenStateCapture(vlm, 0, stop=True):
            vlm(**sequence_inputs(vlm, inputs))
    cache.keeps = True
    if cache.bytes_served > before:
        cache.announce(len(images), cache.bytes_served - before)


@contextmanager
def vision_read_once(vlm: nn.Module) -> Iterator[None]:
    """Within, the vision encoder computes once for equal inputs: for passes, in evaluation mode, that differ above."""
    encoder = vision_encoder(vlm)
    if encoder is None:
        yield
        return
    compute, calls = encoder.forward, []

    def forward(*args, **kwargs):
        asked = dict(leaves((args, kwargs)))
        output = next((output for known, output in calls if _equal(known, asked)), None)
        if output is None:
            output = compute(*args, **kwargs)
            calls.append((asked, output))
        return rebuilt(output, lambda _, leaf: leaf)  # whoever gets it may put other things into it

    with replaced_forward(encoder, forward):
        yield


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(leaf, other[path]) for path, leaf in one.items()]
    return all(torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b or a == b for a, b in pairs)


__all__ = ["VISION_ENCODERS", "kept_vision", "vision_encoder", "vision_read_once"]
