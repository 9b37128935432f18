# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a VLM's frozen vision encoder makes of images on disk, so that it reads every image once."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..files import free_space, json_digest, weights_digest, write_whole
from .embedding_key import tensor_counters, what_matters
from .encoder_calls import EncoderInputs, OutputLayout, leaves, replaced_forward, split_rows
from .tensor_shards import TensorShards, gib

logger = logging.get_logger(__name__)

SAME = 0.02  # of the largest value: far above what the size of a batch changes in bfloat16, far below dropout's effect
FORMAT = 1  # part of every key: a change of what is stored must not find what was stored before


class VisionCache:
    """Within this context a vision encoder computes what it has not computed before, and reads the rest from disk.

    The encoder's `forward` stands in for itself, so that whoever calls it, in training or while writing, gets the same
    values in the same precision. They are stored by image, under a key of what the encoder is given for it: its
    pixels, further arguments and the precision of autocast. The key of the store is made of the encoder's weights and
    configuration: changed weights find nothing, also where they change meanwhile. Of the encoder's outputs those are
    kept that the VLM reads, which its first pass shows.

    An encoder that trains, that draws random numbers (dropout) or changes its buffers in training mode, or whose
    outputs cannot be told apart by image, is left alone, and a warning says so once.

    Several processes may use one folder at once. Images are kept as they come, and those of a killed process that are
    in no finished file are computed again.

    Args:
        folder (path): Where the cache is, or will be; that of an [`EmbeddingCache`] may be the same.
        encoder (`nn.Module`): Its `forward` gets `(batch_size, ...)` tensors, or packed patches of images with their
            `grid_thw`.
        shard_bytes (`int`, *optional*, defaults to 256 MiB): Size of a file; a kill loses at most so much.
        min_free_bytes (`int`, *optional*, defaults to 1 GiB): Space on the disk that is left alone.

    Example:

    ```python
    >>> with VisionCache("embeddings", vlm.model.vision_tower):  # doctest: +SKIP
    ...     vlm(**inputs)
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        encoder: nn.Module,
        shard_bytes: int = 256 * 2**20,
        min_free_bytes: int = 2**30,
    ):
        self.folder, self.encoder = Path(folder), encoder
        self.shard_bytes, self.min_free_bytes = shard_bytes, min_free_bytes
        self.num_computed = 0  # images that went through the encoder to be kept
        self.bytes_served = 0  # of what was given out from the store or stored
        self._signature = inspect.signature(encoder.forward)
        self._layouts: dict[str, OutputLayout | None] = {}  # by kind of call; None where nothing can be kept
        self._read: list[str] = []  # places of what the VLM reads of the outputs
        self._counters: list[tuple] | None = None
        self.keeps, self._shards = True, None  # whether what is computed is stored

    def __enter__(self) -> VisionCache:
        self._compute = self.encoder.forward
        self._replaced = replaced_forward(self.encoder, self._forward)
        self._replaced.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._replaced.__exit__(None, None, None)
        if self._shards is not None:
            self._flush()

    def announce(self, num_images: int, bytes_per_image: int) -> None:
        """Say what so many images will take on the disk, where none of them is known.

        Raises:
            OSError: The disk is too small.
        """
        known = bytes_per_image and sum(path.stat().st_size for path in self.shards.folder.glob("*.safetensors"))
        total, free = max(0, num_images * bytes_per_image - known), free_space(self.folder)
        text = (
            f"vision cache: up to {gib(total)} more for {num_images:,} images ({gib(bytes_per_image)} each, "
            f"{gib(known)} are there), {gib(free)} free in {os.fspath(self.folder)!r}"
        )
        if free - total < self.min_free_bytes:
            raise OSError(
                f"{text}: {gib(self.min_free_bytes - free + total)} too little, with {gib(self.min_free_bytes)} left "
                "free. Use another folder or fewer images, or leave embedding_cache_dir out."
            )
        logger.warning(text)

    @property
    def shards(self) -> TensorShards:
        """The store for the encoder as it is now. Unchanged weights are not read again."""
        counters = tensor_counters(dict(self.encoder.named_parameters()) | dict(self.encoder.named_buffers()))
        if counters != self._counters:
            config = getattr(self.encoder, "config", None)
            description = {
                "format": FORMAT,
                "encoder": type(self.encoder).__name__,
                "config": {}
                if config is None
                else json.loads(json.dumps(what_matters(config.to_dict()), default=str)),
                "weights": weights_digest(self.encoder),
            }
            key = json_digest(description)[:32]
            if self._shards is None or key != self._shards.identity:
                if self._shards is not None:
                    logger.warning("vision cache: the VLM's vision encoder changed; earlier entries do not fit.")
                    self._flush()
                self._shards = TensorShards(self.folder / key, key, self.shard_bytes, self.min_free_bytes)
                path = self.folder / key / "encoder.json"  # for those who wonder what a folder is
                if not path.exists():
                    write_whole(path, json.dumps(description, indent=2, sort_keys=True))
            self._counters = counters
        return self._shards

    @torch.compiler.disable
    def _forward(self, *args, **kwargs) -> Any:
        inputs = EncoderInputs.of(self._signature.bind(*args, **kwargs))
        layout = self._layout(inputs)
        if layout is None:
            return self._compute(*args, **kwargs)
        known = self._known(inputs, layout.read) if layout.read else {}  # its first pass shows what is read
        return layout.outputs(known, lambda: self._run(inputs))

    def _run(self, inputs: EncoderInputs) -> Any:
        with torch.no_grad():
            return self._compute(**inputs.arguments())

    def _known(self, inputs: EncoderInputs, paths: list[str]) -> dict[str, torch.Tensor]:
        """Those tensors of the output, from the store; images that it lacks are computed as one batch and kept."""
        shards, keys = self.shards, inputs.keys()
        if any(key + path not in shards for key in keys for path in paths):
            shards.refresh()
        missing = {key: i for i, key in enumerate(keys) if any(key + path not in shards for path in paths)}
        fresh: dict[str, torch.Tensor] = {}
        if missing:
            taken = inputs.take(list(missing.values()))
            output = dict(leaves(self._run(taken)))
            for path in paths:
                for key, part in zip(missing, split_rows(output[path], taken.sizes), strict=True):
                    fresh[key + path] = part
            self.num_computed += len(missing)
            self._keep(fresh)
        known = {}
        for path in paths:
            parts = [fresh[key + path] if key in missing else shards.get(key + path) for key in keys]
            known[path] = torch.cat([part.to(inputs.device) for part in parts])
            self.bytes_served += known[path].nbytes
        return known

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        try:
            for name, tensor in tensors.items() if self.keeps else ():
                self._shards.put(name, tensor.detach().to("cpu", copy=True))
        except OSError as error:
            self._stop_storing(error)

    def _flush(self) -> None:
        try:
            self._shards.flush()
        except OSError as error:
            self._stop_storing(error)

    def _stop_storing(self, error: OSError) -> None:
        self.keeps = False
        self._shards.discard_pending()
        logger.warning(f"vision cache: nothing more is stored, work goes on without ({error}).")

    def _layout(self, inputs: EncoderInputs | None) -> OutputLayout | None:
        """What is known of the outputs of such a call; `None` where they are not kept, which a warning says once."""
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        if trains or inputs is None:
            kind = reason = "it trains" if trains else "its inputs cannot be told apart by image"
        else:
            kind, reason = f"{inputs.kind} {self.encoder.training}", None
        if kind not in self._layouts:
            layout, reason = (None, reason) if reason else self._try(inputs.take([0]))
            self._layouts[kind] = layout
            if layout is None:
                logger.warning(f"vision cache: the VLM's vision encoder is run at every step, because {reason}.")
        return self._layouts[kind]

    @torch.no_grad()
    def _try(self, inputs: EncoderInputs) -> tuple[OutputLayout | None, str | None]:
        """Whether what the encoder makes of an image is the same whenever it is asked, found by asking.

        Nothing of the trial is left behind: random states, buffers and modes are put back.

        Returns:
            `tuple`: the outputs' layout, or `None` and why they cannot be kept.
        """
        random, buffers = _random_states(inputs.device), dict(self.encoder.named_buffers())
        counters, saved = tensor_counters(buffers), {name: buffer.clone() for name, buffer in buffers.items()}
        modes = [(module, module.training) for module in self.encoder.modules()]
        try:
            beside = self._run(inputs.beside_another())
            if any(not torch.equal(a, b) for a, b in zip(random, _random_states(inputs.device), strict=True)):
                return None, "it draws random numbers in training (dropout)"
            if tensor_counters(buffers) != counters:
                return None, "it changes its buffers in training"
            self.encoder.eval()
            alone, sizes = self._run(inputs), [*inputs.sizes, inputs.sizes[-1]]
            if any(not isinstance(leaf, torch.Tensor) for _, leaf in leaves(alone) if leaf is not None):
                return None, "it hands out other things than tensors"
            if not _same(dict(leaves(alone)), {path: _first(leaf, sizes) for path, leaf in leaves(beside)}):
                return (
                    None,
                    "what it makes of an image depends on other images or on training, or stands in no row",
                )
            return OutputLayout(alone, self._read), None
        finally:
            for module, training in modes:
                module.training = training
            if tensor_counters(buffers) != counters:
                for name, buffer in buffers.items():
                    buffer.copy_(saved[name])
            torch.set_rng_state(random[0])
            if len(random) > 1:
                torch.get_device_module(inputs.device).set_rng_state(random[1], inputs.device)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _first(leaf: Any, sizes: list[int]) -> Any:
    """The first image's rows of a tensor; `None` where rows are no image's."""
    parts = split_rows(leaf, sizes) if isinstance(leaf, torch.Tensor) else None
    return None if parts is None else parts[0]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether leaves are equal, tensors but for rounding, which differs with the size of a batch."""
    return one.keys() == other.keys() and all(_same_leaf(leaf, other[path]) for path, leaf in one.items())


def _same_leaf(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    difference = (one.float() - other.float()).abs().max() if one.numel() else torch.tensor(0.0)
    return bool(difference <= SAME * one.float().abs().max().clamp(min=1e-6)) if one.numel() else True


__all__ = ["VisionCache"]
