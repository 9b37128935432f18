# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder that vLLM loads: the VLM inside a SegCompass model, under the names of its family's published files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from .fsdp import core_model

if TYPE_CHECKING:  # where vLLM is, TRL and accelerate need not be
    from accelerate import Accelerator

_ADAPTER_PARTS = ("lora_", "trainable_tokens_")  # parameters of peft that are merged into others or mean nothing alone
_WRAPPER_PARTS = ("base_layer", "token_adapter", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


@contextmanager
def _no_gather(parameters: list[nn.Parameter]) -> Iterator[None]:
    yield


@torch.no_grad()
def vllm_weights(
    model: nn.Module, gather: Any = _no_gather, device: torch.device | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The VLM's weights, whole, one at a time, under the names of the family's published files.

    SAM, the SAE and the heads are left out; tied weights come once; adapters are added to a copy of the weight.
    Gathering a sharded weight is a collective: every process must exhaust the iterator.

    Args:
        model ([`SegCompassForReasoningSegmentation`] or `PeftModel` of it): May be sharded by FSDP2 or ZeRO-3.
        gather (`Callable`): Context manager over parameters, `DistributedBackend.gather_params` of TRL.
        device (`torch.device`, *optional*): Where shards offloaded to the CPU are moved to be gathered.

    Yields:
        `tuple[str, torch.Tensor]`: Name and weight.

    Raises:
        ValueError: An adapter whose effect is no change of a weight (DoRA, biases), or a family whose files hold
            weights in another form.
    """
    vlm = core_model(model).vlm
    owners = dict(_weight_owners(vlm))
    names = file_names(vlm, {name: owner.shape for name, (owner, _) in owners.items()})
    for name, (parameter, wrapper) in owners.items():
        with gather([parameter] if wrapper is None else list(wrapper.parameters())):
            yield names[name], _merged(name, parameter, wrapper, partial(_whole, device=device))


def _weight_owners(vlm: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Module | None]]]:
    """Name without peft's and checkpointing's wrappers -> parameter and the peft layer around it, if any."""
    for name, parameter in vlm.named_parameters():  # tied weights once
        parts = name.split(".")
        if "original_module" in parts or any(part.startswith(_ADAPTER_PARTS) for part in parts):
            continue
        wrapper = None
        if "base_layer" in parts:
            wrapper = vlm.get_submodule(".".join(parts[: parts.index("base_layer")]))
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            if parts[at + 1] not in vlm.get_submodule(".".join(parts[:at])).active_adapters:
                continue
            del parts[at : at + 2]
        yield ".".join(part for part in parts if part not in _WRAPPER_PARTS), (parameter, wrapper)


def _merged(name: str, parameter: nn.Parameter, wrapper: nn.Module | None, whole: Callable) -> torch.Tensor:
    """The whole weight with what the active adapters add; 4-bit weights dequantised."""
    weight = whole(parameter.data)
    if type(parameter).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(parameter.data, parameter.quant_state)
    if wrapper is None or not name.endswith(".weight") or wrapper.merged or wrapper.disable_adapters:
        return weight
    if hasattr(wrapper, "trainable_tokens_delta"):
        for adapter in wrapper.active_adapters:
            rows = torch.tensor(wrapper.token_indices[adapter], device=weight.device)
            weight = weight.index_copy(0, rows, whole(wrapper.trainable_tokens_delta[adapter].data).to(weight))
        return weight
    for adapter in wrapper.active_adapters:
        if not hasattr(wrapper, "get_delta_weight") or getattr(wrapper, "use_dora", {}).get(adapter):
            raise ValueError(
                f"{name} carries an adapter that is no sum of weights ({type(wrapper).__name__}), which cannot be "
                "sent to vLLM; use plain LoRA, or use_vllm=False."
            )
        if getattr(wrapper, "lora_bias", {}).get(adapter):
            raise ValueError(f"{name} has a LoRA bias, which has no place in vLLM; set lora_bias=False.")
        if adapter in wrapper.scaling:
            weight = weight + whole(wrapper.get_delta_weight(adapter)).to(weight.dtype)
    return weight


def _whole(weight: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """All shards of an FSDP2 weight."""
    if not isinstance(weight, DTensor):
        return weight
    return (weight.to(device) if device is not None and weight.is_cpu else weight).full_tensor()


def file_names(vlm: PreTrainedModel, shapes: dict[str, torch.Size]) -> dict[str, str]:
    """Names of parameters in memory -> names in the family's published files, which every version of vLLM loads.

    Args:
        vlm (`PreTrainedModel`): The VLM.
        shapes (`dict[str, torch.Size]`): Its parameters.

    Raises:
        ValueError: The files hold some weights split or joined, so that names alone do not tell.
    """
    blanks = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    own = vlm.__dict__.get("_weight_conversions")
    # What `from_pretrained` left there follows the file it read, which may be in transformers' own new form.
    vlm._weight_conversions = get_model_conversion_mapping(vlm, add_legacy=False)
    try:
        filed = revert_weight_conversion(vlm, blanks)
    finally:
        vlm._weight_conversions = own
    found = {id(blank): name for name, blank in filed.items()}
    changed = [name for name, blank in blanks.items() if id(blank) not in found]
    if changed:
        raise ValueError(
            f"{type(vlm).__name__} stores {len(changed)} weights in another form than it runs them "
            f"({changed[0]}, ...), so they cannot be sent to vLLM one by one; use use_vllm=False with this family."
        )
    return {name: found[id(blank)] for name, blank in blanks.items()}


def export_for_vllm(
    model: nn.Module, processor: Any, folder: str | Path, accelerator: Accelerator | None = None
) -> Path:
    """Write the folder that vLLM loads: the VLM inside a SegCompass model as its family publishes it.

    Weights under the files' names (embeddings resized, adapters merged, 4-bit dequantised), configuration, generation
    configuration with every id that ends an answer, tokenizer with the added tokens, chat template and processor.

    Args:
        model ([`SegCompassForReasoningSegmentation`] or `PeftModel` of it): The model.
        processor ([`SegCompassProcessor`]): Its processor.
        folder (`str` or `Path`): Made where missing.
        accelerator (`Accelerator`, *optional*): With several processes: all must call, the main one writes.

    Returns:
        `Path`: The folder.
    """
    folder, vlm = Path(folder), core_model(model).vlm
    gather, device = _no_gather, None
    if accelerator is not None:
        from trl.distributed import DistributedBackend

        gather, device = DistributedBackend(accelerator).gather_params, accelerator.device
    writes = accelerator is None or accelerator.is_main_process
    weights = {}
    for name, weight in vllm_weights(model, gather, device):
        if writes:
            weights[name] = weight.to("cpu", copy=True)
    if not writes:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    save_torch_state_dict(weights, folder)
    config = copy.deepcopy(vlm.config)
    config.architectures = [type(vlm).__name__]
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.save_pretrained(folder)
    generation_config = copy.deepcopy(vlm.generation_config)
    ends = generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    generation_config.eos_token_id = list(dict.fromkeys([*ends, processor.end_of_turn_token_id]))
    generation_config.save_pretrained(folder)
    _save_processor(processor, folder)
    return folder


def _save_processor(processor: Any, folder: Path) -> None:
    """The family's processor in the classic files, from which `AutoProcessor` builds a video processor, too."""
    processor.tokenizer.save_pretrained(folder)
    image_processor = processor.image_processor
    image_processor.save_pretrained(folder)  # preprocessor_config.json
    fields = {"processor_class": processor.vlm_processor_class, **processor.vlm_processor_kwargs}
    (folder / "processor_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


__all__ = ["export_for_vllm", "file_names", "vllm_weights"]
