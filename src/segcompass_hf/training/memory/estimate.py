# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How much memory a GPU needs for a stage of training, from the configuration alone.

Weights, gradients and optimizer states are counted parameter by parameter on a model without values. Activations are
counted by running one training step of it on fake tensors (shapes without data), so that every backbone is counted by
its own code. Nothing is downloaded and no GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ...configuration_segcompass import SegCompassConfig
from ...text_stack_segcompass import decoder_layers
from .model import cast_weights, fake_model
from .setup import TrainingSetup
from .step import sae_bytes, sampling_bytes, training_bytes

GIB = 2**30
CUDA_CONTEXT = 0.75 * GIB  # assumed, not computed: CUDA, cuBLAS and their workspaces
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, one byte per block of 64, 4 more per 256 blocks
EIGHT_BIT_STATE = 1 + 4 / 256  # per element: a byte, and a float32 scale per block of 256
SMALL_TENSOR = 4096  # bitsandbytes keeps the states of smaller tensors in float32


@dataclass
class MemoryEstimate:
    """Bytes per GPU. Not all of it is needed at once: see `training`, `sampling` and `peak`.

    Args:
        weights (`float`): Of the whole model.
        optimizer (`float`): Its states.
        reference (`float`): Copies of the trainable layers that the KL term needs; frozen ones are shared.
        gradients (`float`): Of all that trains; DDP's buckets double them.
        gathered (`float`): Weights (and gradients in work) that sharded training brings together for a while.
        activations (`float`): What the forward pass keeps for the backward pass, bfloat16 copies of weights included;
            for the SAE on a CPU the buffer of activations too.
        working (`float`): What is needed beyond that at the fullest moment of a step, log-probabilities included.
        cache (`float`): Keys and values while sampling, and the states captured on the way.
        prefill (`float`): The pass over the prompts while sampling, or SAM's image encoder, whichever needs more.
        context (`float`): CUDA itself (assumed).
        parameters, trainable (`int`): Numbers of parameters, of the whole model.
    """

    weights: float
    optimizer: float
    reference: float
    gradients: float
    gathered: float
    activations: float
    working: float
    cache: float
    prefill: float
    context: float
    parameters: int
    trainable: int

    @property
    def held(self) -> float:
        """What is there all the time."""
        return self.weights + self.optimizer + self.reference + self.context

    @property
    def training(self) -> float:
        """The fullest moment of an optimizer step."""
        return self.held + self.gradients + self.gathered + self.activations + self.working

    @property
    def sampling(self) -> float:
        """The fullest moment of sampling; 0 where a stage does not sample."""
        return self.held + self.gathered + self.cache + self.prefill if self.cache else 0.0

    @property
    def peak(self) -> float:
        return max(self.training, self.sampling)

    def table(self) -> str:
        """The parts in GiB, readable."""
        lines = [f"{self.parameters / 1e9:.2f} G parameters, {self.trainable / 1e9:.3f} G of them train", ""]
        counts = ("parameters", "trainable")
        rows = [(part.name, getattr(self, part.name)) for part in fields(self) if part.name not in counts]
        rows += [(f"= {name}", getattr(self, name)) for name in ("training", "sampling", "peak")]
        return "\n".join(lines + [f"{name:<14}{size / GIB:>9.2f} GiB" for name, size in rows])


def readable_memory(size: float) -> str:
    """Bytes as `1.2 GiB` or `213 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def estimate_memory(
    config: SegCompassConfig, setup: TrainingSetup | None = None, peft_config: Any | None = None
) -> MemoryEstimate:
    """Estimate the memory that a stage of training needs on each GPU.

    Args:
        config ([`SegCompassConfig`]): Of the model, see `memory_shapes.composite_config`.
        setup ([`TrainingSetup`], *optional*): Everything else.
        peft_config (`peft.PeftConfig`, *optional*): As given to the trainer.

    Returns:
        [`MemoryEstimate`], in bytes.

    Raises:
        ValueError: GRPO with KL under ZeRO-3 without adapters, which the trainer refuses too.
    """
    setup = setup or TrainingSetup()
    if setup.stage == "grpo" and setup.reference and setup.sharding == "zero3" and peft_config is None:
        raise ValueError(
            "the trainer makes no reference policy under ZeRO-3; use sharding='fsdp', adapters, or no KL "
            "(reference=False)."
        )
    with fake_model(config, peft_config, setup.stage, setup.trainable) as model:
        parts = parameter_bytes(model, setup)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        parts["gathered"] = _gathered(model, setup)
        cast_weights(model, setup)
        count = sae_bytes if setup.stage == "sae" else training_bytes
        parts["activations"], parts["working"] = count(model, setup)
        parts["working"] += _dequantized(model, setup)
        parts["cache"], parts["prefill"] = sampling_bytes(model, setup) if setup.stage == "grpo" else (0.0, 0.0)
    parts["context"] = CUDA_CONTEXT if setup.gpus else 0.0
    return MemoryEstimate(**parts, parameters=parameters, trainable=trainable)


def parameter_bytes(model: nn.Module, setup: TrainingSetup) -> dict[str, float]:
    """Bytes per GPU of `weights`, `gradients`, `optimizer` and `reference`, counted parameter by parameter."""
    quantized = _quantized(model, setup)
    # An adapter is switched off for the reference policy; without one, what trains of the VLM is copied.
    copied = setup.stage == "grpo" and setup.reference and not hasattr(model, "peft_config")
    weights = sum(buffer.nbytes for buffer in model.buffers())
    gradients = optimizer = reference = 0.0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if not parameter.requires_grad:
            weights += size * (NF4_BYTES if name in quantized else setup.dtype.itemsize)
            continue
        weights += size * setup.trainable_dtype.itemsize
        gradients += size * setup.trainable_dtype.itemsize
        optimizer += _state_bytes(size, setup)
        reference += size * setup.trainable_dtype.itemsize if copied and name.startswith("vlm.") else 0
    if setup.sharding == "zero3" and setup.autocast:  # DeepSpeed computes in bfloat16 weights of its own
        weights += 2 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if setup.sharding == "none" and setup.gpus > 1:
        gradients *= 2  # DDP's buckets
    shards = 1 if setup.sharding == "none" else setup.gpus
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "reference": reference}
    return {name: size / shards for name, size in parts.items()}


def _state_bytes(size: int, setup: TrainingSetup) -> float:
    """Bytes of the two moments of AdamW for a weight of `size` elements."""
    if setup.optim in ("adamw_torch", "adamw_torch_fused"):
        return 2 * size * setup.trainable_dtype.itemsize
    return 2 * size * (4 if size < SMALL_TENSOR else EIGHT_BIT_STATE)


def _quantized(model: nn.Module, setup: TrainingSetup) -> set[str]:
    """Names of the weights in NF4: the decoder's linear layers, what adapters add to them left out."""
    if not setup.load_in_4bit:
        return set()
    layers = decoder_layers(model.vlm)
    weights = {id(module.weight) for module in layers.modules() if isinstance(module, nn.Linear)}
    return {name for name, weight in model.named_parameters() if id(weight) in weights and "lora_" not in name}


def _gathered(model: nn.Module, setup: TrainingSetup) -> float:
    """Weights that sharded training brings together: two units, and all that is in no unit; and their gradients."""
    if setup.sharding == "none":
        return 0.0
    names, units = set(model._no_split_modules or ()), []
    taken: set[int] = set()
    for module in reversed(list(model.modules())):  # children before parents
        if type(module).__name__ in names:
            own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
            taken.update(map(id, own))
            units.append(sum(parameter.numel() for parameter in own))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    weights = 2 * max(units) + sum(parameter.numel() for parameter in rest)
    gradients = max(units) + sum(parameter.numel() for parameter in rest if parameter.requires_grad)
    return (2 if setup.autocast else 4) * (weights + gradients)


def _dequantized(model: nn.Module, setup: TrainingSetup) -> float:
    """The largest weight in NF4, as it is written out in bfloat16 for a product."""
    quantized = _quantized(model, setup)
    sizes = [parameter.numel() for name, parameter in model.named_parameters() if name in quantized]
    return 2.0 * max(sizes, default=0)
