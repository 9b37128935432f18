# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What frozen parts need to compute once only: SAM's embeddings of images, slots and reference states of rows."""

from __future__ import annotations

import copy
from typing import Any

from accelerate.utils import broadcast_object_list

from ...data.slot_cache import READERS, SlotCache
from ..embeddings import open_embedding_cache


def use_caches(trainer: Any) -> Any:
    """Open the caches that a trainer's settings name, and give them to its collators.

    Args:
        trainer ([`SegmentationTrainer`]): With its accelerator, data sets and collators.

    Returns:
        `SegCompassProcessor`: the trainer's, whose SAM inputs come from the cache of embeddings where there is one.

    Raises:
        ValueError: What is to be kept is to train, the rows are a stream, or a collator reads no cache.
        OSError: The disk is too small; nothing has been computed.
    """
    processor = trainer.processing_class
    embeddings = open_embedding_cache(trainer, trainer.segcompass, processor)
    slots = _open_slot_cache(trainer, trainer.segcompass, processor)
    caches = {"embedding_cache": embeddings, "slot_cache": slots}
    for name, cache in ((name, cache) for name, cache in caches.items() if cache is not None):
        for collator in (trainer.data_collator, trainer.eval_collator):
            if not hasattr(collator, name):
                raise ValueError(
                    f"{name}_dir needs a collator that reads it, and data_collator is a {type(collator).__name__}; "
                    "use a SegmentationCollator, or leave the setting out."
                )
            setattr(collator, name, cache)
    return processor if embeddings is None else embeddings.caching_processor(processor)


def _open_slot_cache(trainer: Any, model: Any, processor: Any) -> SlotCache | None:
    """The cache of `slot_cache_dir`, filled with all rows; `None` where none is asked for.

    Processes share the rows out. Where they share the model's weights (FSDP, DeepSpeed), the main one reads all rows
    before the model is sharded, which `Trainer` does when it starts, and the others get a copy.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.slot_cache_dir is None:
        return None
    trained = [name for name in READERS if any(weight.requires_grad for weight in getattr(model, name).parameters())]
    if trained:
        raise ValueError(
            f"slot_cache_dir keeps what {', '.join(READERS)} make of every row, and of these {', '.join(trained)} "
            'trains; set trainable="masks", or leave slot_cache_dir out.'
        )
    evaluated = trainer.eval_dataset
    sets = (trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated]))
    sets = [rows for rows in sets if rows is not None]
    if any(not hasattr(rows, "__len__") for rows in sets):
        raise ValueError("slot_cache_dir reads all rows before training, and a stream has no end; leave it out.")
    shares_weights = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    cache = None
    if not shares_weights or accelerator.is_main_process:
        place = next(model.parameters()).device
        if place != accelerator.device:  # before it is sharded
            model.to(accelerator.device)
        precision = f"{accelerator.mixed_precision} {next(model.vlm.parameters()).dtype}"
        cache = SlotCache(args.slot_cache_dir, model, processor, accelerator.autocast, precision)
        share = (0, 1) if shares_weights else (accelerator.process_index, accelerator.num_processes)
        for rows in sets:
            cache.fill(rows, args.per_device_eval_batch_size, *share)
        if place != accelerator.device:
            model.to(place)
    accelerator.wait_for_everyone()
    if shares_weights:
        copies = [cache]
        broadcast_object_list(copies)
        cache = copies[0] if cache is None else cache
    cache = copy.copy(cache)  # leaves the model behind
    cache.shards.refresh()
    return cache


__all__ = ["use_caches"]
