# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether the files of a checkpoint are whole, and whether its weights are those of the model, all and no others."""

import json
from pathlib import Path
from typing import Any

from torch import nn

_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that `git lfs pull` would replace
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def check_weight_files(source: Any, subfolder: str | None = "") -> None:
    """Look at the files of a local checkpoint before they are read.

    Args:
        source (`str` or `os.PathLike`): Its folder; ids of the Hub are not looked at.
        subfolder (`str`, *optional*): Within it.

    Raises:
        FileNotFoundError: The index names files that are not there.
        ValueError: A file of weights was never downloaded: git left a pointer to it.
    """
    folder = Path(str(source), subfolder or "")
    pointers = [file for kind in _WEIGHT_FILES for file in sorted(folder.glob(kind)) if _is_pointer(file)]
    if pointers:
        raise ValueError(
            f"{pointers[0]} is no file of weights but a pointer to one, as git leaves it without git-lfs; run `git "
            f"lfs install` and `git lfs pull` in {folder}, or download the checkpoint with huggingface_hub."
        )
    for index in folder.glob("*.safetensors.index*.json"):
        variant = index.name.removeprefix("model.safetensors.index").removesuffix("json")  # "." or ".fp16."
        if (folder / f"model{variant}safetensors").is_file():
            continue  # loading prefers the one file
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(shards)} weight files that {index.name} names: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy or download them again."
            )


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def check_nothing_missing(
    model: nn.Module,
    info: dict[str, Any],
    source: Any,
    remedy: str = "complete the checkpoint, or compose a new model with from_pretrained_parts",
) -> None:
    """Compare what the model has with what a checkpoint held.

    Args:
        model, info, source: As in [`check_nothing_left`].
        remedy (`str`, *optional*): What the message says can be done.

    Raises:
        ValueError: Weights are missing.
    """
    missing = without_aliases(model, info["missing_keys"])
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of this model ({_first(missing)}), which would be random; "
            f"{remedy}."
        )


def check_nothing_left(model: nn.Module, info: dict[str, Any], source: Any) -> None:
    """Compare what a checkpoint held with what the model has.

    Args:
        model (`PreTrainedModel`): As loaded.
        info (`dict`): From `from_pretrained(..., output_loading_info=True)`. What a model's class says may be missing
            or left over is not in it.
        source (`str` or `os.PathLike`): Named in errors.

    Raises:
        ValueError: There are weights that the model has no place for.
    """
    buffers = {name for name, _ in model.named_buffers()}  # some were saved once and are computed today
    surplus = sorted(set(info["unexpected_keys"]) - buffers)
    if surplus:
        raise ValueError(
            f"{source} holds {len(surplus)} weights ({_first(surplus)}) for which its configuration has no place, and "
            "without them answers would be others; give it the configuration that it was saved with."
        )


def check_no_layers_left(model: nn.Module, info: dict[str, Any], source: Any) -> None:
    """As [`check_nothing_left`], for somebody else's VLM or segmenter.

    It may bring heads and towers that are used elsewhere; layers beyond those that its configuration counts are
    refused.

    Raises:
        ValueError: There are such layers.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    prefixes = tuple(f"{name}." for name in lists)
    surplus = sorted(key for key in info["unexpected_keys"] if key.startswith(prefixes) and _is_beyond(model, key))
    if surplus:
        raise ValueError(
            f"{source} holds {len(surplus)} weights ({_first(surplus)}) of layers that its configuration does not "
            "count, and without them answers would be others; give it the config.json that it was saved with."
        )


def _is_beyond(model: nn.Module, key: str) -> bool:
    """Whether a weight belongs to an entry of a list of modules that the model does not have."""
    module = model
    for name in key.split("."):
        if isinstance(module, nn.ModuleList) and name.isdigit() and int(name) >= len(module):
            return True
        module = getattr(module, name, None)
    return False


def without_aliases(model: nn.Module, missing: set[str]) -> list[str]:
    """Missing names but for second names of weights that are there (PEFT's rows of tied embeddings have two)."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = {id(weight) for name, weight in weights.items() if name not in missing}
    return sorted(name for name in missing if id(weights.get(name)) not in found)


def _first(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
