# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Parameter names of a VLM: those in its published files <-> those of the module.

transformers keeps both and renames while it loads; here its rules are applied to names alone, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from .files import shorten


def read_vlm_config(folder: Path) -> PretrainedConfig:
    """The configuration of a Hugging Face folder, which must be that of a VLM.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: It is not of an image-text-to-text model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; pass the Hugging Face folder of the language model.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{folder}/config.json describes no model: {error.__cause__ or error}") from error
    check_is_vlm(config, folder)
    config._name_or_path = ""  # a path of this machine
    return config


def check_is_vlm(config: PretrainedConfig, name: object) -> None:
    """Raise where a configuration is not that of a model that reads images and writes text."""
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, which does not read images and write text; name a VLM, such as "
            "LLaVA-1.5 or Qwen2.5-VL."
        )


def empty_vlm(config: PretrainedConfig) -> PreTrainedModel:
    """The VLM without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def module_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Names in the files -> names in the module.

    Args:
        model (`PreTrainedModel`): The VLM; may be empty.
        stored (`Iterable[str]`): Names of the weights in its files.

    Returns:
        `dict[str, str]`: Names that the module does not have are mapped too, for the caller to judge. What old
        versions stored and the module computes (rotary frequencies, position ids) is left out.

    Raises:
        ValueError: The family's weights change more than their names.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    computed = {name for name, _ in model.named_buffers()} - state.keys()
    names, changed = {}, []
    for name in stored:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            changed.append(name)
        elif renamed not in computed and not renamed.endswith("rotary_emb.inv_freq"):
            names[name] = renamed
    if changed:
        raise ValueError(
            f"the weights of a {model.config.model_type!r} model change more than their names when loaded "
            f"({shorten(changed)}); load it and use from_pretrained_parts instead."
        )
    if len(set(names.values())) < len(names):
        twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
        raise ValueError(f"several stored weights have the same place in the model: {shorten(twice)}.")
    return names


def stored_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names in the module -> those under which the family is published, the inverse of [`module_names`].

    Args:
        model (`PreTrainedModel`): The VLM; may be empty.
        names (`Iterable[str]`): Names of weights of the module.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    # A prefix that loading removes is one that published files have; one that it adds need not be there.
    model._weight_conversions = [
        rule for rule in rules if not (isinstance(rule, PrefixChange) and rule.prefix_to_remove is None)
    ]
    marked = {name: torch.empty(0, device="meta") for name in names}
    reverted = revert_weight_conversion(model, marked)
    found = {id(tensor): name for name, tensor in reverted.items()}
    stored = {name: found.get(id(tensor), name) for name, tensor in marked.items()}
    back = module_names(model, stored.values())
    if any(back.get(published) != name for name, published in stored.items()):
        wrong = [name for name, published in stored.items() if back.get(published) != name]
        raise ValueError(
            f"the published names of a {model.config.model_type!r} model cannot be told for {shorten(wrong)}."
        )
    return stored


__all__ = ["check_is_vlm", "empty_vlm", "module_names", "read_vlm_config", "stored_names"]
