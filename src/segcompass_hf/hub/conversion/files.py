# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights on disk, one tensor at a time: read by name, written shard by shard."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

# safetensors' names of what checkpoints hold
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass
class StoredTensor:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    source: str  # the file it lies in

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @classmethod
    def of(cls, tensor: torch.Tensor, source: str) -> StoredTensor:
        """Around a tensor that is there (or memory-mapped) already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, source)

    def cast(self, dtype: torch.dtype | None) -> StoredTensor:
        """The same in another floating dtype; tensors of whole numbers stay as they are."""
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return StoredTensor(self.shape, dtype, lambda: self.read().to(dtype), self.source)


def read_torch_file(path: str | os.PathLike) -> Any:
    """Read a `.pt`, `.pth` or `.bin` file without running anything in it, memory-mapped where its format allows.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a file that torch.save wrote.")
    arguments = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **arguments)
        except (RuntimeError, OSError):  # the format before zip files cannot be mapped
            return torch.load(path, **arguments)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{path} cannot be read as weights (weights_only=True): {reason or type(error).__name__}. It is damaged, "
            "no file of torch.save, or holds more than tensors; save its state dict alone and pass that."
        ) from error


def check_state_dict(state: Any, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """A mapping of names to tensors, or an error that says what was found instead."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a state dict, names to tensors.")
    wrong = [f"{name} ({type(value).__name__})" for name, value in state.items() if not torch.is_tensor(value)]
    if wrong:
        raise ValueError(
            f"{path} holds entries that are no tensors: {shorten(wrong)}; expected a state dict, names to tensors."
        )
    if not state:
        raise ValueError(f"{path} holds no tensors.")
    return dict(state)


def open_weights(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """The weights of a checkpoint folder of Hugging Face, none of them read yet.

    Args:
        folder (`str` or `os.PathLike`): Holds `model.safetensors`, its shards, or the same as `pytorch_model.bin`.

    Raises:
        FileNotFoundError: There are no weights, or shards are missing.
        ValueError: A file is damaged.
    """
    folder = Path(folder)
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            files = [single]
        elif (folder / index).is_file():
            files = sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()))
        else:
            continue
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(files)} weight files that {index} names: "
                f"{shorten(missing)}; copy or download them again."
            )
        weights: dict[str, StoredTensor] = {}
        for name in files:
            weights |= _open_file(folder / name)
        return weights
    raise FileNotFoundError(f"{folder} holds no weights ({SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or their shards).")


def _open_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix != ".safetensors":
        state = check_state_dict(read_torch_file(path), path)
        return {name: StoredTensor.of(tensor, path.name) for name, tensor in state.items()}
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy or download it again.") from error
    weights = {}
    for name in file.keys():  # noqa: SIM118  (a reader, not a dict)
        part = file.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(f"{path} holds {name} as {part.get_dtype()}, which is no dtype of weights here.")
        weights[name] = StoredTensor(tuple(part.get_shape()), dtype, _reader(file, name), path.name)
    return weights


def _reader(file: Any, name: str) -> Callable[[], torch.Tensor]:
    return lambda: file.get_tensor(name)


def write_shards(folder: Path, weights: Mapping[str, StoredTensor], max_shard_size: int | str = "5GB") -> list[str]:
    """Write weights as `model.safetensors` or its shards with an index; memory holds one shard at a time.

    Args:
        folder (`Path`): Where to.
        weights (`Mapping[str, StoredTensor]`): By name.
        max_shard_size (`int` or `str`): Bytes, or a text such as `"5GB"`.

    Returns:
        `list[str]`: The names of the weight files.
    """
    plan = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].read().contiguous() for name in names}
        save_file(_without_shared_memory(shard), folder / file, metadata={"format": "pt"})
        del shard  # before the next one is read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    return sorted(plan.filename_to_tensors)


def _without_shared_memory(shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses two names of one memory, which mapped files may give for tied weights."""
    seen: set[int] = set()
    for name, tensor in shard.items():
        pointer = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.itemsize
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            shard[name] = tensor.clone()
        seen.add(pointer)
    return shard


def shorten(names: list[str], limit: int = 4) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


__all__ = ["StoredTensor", "check_state_dict", "open_weights", "read_torch_file", "shorten", "write_shards"]
