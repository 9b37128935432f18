# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Slots and reference states of rows on disk, so that a frozen VLM reads every row once."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..files import free_space, json_digest, weights_digest
from ..images_segcompass import to_rgb_image
from .collator import language_inputs
from .embedding_key import image_key
from .tensor_shards import TensorShards, gib
from .vlm_texts import reasoning_of

logger = logging.get_logger(__name__)

FORMAT = 1  # part of every key: a change of what is stored must not find what was stored before
_PATCHES = "/patches"  # end of the name under which the embeddings of a row's image tokens are stored
READERS = ("vlm", "sae", "codebook", "slot_encoder")  # the modules that turn a row into its slots
_SETTINGS = (  # of the configuration, beside those of the modules
    "num_slots",
    "sae_layer",
    "concept_threshold",
    "concept_input",
    "reference_search",
    "reference_order",
    "ref_token_id",
    "slot_encoder_heads",
)


class SlotCache:
    """Row with its reference answer -> slots and reference states, from disk where they have been read before.

    These are all that masks need of the VLM: where it, the SAE, the codebook and the slot encoder are frozen, training
    the rest sees them again and again. The key of a row is made of its image's pixels and its texts as the processor
    writes them, that of the store of everything that turns them into states: the weights of those four modules, their
    configuration, the processor's side of the VLM, and the precision. Changed weights therefore find nothing.

    States are kept as float32, `num_slots * (d_slot + hidden_size) * 4` bytes a row: 74 KB for 4 slots of 512 and a
    VLM of width 4096. With `heatmap_concepts` come the concept embeddings of the image tokens, `num_patches * d_slot *
    4` bytes: 262 KB for 256 tokens of 256. Several processes may fill one folder at once.

    Args:
        folder (path): Where the cache is, or will be.
        model (`SegCompassForReasoningSegmentation`): Reads what is missing, in evaluation mode.
        processor (`SegCompassProcessor`): Prepares the rows.
        precision (`Callable`, *optional*): Makes the context to read in, such as `accelerator.autocast`.
        precision_name (`str`, *optional*, defaults to `"weights"`): Part of the store's key.
        shard_bytes (`int`, *optional*, defaults to 64 MiB): Size of a file; a kill loses at most so much.
        min_free_bytes (`int`, *optional*, defaults to 1 GiB): Space on the disk that is left alone.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: Any,
        processor: Any,
        precision: Callable[[], AbstractContextManager] = nullcontext,
        precision_name: str = "weights",
        shard_bytes: int = 64 * 2**20,
        min_free_bytes: int = 2**30,
    ):
        self.model, self.processor, self._precision = model, processor, precision
        config = model.config
        self._widths = (config.d_slot, config.hidden_size)
        self._bytes_per_row = 4 * config.num_slots * sum(self._widths)
        self._with_patches = config.heatmap_concepts
        self.min_free_bytes = min_free_bytes
        key = json_digest(_describe(model, processor) | {"precision": precision_name})[:32]
        self.shards = TensorShards(Path(folder) / key, key, shard_bytes, min_free_bytes)

    def __len__(self) -> int:
        return len(self.shards) // len(self._names(""))

    def _names(self, key: str) -> list[str]:
        """Under which what there is of a row is stored: its states and, where needed, those of its image tokens."""
        return [key, f"{key}{_PATCHES}"] if self._with_patches else [key]

    def _has(self, key: str) -> bool:
        return all(name in self.shards for name in self._names(key))

    def __getstate__(self) -> dict[str, Any]:
        """Copies (data loader workers) leave the model behind, and read."""
        return self.__dict__ | {"model": None, "_precision": None}

    def states_of(self, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes in place of a sequence.

        Args:
            rows (`Sequence[dict]`): In the row schema.
            images (`Sequence[PIL.Image.Image]`): Of these rows, RGB.

        Returns:
            `dict`: `slots` `(batch_size, num_slots, d_slot)` and `reference_states`
            `(batch_size, num_slots, hidden_size)`, float32, on the CPU; with `heatmap_concepts` also
            `image_concept_embeddings` `(batch_size, num_patches, d_slot)`, padded with zeros.

        Raises:
            ValueError: A row was not read by `fill`.
        """
        found = []
        for row, image in zip(rows, images, strict=True):
            key = self._key(row, image)
            if not self._has(key):
                raise ValueError(
                    f"sample {row.get('sample_id')!r} is not in the slot cache {os.fspath(self.shards.folder)!r}; "
                    "call cache.fill(rows) with all rows before."
                )
            found.append([self.shards.get(name) for name in self._names(key)])
        states, *patches = zip(*found, strict=True)
        slots, references = torch.stack(states).split(self._widths, dim=-1)
        inputs = {"slots": slots, "reference_states": references}
        if patches:
            inputs["image_concept_embeddings"] = pad_sequence(list(patches[0]), batch_first=True)
        return inputs

    def fill(self, rows: Any, batch_size: int = 8, process_index: int = 0, num_processes: int = 1) -> int:
        """Read the rows of a data set; its size is announced, and must fit the disk, before anything is read.

        Rows that cannot be read are left out: whoever trains on them names them.

        Args:
            rows (`Sequence[dict]`): In the row schema.
            batch_size (`int`, *optional*, defaults to 8): Rows through the VLM at a time.
            process_index, num_processes (`int`, *optional*): Who of how many this is; they share the rows by content.

        Returns:
            `int`: rows read by this process.

        Raises:
            OSError: The disk is too small; nothing has been read.
        """
        batch, number, announced = {}, 0, False
        for index in logging.tqdm(range(len(rows)), desc="slot cache"):
            try:
                row = rows[index]
                image = to_rgb_image(row["image"])
                key = self._key(row, image)
            except MemoryError:
                raise
            except Exception:  # damaged files raise about anything
                continue
            if not announced:
                self._announce(len(rows), image)
                announced = True
            if int(key, 16) % num_processes == process_index and not self._has(key):
                batch[key] = (image, row)
            if len(batch) == batch_size:
                number += self._read(batch)
                batch = {}
        number += self._read(batch)
        self.shards.flush()
        return number

    def _announce(self, num_rows: int, image: Image.Image) -> None:
        """Of rows like the first one that can be read."""
        per_row = self._bytes_per_row
        if self._with_patches:
            grid = self.processor.token_grid(image.height, image.width)
            per_row += 4 * self._widths[0] * grid.rows * grid.columns
        size, free = per_row * max(0, num_rows - len(self)), free_space(self.shards.folder)
        text = (
            f"slot cache: up to {gib(size)} for {num_rows:,} rows ({per_row:,} bytes each, {len(self):,} "
            f"are there), {gib(free)} free in {os.fspath(self.shards.folder)!r}"
        )
        if free - size < self.min_free_bytes:
            raise OSError(f"{text}, of which {gib(self.min_free_bytes)} stay free. Use another folder or fewer rows.")
        logger.warning(text)

    def _key(self, row: dict[str, Any], image: Image.Image) -> str:
        """Of what the model sees of a row, 32 hexadecimal digits."""
        prompt = self.processor.build_prompt(row["instruction"])
        answer = self.processor.build_completion(reasoning_of(row))
        return hashlib.sha256(json.dumps([image_key(image), prompt, answer]).encode()).hexdigest()[:32]

    @torch.no_grad()
    def _read(self, batch: dict[str, tuple[Image.Image, dict[str, Any]]]) -> int:
        """Let the model read rows by their keys, and keep the states."""
        if not batch:
            return 0
        images, rows = zip(*batch.values(), strict=True)
        instructions, reasonings = [row["instruction"] for row in rows], [reasoning_of(row) for row in rows]
        inputs = language_inputs(self.processor, list(images), instructions, reasonings).to(self.model.device)
        del inputs["labels"]
        if "logits_to_keep" in inspect.signature(self.model.vlm.forward).parameters:
            inputs["logits_to_keep"] = 1  # none is read
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with self._precision():
                output = self.model(**inputs, output_slots=True, output_concept_embeddings=self._with_patches)
        finally:
            for module in training:
                module.training = True
        states = torch.cat([output.slots.float(), output.reference_states.float()], dim=-1).cpu()
        for key, state in zip(batch, states, strict=True):
            self.shards.put(key, state.clone())
        if self._with_patches:
            is_image = self.model.modality_ids(inputs["input_ids"]).bool()
            for key, embeddings, where in zip(batch, output.concept_embeddings, is_image, strict=True):
                self.shards.put(f"{key}{_PATCHES}", embeddings[where].float().cpu())
        return len(batch)


def _describe(model: Any, processor: Any) -> dict[str, Any]:
    """All that decides the states of a row, as json holds it."""
    config, tokenizer = model.config, processor.tokenizer
    parts = {name: getattr(config, f"{name}_config").to_dict() for name in ("vlm", "sae")}
    others = ("sam_image_processor", "image_token_grids")  # nothing of the states
    settings = {name: value for name, value in processor.to_dict().items() if name not in others}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    words = {name: value for name, value in words.items() if name not in ("padding", "truncation")}  # of the last call
    return {
        "format": FORMAT,
        "weights": {name: weights_digest(getattr(model, name)) for name in READERS},
        "configuration": _plain(parts | {name: getattr(config, name) for name in _SETTINGS}),
        "processor": _plain(settings | {"chat_template": processor.chat_template}),
        "tokenizer": json_digest(words),
    }


def _plain(value: Any) -> Any:
    """A configuration as json holds it, without notes of where it was loaded, by what, and in which precision."""
    if isinstance(value, dict):
        notes = ("transformers_version", "dtype", "architectures", "auto_map", "processor_class")
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in notes}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


__all__ = ["READERS", "SlotCache"]
