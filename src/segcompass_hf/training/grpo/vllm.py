# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM writes the completions of GRPO: the VLM inside a SegCompass model, under the names vLLM loads it by.

Never run with vLLM itself: names, shapes, files and the exchange with TRL are tested against freshly loaded VLMs and a
stand-in engine with vLLM's interface (`tests/training/grpo/test_vllm.py`). See `docs/how-to/many-gpus.md`.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer as trl_grpo_trainer

from ..fsdp import core_model

_ADAPTER_PARTS = ("lora_", "trainable_tokens_")  # parameters of peft that are merged into others or mean nothing alone
_WRAPPER_PARTS = ("base_layer", "token_adapter", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
_NEVER = -100.0  # vLLM clamps its logit bias here; a probability of e^-100


class SegCompassVLLMGeneration(VLLMGeneration):
    """TRL's `VLLMGeneration` for the VLM inside a SegCompass model.

    Differences to the parent:

    - vLLM loads `folder`, which [`export_for_vllm`] writes, not `model.name_or_path`.
    - Weights are sent under the names of the family's published files, and only those of the VLM. Adapters are added
      to a copy: merging them in place and back, as the parent does, would wear out bf16 and 4-bit base weights.
      4-bit weights are sent dequantised, so vLLM runs unquantised.
    - In colocate mode vLLM gets one placeholder per image, which it expands itself; the parent passes the expanded
      prompt, and vLLM would expand that a second time (TRL issue 6294).
    - Image and video placeholders are never written.

    Args:
        model ([`SegCompassForReasoningSegmentation`] or `PeftModel` of it): The model that trains.
        folder (`str` or `Path`): Where vLLM finds the VLM. In colocate mode written here by the main process.
        kwargs: See `trl.generation.vllm_generation.VLLMGeneration`.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: Any,
        *,
        folder: str | Path,
        generation_kwargs: dict | None = None,
        **kwargs: Any,
    ):
        if getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
            raise ValueError("vLLM rollouts read FSDP2 parameters, got FSDP1; set fsdp_version: 2 in the config.")
        self.folder = Path(folder)
        bias = {token_id: _NEVER for token_id in core_model(model).vision_token_ids}
        generation_kwargs = dict(generation_kwargs or {})
        generation_kwargs["logit_bias"] = {**bias, **(generation_kwargs.get("logit_bias") or {})}
        super().__init__(model, accelerator, processing_class, generation_kwargs=generation_kwargs, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode == "colocate":
            export_for_vllm(self.model, self.processing_class, self.folder, accelerator=self.accelerator)
            self.accelerator.wait_for_everyone()
        model = self.model
        # All that the parent reads of the model here: where vLLM finds it and whether it holds 4-bit layers.
        self.model = SimpleNamespace(name_or_path=str(self.folder), named_modules=lambda: iter(()))
        try:
            super()._init_vllm()
        finally:
            self.model = model

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        return vllm_weights(self.model, gather=self._dist.gather_params, device=self.accelerator.device)

    def generate(
        self, prompts: list[list[int]], images: list | None, num_generations: int, profiler: Any = None
    ) -> tuple:
        """As the parent's; the prompt ids returned are those given."""
        sent = prompts
        if self.mode == "colocate" and images is not None:  # server mode pairs expanded prompts with features itself
            sent = [
                ids if not of_prompt else unexpand_image_tokens(ids, self.processing_class, len(of_prompt))
                for ids, of_prompt in zip(prompts, images, strict=True)
            ]
        _, completion_ids, logprobs, logprob_ids = super().generate(sent, images, num_generations, profiler)
        return prompts, completion_ids, logprobs, logprob_ids


@contextmanager
def vllm_rollouts(folder: str | Path) -> Iterator[None]:
    """While this is open, `GRPOTrainer.__init__` builds [`SegCompassVLLMGeneration`] as its vLLM backend.

    TRL has no argument for the class it builds; nothing changes where `use_vllm` is off.

    Args:
        folder (`str` or `Path`): Where vLLM finds the VLM; in colocate mode it is written there.

    Example:

    ```python
    with vllm_rollouts(Path(args.output_dir) / "vllm"):
        super().__init__(model, ...)
    ```
    """
    parent = trl_grpo_trainer.VLLMGeneration
    trl_grpo_trainer.VLLMGeneration = partial(SegCompassVLLMGeneration, folder=folder)
    try:
        yield
    finally:
        trl_grpo_trainer.VLLMGeneration = parent


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


def unexpand_image_tokens(prompt_ids: list[int], processor: Any, num_images: int = 1) -> list[int]:
    """A prompt with one placeholder per image, as vLLM wants it, from one with a token per image patch.

    Args:
        prompt_ids (`list[int]`): As the processor makes them.
        processor ([`SegCompassProcessor`]): Knows the family's placeholders.
        num_images (`int`, defaults to 1): Images of the prompt.

    Raises:
        ValueError: The prompt has another number of placeholders than images, or its text does not encode back.
    """
    full = getattr(processor.vlm_processor, "full_image_sequence", None)
    if full is not None:
        # Gemma 3 surrounds its image by line breaks that merge with those of the text: go by the text.
        tokenizer = processor.tokenizer
        text = tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != list(prompt_ids):
            raise ValueError("the prompt's text does not encode back to its ids, so its images cannot be found.")
        found = text.count(full)
        short = tokenizer(text.replace(full, processor.image_token), add_special_tokens=False)["input_ids"]
    else:
        image = processor.image_token_id
        if image != processor.tokenizer.convert_tokens_to_ids(processor.image_token):
            raise ValueError(
                f"{processor.vlm_processor_class} writes other tokens for an image ({image}) than vLLM takes in its "
                f"prompt ({processor.image_token!r}); use use_vllm=False with this family."
            )
        starts = [i == image and (k == 0 or prompt_ids[k - 1] != image) for k, i in enumerate(prompt_ids)]
        found = sum(starts)
        short = [i for i, start in zip(prompt_ids, starts, strict=True) if i != image or start]
    if found != num_images:
        raise ValueError(f"the prompt has {found} runs of image tokens, but {num_images} images go with it.")
    return short


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
    from trl.distributed import DistributedBackend

    folder, vlm = Path(folder), core_model(model).vlm
    gather = _no_gather if accelerator is None else DistributedBackend(accelerator).gather_params
    device = None if accelerator is None else accelerator.device
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
