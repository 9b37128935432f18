# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""SAM's image embeddings on disk, so that a frozen image encoder sees every image once."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..files import free_space, json_digest, write_whole
from ..image_features_segcompass import ImageFeatures, join_rows, parts_of
from ..images_segcompass import to_rgb_image
from .embedding_key import change_counters, describe_encoding, image_key, image_settings
from .tensor_shards import DTYPES, TensorShards, check_dtype, gib

logger = logging.get_logger(__name__)


class CacheSize(NamedTuple):
    """Space that embeddings take, in bytes.

    Args:
        per_image (`int`): Of one image.
        total (`int`): Of all images asked about.
        free (`int`): What is free on the cache's disk.
    """

    per_image: int
    total: int
    free: int


class MissingEmbeddingsError(ValueError):
    """Images are not in the cache, and who asks can only read."""


class EmbeddingCache:
    """Image -> SAM embedding, from disk where it has been computed before.

    The key of an embedding is made of the image's pixels and of everything that turns them into the embedding: all
    weights of SAM's image encoder (and of what else takes part) and their dtype, its config, the image processor's
    settings, and the dtype stored. A
    changed encoder therefore finds nothing, also when it changes while the cache is in use. Weights that an
    optimizer changes through `.data` go unseen: call `refresh_key`.

    Several processes may use one folder at once. In data loader workers, and in copies (`pickle`, `copy.deepcopy`),
    which leave the model behind, the cache is read only, under the key of when they were made: `fill` it before. Where
    training shards the model (FSDP, ZeRO-3), fill it and pass on `copy.deepcopy(cache)` before the trainer is made.

    Args:
        folder (path): Where the cache is, or will be.
        model (`SegCompassForReasoningSegmentation`): Its SAM encodes what is missing.
        processor (`SegCompassProcessor`): Prepares the images.
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"`, `"bfloat16"` or `"float32"`: what is stored
            and returned. At full size (256 x 64 x 64) an image takes 2 MiB, with float32 4 MiB; of a segmenter whose
            mask decoder reads more, as SAM 2's, four to six times as much.
        batch_size (`int`, *optional*, defaults to 4): Images through the encoder at a time.
        shard_bytes (`int`, *optional*, defaults to 256 MiB): Size of a file; a kill loses at most so much.
        min_free_bytes (`int`, *optional*, defaults to 1 GiB): Space on the disk that is left alone.
        missing (`str`, *optional*, defaults to `"error"`): What `sam_inputs` does where an image is missing and only
            reading is possible: `"pixels"` gives `sam_pixel_values` of the whole batch, which the model then encodes.

    Example:

    ```python
    >>> cache = EmbeddingCache("embeddings", model, processor)  # doctest: +SKIP
    >>> cache.fill(dataset)  # doctest: +SKIP
    >>> collator = SegmentationCollator(processor, embedding_cache=cache)  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: Any,
        processor: Any,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        batch_size: int = 4,
        shard_bytes: int = 256 * 2**20,
        min_free_bytes: int = 2**30,
        missing: Literal["error", "pixels"] = "error",
    ):
        check_dtype(dtype)
        if min(batch_size, shard_bytes) < 1:
            raise ValueError(f"batch_size={batch_size} and shard_bytes={shard_bytes} must be at least 1.")
        self.folder, self.dtype, self.batch_size = Path(folder), dtype, batch_size
        self.model, self.processor, self.missing = model, processor, missing
        self._limits = {"shard_bytes": shard_bytes, "min_free_bytes": min_free_bytes}
        shapes = model.mask_stage.feature_shapes
        self._extra = tuple(f"/{number}" for number in range(1, len(shapes)))  # ends of the names of extra parts
        self._bytes_per_image = sum(prod(shape) for shape in shapes) * DTYPES[dtype].itemsize
        self.num_encoded = 0  # images that went through the encoder
        self._stores_new = True
        self._state: tuple[Any, ...] | None = None  # of the encoder, when it was last looked at
        self.encoder_key = ""
        self._check_key()

    def refresh_key(self) -> str:
        """Read the encoder's weights anew; returns the key of the encoder, which is the name of the shards' folder."""
        self._state = None
        self._check_key()
        return self.encoder_key

    def _check_key(self) -> None:
        """Follow the encoder, if it has changed since the last look. Unchanged weights are not read again."""
        if self.model is None:
            return
        state = change_counters(self.model), image_settings(self.processor)
        if state == self._state:
            return
        description = describe_encoding(self.model, self.processor) | {"stored": self.dtype}
        key = json_digest(description)[:32]
        if self.encoder_key and key != self.encoder_key:
            logger.warning("embedding cache: SAM's image encoder or its input changed; earlier entries do not fit.")
            self.flush()
        if key != self.encoder_key:
            self.encoder_key = key
            self.shards = TensorShards(self.folder / key, identity=key, **self._limits)
            weakref.finalize(self, _flush_at_exit, self.shards, os.getpid())
            path = self.folder / key / "encoder.json"  # for those who wonder what a folder is
            if not path.exists():
                write_whole(path, json.dumps(description, indent=2, sort_keys=True))
        self._state = state

    def __len__(self) -> int:
        return len(self.shards) // (1 + len(self._extra))

    def __contains__(self, key: str) -> bool:
        """Whether all of an image is there, by its `image_key`."""
        return all(name in self.shards for name in self._names(key))

    def _names(self, key: str) -> list[str]:
        """Under which the parts of an image are stored."""
        return [key, *(key + end for end in self._extra)]

    def _read(self, key: str) -> torch.Tensor | ImageFeatures:
        embeddings, *extra = (self.shards.get(name) for name in self._names(key))
        return ImageFeatures(embeddings, tuple(extra)) if extra else embeddings

    def get(self, images: Sequence[Any]) -> torch.Tensor | ImageFeatures:
        """Embeddings of images; what is missing is encoded and kept.

        Args:
            images (`Sequence`): Of any form that `to_rgb_image` takes.

        Returns:
            `torch.Tensor` of shape `(num_images, channels, height, width)`, or [`ImageFeatures`] where the mask
            decoder reads more: on the CPU, in the cache's dtype.

        Raises:
            MissingEmbeddingsError: (a `ValueError`) An image is missing and this copy cannot encode it.
            ValueError: An embedding does not fit the dtype.
        """
        self._check_key()
        images = [to_rgb_image(image) for image in images]
        keys = [image_key(image) for image in images]
        unknown = {key: image for key, image in zip(keys, images, strict=True) if key not in self}
        known = {key: self._read(key) for key in keys if key not in unknown}
        found = known | self._encode_missing(unknown)
        return join_rows([found[key] for key in keys])

    def sam_inputs(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes in place of `sam_pixel_values`: `image_embeddings`, and the images' sizes."""
        try:
            embeddings = self.get(images)
        except MissingEmbeddingsError:
            if self.missing == "error":
                raise
            return self.processor._sam_inputs(images)
        return {"image_embeddings": embeddings, **self.processor._places(images)}

    def caching_processor(self, processor: Any) -> Any:
        """A copy of a processor whose inputs hold `image_embeddings` of this cache in place of `sam_pixel_values`."""
        processor = copy.copy(processor)
        processor._sam_inputs = self.sam_inputs
        return processor

    def size(self, num_images: int) -> CacheSize:
        """Space that so many different images take, and what is free."""
        per_image = self._bytes_per_image
        return CacheSize(per_image, per_image * num_images, free_space(self.folder))

    def fill(self, rows: Iterable[Any], process_index: int = 0, num_processes: int = 1) -> int:
        """Encode the images of a data set beforehand. The size is announced, and must fit, before anything is encoded.

        Several processes that fill the cache from the same rows share the images out among themselves by content, so
        that no image is encoded twice, however often it occurs.

        Args:
            rows (iterable): Rows of a data set (their `image` is used), or images.
            process_index, num_processes (`int`, *optional*): Who of how many this is.

        Returns:
            `int`: images encoded by this process.

        Raises:
            OSError: the disk is too small; nothing has been encoded, if `rows` has a length.
        """
        self._check_key()
        if hasattr(rows, "__len__"):
            self._announce(_count_images(rows))
        before, batch = self.num_encoded, {}
        for row in logging.tqdm(rows, desc="embedding cache", disable=process_index > 0):
            image = to_rgb_image(row["image"] if isinstance(row, dict) and "image" in row else row)
            key = image_key(image)
            if int(key, 16) % num_processes == process_index and key not in self:
                batch[key] = image
            if len(batch) == self.batch_size:
                self._encode_missing(batch, must_store=True)
                batch = {}
        self._encode_missing(batch, must_store=True)
        self.shards.flush()
        return self.num_encoded - before

    def _announce(self, num_images: int) -> None:
        size = self.size(max(0, num_images - len(self)))
        free_after = size.free - size.total - self._limits["min_free_bytes"]
        text = (
            f"embedding cache: up to {gib(size.total)} for {num_images:,} images ({gib(size.per_image)} each, "
            f"{len(self):,} are there), {gib(size.free)} free in {os.fspath(self.folder)!r}"
        )
        if free_after < 0:
            raise OSError(
                f"{text}: {gib(-free_after)} too little, with {gib(self._limits['min_free_bytes'])} left free. Use "
                "another folder, a smaller dtype, or fewer images."
            )
        logger.warning(text)

    def flush(self) -> None:
        """Write what is still in memory, as `fill`, `with EmbeddingCache(...) as cache` and exit do."""
        try:
            self.shards.flush()
        except OSError as error:
            self._stop_storing(error)

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave the model behind, and read."""
        self.flush()
        return self.__dict__ | {"model": None, "_state": None}

    def _encode_missing(self, images: dict[str, Image.Image], must_store: bool = False) -> dict[str, Any]:
        """Embeddings of images whose keys were not there. Those that no other process has added are encoded."""
        if images:
            self.shards.refresh()
        found = {key: self._read(key) for key in images if key in self}
        missing = [key for key in images if key not in found]
        if missing and (self.model is None or get_worker_info() is not None):
            raise MissingEmbeddingsError(
                f"{len(missing)} images of a batch are not in the embedding cache {os.fspath(self.folder)!r}, and "
                "data loader workers and copies of a cache only read: call cache.fill(rows) before, or no workers."
            )
        for start in range(0, len(missing), self.batch_size):
            keys = missing[start : start + self.batch_size]
            for key, embedding in zip(keys, self._encode([images[key] for key in keys]), strict=True):
                found[key] = embedding
                try:
                    if must_store or self._stores_new:
                        for name, part in zip(self._names(key), parts_of(embedding), strict=True):
                            self.shards.put(name, part)
                except OSError as error:
                    if must_store:
                        raise
                    self._stop_storing(error)
        return found

    @torch.no_grad()
    def _encode(self, images: list[Image.Image]) -> list[torch.Tensor | ImageFeatures]:
        device = next(self.model.sam.vision_encoder.parameters()).device
        pixels = self.processor._sam_inputs(images)["sam_pixel_values"].to(device)
        with torch.autocast(device.type, enabled=False):  # what is stored must not depend on who asks first
            embeddings = self.model.encode_image(pixels)
        embeddings = embeddings.to("cpu", DTYPES[self.dtype])
        if not all(part.isfinite().all() for part in parts_of(embeddings)):
            raise ValueError(
                f"SAM's embeddings hold NaN or infinity in {self.dtype}; try dtype='float32', and if that does not "
                "help look at SAM's weights."
            )
        self.num_encoded += len(images)
        return [embeddings[row].clone() for row in range(len(images))]

    def _stop_storing(self, error: OSError) -> None:
        self._stores_new = False
        self.shards.discard_pending()
        logger.warning(f"embedding cache: nothing more is stored, work goes on without ({error}).")


def _flush_at_exit(shards: TensorShards, process: int) -> None:
    try:
        if os.getpid() == process:  # a fork's memory is a copy
            shards.flush()
    except OSError as error:
        logger.warning(f"embedding cache: the last embeddings are not stored ({error}).")


def _count_images(rows: Any) -> int:
    """Different images of rows, as far as they say so: many sentences are about one image."""
    if "image_id" in (getattr(rows, "column_names", None) or []):
        return len(set(rows["image_id"]))
    ids = [row.get("image_id") for row in rows if isinstance(row, dict)] if isinstance(rows, (list, tuple)) else []
    named = {name for name in ids if name is not None}
    return len(named) + len(rows) - sum(name is not None for name in ids)
