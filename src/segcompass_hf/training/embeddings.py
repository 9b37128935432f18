# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The setting `embedding_cache_dir`: SAM's image encoder, which never trains, runs once per image."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from PIL import Image
from transformers.utils import logging

from ..data.embedding_cache import EmbeddingCache
from ..data.readable_rows import keep_images_encoded
from ..images_segcompass import to_rgb_image

logger = logging.get_logger(__name__)


def open_embedding_cache(trainer: Any, model: Any, processor: Any) -> EmbeddingCache | None:
    """The cache of a trainer's settings, filled with the images of its data sets; `None` where none is asked for.

    Processes share the images out. Where they share the model's weights (FSDP, DeepSpeed), the main one encodes and
    the others read. Streams are not filled beforehand: their images are kept as they come, unless data loader workers
    make the batches.

    Args:
        trainer (`transformers.Trainer`): With its accelerator and data sets; its settings have `embedding_cache_dir`.
        model (`SegCompassForReasoningSegmentation`): Its SAM encodes.
        processor (`SegCompassProcessor`): Prepares the images.

    Raises:
        ValueError: SAM's image encoder is to train.
        OSError: The disk is too small; nothing has been encoded.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.embedding_cache_dir is None:
        return None
    encoder = model.sam.vision_encoder
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(
            "SAM's image encoder is to train, so its embeddings cannot be kept; leave embedding_cache_dir out, or "
            "freeze it (model.freeze_for_training(), or an adapter that leaves sam.vision_encoder alone)."
        )
    shares_weights = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    cache = None
    if not shares_weights:
        cache = EmbeddingCache(args.embedding_cache_dir, model, processor, _dtype(args, encoder), missing="pixels")
        _fill(cache, trainer, accelerator.process_index, accelerator.num_processes)
    elif accelerator.is_main_process:  # before it is sharded, which `Trainer` does when it starts
        place = next(encoder.parameters()).device
        model.sam.to(accelerator.device)  # of some segmenters other parts take part in encoding
        cache = EmbeddingCache(args.embedding_cache_dir, model, processor, _dtype(args, encoder), missing="pixels")
        _fill(cache, trainer)
        model.sam.to(place)
    accelerator.wait_for_everyone()
    if shares_weights:
        copies = [cache]
        broadcast_object_list(copies)  # a copy leaves the model behind, and reads
        cache = copies[0] if cache is None else copy.deepcopy(cache)
    cache.shards.refresh()
    return cache


def _dtype(args: Any, encoder: Any) -> str:
    """Embeddings are kept in the precision in which training sees them."""
    weights = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else weights


def _fill(cache: EmbeddingCache, trainer: Any, process_index: int = 0, num_processes: int = 1) -> None:
    evaluated = trainer.eval_dataset
    for rows in (trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
        if rows is None:
            continue
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
            if trainer.args.dataloader_num_workers:
                logger.warning("embedding cache: workers of a stream only read, so new images of it are not kept.")
            continue
        cache.fill(DifferentImages(rows), process_index, num_processes)


class DifferentImages:
    """The images of rows, one of each `source` and `image_id` where rows say so, without those that cannot be read.

    What is left out here is met again, and named, by whoever reads the rows.

    Args:
        rows (`datasets.Dataset` or `Sequence[dict]`): In the row schema.
    """

    def __init__(self, rows: Any):
        names = [name for name in ("source", "image_id") if name in (getattr(rows, "column_names", None) or [])]
        ids: Any = range(len(rows))
        if "image_id" in names:
            columns = rows.with_format(None).select_columns(names)
            ids = zip(*(columns[name] for name in names), strict=True)
        first = {}
        for index, name in enumerate(ids):
            first.setdefault(name, index)
        self.rows, self.indices = keep_images_encoded(rows), list(first.values())

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Image.Image]:
        for index in self.indices:
            try:
                yield to_rgb_image(self.rows[index]["image"])
            except MemoryError:
                raise
            except Exception:  # damaged files raise about anything
                continue
