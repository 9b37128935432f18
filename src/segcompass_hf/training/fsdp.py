# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Sharding by FSDP2 and ZeRO-3: units, methods that work outside `forward`, rows that train."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from ..text_stack_segcompass import final_norm

# What is called from outside. Some read weights that belong to no smaller unit than the model, and none could come
# before the model's own `forward`: FSDP2 takes what runs first for the root.
FORWARD_METHODS = (
    *("generate", "segment", "encode_image", "encode_concepts", "encode_slots", "predict_masks", "read_masks"),
)


def prepare_fsdp2(model: nn.Module, **fsdp_kwargs: Any) -> nn.Module:
    """Shard a SegCompass model with FSDP2, in place, into the units that accelerate makes of it.

    Units: what `_no_split_modules` names (decoder layers, vision blocks, the segmenter's image encoder and mask
    decoder, codebook, slot encoder, slot mapper), the embeddings, the final norm with the head (whose weight is read
    outside its `forward`, so it stays whole until the backward pass), and the rest. Freeze before you shard; the
    optimizer comes afterwards.

    Args:
        model ([`SegCompassForReasoningSegmentation`] or `PeftModel` of it): Sharded in place.
        fsdp_kwargs: For `torch.distributed.fsdp.fully_shard`: `mesh`, `mp_policy`, `offload_policy`, ...

    Returns:
        `nn.Module`: The model.
    """
    core = core_model(model)
    names = set(core._no_split_modules)
    for module in reversed(list(core.modules())):  # children before parents
        if type(module).__name__ in names:
            fully_shard(module, **fsdp_kwargs)
    embeddings, head = core.get_input_embeddings(), core.get_output_embeddings()
    tail = [final_norm(core.vlm), head]
    if embeddings.weight is head.weight:
        tail.insert(1, embeddings)  # one weight cannot be in two units
    else:
        fully_shard(embeddings, **fsdp_kwargs)
    fully_shard(tail, **{**fsdp_kwargs, "reshard_after_forward": False})
    fully_shard(model, **{key: value for key, value in fsdp_kwargs.items() if key != "reshard_after_forward"})
    return finish_sharding(model)


def finish_sharding(model: nn.Module) -> nn.Module:
    """What a sharded SegCompass model needs besides: without sharding nothing happens; more than once does no harm.

    - Methods called outside `forward` gather the weights they read.
    - The head is whole once the final norm has run: TRL's fused head reads its weight without calling it, and
      accelerate, which knows no final norm this deep inside a model, shards it on its own.
    - The gradient hooks that let only the rows of the added tokens train are put on the shards: `fully_shard` replaces
      parameters and leaves hooks behind, and the whole head would train.

    - The mask decoder is whole once the image encoder has run, where it has layers that take part in encoding.
    - Under DeepSpeed ZeRO-3, which gathers what a module's `forward` reads, the SAE and what the segmenter reads
      otherwise are gathered where they are read.

    Args:
        model ([`SegCompassForReasoningSegmentation`] or `PeftModel` of it): As sharded by accelerate, DeepSpeed or
            [`prepare_fsdp2`].
    """
    if hasattr(next(model.parameters()), "ds_id"):
        _gather_for_zero3(core_model(model))
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation before may have left some whole
        core = core_model(model)
        if "_fsdp_methods" not in core.__dict__:
            core.__dict__["_fsdp_methods"] = _gather_in_methods(model, core)
            _gather_head_after_norm(core)
            _gather_decoder_after_encoder(core)
        _train_only_token_rows(core)
    return model


class FinishShardingCallback(TrainerCallback):
    """Calls [`finish_sharding`] when training begins, after the model is sharded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        finish_sharding(model)


def core_model(model: nn.Module) -> nn.Module:
    """The SegCompass model inside a `PeftModel`, or itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _gather_in_methods(root: nn.Module, core: nn.Module) -> dict[str, int]:
    """Let [`FORWARD_METHODS`] run the root's hooks around them, unless they are called from within one another."""
    inside = {"depth": 0}

    def enter(*_: Any) -> None:
        inside["depth"] += 1

    def leave(*_: Any) -> None:
        inside["depth"] -= 1

    root.register_forward_pre_hook(enter)
    root.register_forward_hook(leave, always_call=True)
    for name in FORWARD_METHODS:
        plain = getattr(core, name)
        register_fsdp_forward_method(root, name)
        gathered = getattr(root, name)

        @functools.wraps(plain)
        def method(*args: Any, plain: Any = plain, gathered: Any = gathered, **kwargs: Any) -> Any:
            if inside["depth"]:
                return plain(*args, **kwargs)
            enter()
            try:
                return gathered(*args, **kwargs)
            finally:
                leave()

        for module in {id(root): root, id(core): core}.values():
            setattr(module, name, method)
    return inside


def _gather_for_zero3(core: nn.Module) -> None:
    import deepspeed

    if "encode" in core.sae.__dict__:
        return
    for name in ("encode", "decode"):
        plain = getattr(core.sae, name)

        @functools.wraps(plain)
        def method(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            with deepspeed.zero.GatheredParameters(list(core.sae.parameters())):  # frozen: no backward needs them
                return plain(*args, **kwargs)

        setattr(core.sae, name, method)
    for part in (core.sam.mask_decoder, core.sam.prompt_encoder):  # read embeddings' weights without calling them
        for embedding in part.children():
            if isinstance(embedding, nn.Embedding):
                deepspeed.zero.register_external_parameter(part, embedding.weight)
    # Read right after the prompt encoder has run, and the image encoder. SAM 2 has the former as a buffer.
    matrix = core.sam.shared_image_embedding.positional_embedding
    if hasattr(matrix, "ds_id"):
        core.sam.prompt_encoder.register_forward_hook(lambda *_: matrix.all_gather())
    if "no_memory_embedding" in dict(core.sam.named_parameters(recurse=False)):
        core.sam.vision_encoder.register_forward_hook(lambda *_: core.sam.no_memory_embedding.all_gather())


def _gather_head_after_norm(core: nn.Module) -> None:
    head = core.get_output_embeddings()
    if isinstance(head, FSDPModule):
        final_norm(core.vlm).register_forward_hook(lambda *_: head.unshard())


def _gather_decoder_after_encoder(core: nn.Module) -> None:
    """SAM 2 and later encode images with two layers of their mask decoder, outside its `forward`."""
    decoder = core.sam.mask_decoder
    if isinstance(decoder, FSDPModule) and core.mask_stage.encoding_parameters():
        core.sam.vision_encoder.register_forward_hook(lambda *_: decoder.unshard())


def _train_only_token_rows(core: nn.Module) -> None:
    """Zero, on every shard, the gradient of the embedding rows that `freeze_for_training` leaves fixed."""
    for handle in core.__dict__.pop("_shard_row_handles", []):
        handle.remove()
    if not core.__dict__.get("_token_row_handles"):
        return
    weights = {id(m.weight): m.weight for m in (core.get_output_embeddings(), core.get_input_embeddings())}
    config = core.config
    ids = [i for i in (config.ref_token_id, config.think_start_token_id, config.think_end_token_id) if i is not None]
    core.__dict__["_shard_row_handles"] = [
        weight.register_post_accumulate_grad_hook(_KeepShardRows(weight, ids))
        for weight in weights.values()
        if weight.requires_grad and isinstance(weight, DTensor)
    ]


class _KeepShardRows:
    """Hook on a weight sharded along its rows: zeroes the gradient of all rows but the given ones."""

    def __init__(self, weight: DTensor, rows: list[int]):
        fixed = torch.ones(weight.shape[0], 1, dtype=torch.uint8)
        fixed[rows] = 0
        shard = distribute_tensor(fixed, weight.device_mesh, weight.placements)  # as the weight is sharded
        self.fixed = shard.to_local().bool()  # (rows of this process, 1)

    @torch.no_grad()
    def __call__(self, weight: DTensor) -> None:
        gradient = weight.grad.to_local()
        gradient.masked_fill_(self.fixed.to(gradient.device), 0)


__all__ = ["FORWARD_METHODS", "FinishShardingCallback", "finish_sharding", "prepare_fsdp2"]
