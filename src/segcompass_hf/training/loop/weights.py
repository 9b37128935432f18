"""Whether a checkpoint's weights are those of the model, by name and shape, before any of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_NAMES_SHOWN = 3


def stored_shapes(folder: str | Path, stem: str = "model") -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the weights in a folder, read from file headers.

    Args:
        folder (`str` or `Path`): a checkpoint.
        stem (`str`, *optional*, defaults to `"model"`): `"adapter_model"` for a PEFT adapter.

    Returns:
        `dict[str, tuple[int, ...]]`, or `None` where the folder holds no such weights in one file or in shards.

    Raises:
        FileNotFoundError: A shard that the index names is missing.
    """
    folder = Path(folder)
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return _header(single)
    if index.is_file():
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder} lacks {shard}, which {index.name} names; copy it again.")
            shapes.update(_header(folder / shard))
        return shapes
    pickled = folder / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    if pickled.is_file():
        state = torch.load(pickled, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    return None


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def check_weights_fit(folder: str | Path, model: Any) -> None:
    """Refuse a checkpoint that a Trainer would load in part only.

    `Trainer` loads with `strict=False`, where names that do not fit are left out with a warning at most. A name may be
    missing where its tensor is tied to one that is there.

    Args:
        folder (`str` or `Path`): A checkpoint as Trainer writes it: one file, shards, or PEFT adapters.
        model (`torch.nn.Module` or `PeftModel`): What they are loaded into.

    Raises:
        ValueError: Names or shapes differ; the first ones are shown.
    """
    from transformers.utils import is_peft_available

    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            _check_adapters(Path(folder), model)
            return
    stored = stored_shapes(folder)
    if stored is not None:
        state = model.state_dict()
        _compare(folder, stored, state, optional=_not_saved(model) | _tied(state, stored))


def forget_tied_names(model: torch.nn.Module, keys: Any) -> None:
    """A hook for `register_load_state_dict_post_hook`: names tied to loaded ones, or never saved, are not missing.

    Args:
        model (`torch.nn.Module`): Just loaded.
        keys (`NamedTuple`): Its `missing_keys` are changed in place.
    """
    if keys.missing_keys:
        state, missing = model.state_dict(), set(keys.missing_keys)
        there = _not_saved(model) | _tied(state, {name: () for name in state if name not in missing})
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in there]


def _not_saved(model: Any) -> set[str]:
    return set(getattr(model, "_keys_to_ignore_on_save", None) or [])


def check_shards_fit(folder: str | Path, model: Any) -> None:
    """The same for FSDP2's sharded checkpoints, which hold more than is loaded without a word.

    Args:
        folder (`str` or `Path`): A checkpoint; without `pytorch_model_fsdp_0` in it, torch itself loads strictly.
        model (`torch.nn.Module`): Already sharded.

    Raises:
        ValueError: Names or shapes differ.
    """
    shards = Path(folder) / "pytorch_model_fsdp_0"
    if not (shards / ".metadata").is_file():
        return
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    metadata = FileSystemReader(shards).read_metadata().state_dict_metadata
    stored = {name.removeprefix("model."): tuple(getattr(entry, "size", ())) for name, entry in metadata.items()}
    state = get_model_state_dict(model)
    _compare(folder, stored, state, optional=_tied(state, stored))


def _tied(state: dict[str, torch.Tensor], stored: dict) -> set[str]:
    """Names that share their memory with a stored one."""
    places = {_place(state[name]) for name in stored if name in state}
    return {name for name, tensor in state.items() if name not in stored and _place(tensor) in places}


def _place(tensor: torch.Tensor) -> tuple:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.numel() or id(tensor)


def _check_adapters(folder: Path, model: Any) -> None:
    from peft import get_peft_model_state_dict

    for name in model.peft_config:
        place = folder if name == "default" or not (folder / name).is_dir() else folder / name
        stored = stored_shapes(place, "adapter_model")
        if stored is None:
            raise ValueError(
                f"{place} holds no weights of the adapter {name!r} (adapter_model.safetensors); a checkpoint of a run "
                "without peft_config cannot be resumed with one."
            )
        _compare(place, stored, get_peft_model_state_dict(model, adapter_name=name), optional=set())


def _compare(folder, stored: dict, state: dict[str, torch.Tensor], optional: set[str]) -> None:
    unknown = [name for name in stored if name not in state]
    missing = [name for name in state if name not in stored and name not in optional]
    shapes = [
        f"{name} ({tuple(stored[name])} stored, {tuple(state[name].shape)} in the model)"
        for name in stored
        if name in state and tuple(stored[name]) != tuple(state[name].shape)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}"
        for names, what in (
            (unknown, "weights that the model does not have"),
            (missing, "of the model's weights are missing"),
            (shapes, "shapes differ"),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder} does not fit the model it should continue ({'; '.join(problems)}), and what does not fit would "
            "be left out. Build the model as it was when the checkpoint was saved; a checkpoint written with "
            "save_original_format=True holds other names: load that one with from_pretrained and train anew from it."
        )
