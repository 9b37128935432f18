# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What trains and what does not: freezing by SAE layer, and training only the rows of the added tokens."""

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

from .text_stack_segcompass import decoder_layers


def freeze_for_training(
    model: nn.Module,
    train_token_rows: Literal["head", "none", "both"] | None = None,
    trainable: Literal["joint", "masks"] = "joint",
) -> nn.Module:
    """Leave trainable what the method trains, freeze everything else. Returns the model.

    Trainable: decoder layers with index >= `sae_layer`, codebook, slot encoder, slot mapper, SAM's mask prompt path
    and mask decoder, and the rows of the added tokens as `train_token_rows` says. The rest is frozen, SAM's parts
    that mask prompts never use included. The configuration's `score_calibration` goes: it was fitted to the model as
    it was before.

    Args:
        model (`SegCompassForReasoningSegmentation`): Changed in place.
        train_token_rows (`str`, *optional*): `"head"`, `"none"` or `"both"`; the configuration's when left out.
        trainable (`str`, defaults to `"joint"`): `"masks"` leaves trainable what turns slots into masks alone: the
            slot mapper and SAM's mask path.

    Raises:
        ValueError: An adapter is attached, or the decoder layers to train are quantised.
    """
    joint = trainable == "joint"
    _check_trainable(model, joint)
    model.requires_grad_(False)
    if joint:
        for layer in decoder_layers(model.vlm)[model.config.sae_layer :]:
            layer.requires_grad_(True)
        model.codebook.requires_grad_(True)
        model.slot_encoder.requires_grad_(True)
    model.slot_mapper.requires_grad_(True)
    model.sam.prompt_encoder.requires_grad_(True)
    model.sam.mask_decoder.requires_grad_(True)
    for _, parameter in model.mask_stage.unused_parameters():
        parameter.requires_grad_(False)
    config = model.config
    config.score_calibration = None
    ids = [i for i in (config.ref_token_id, config.think_start_token_id, config.think_end_token_id) if i is not None]
    train_rows(model, (train_token_rows or config.train_token_rows) if joint else "none", ids)
    return model


def _check_trainable(model: nn.Module, joint: bool) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError(
            "an adapter is attached, and PEFT has chosen what trains: its copies of the heads, not the originals that "
            "this would unfreeze; leave freeze_for_training out, or merge the adapter first."
        )
    layers = decoder_layers(model.vlm)[model.config.sae_layer :] if joint else nn.ModuleList()
    packed = [name for name, weight in layers.named_parameters() if not weight.dtype.is_floating_point]
    if packed:
        raise ValueError(
            f"{len(packed)} weights of the decoder layers that train are quantised and take no gradient; put an "
            "adapter on them (training.lora_config), or load the model in full precision."
        )


def train_rows(model: nn.Module, train_token_rows: str, ids: list[int]) -> None:
    """Let gradients reach only the embedding rows of given tokens.

    The weights themselves stay whole parameters, because TRL's fused head, vLLM and `save_pretrained` read them; a
    hook zeroes the gradient of every other row. Weight decay would shrink those too: `parameter_groups` exempts them.

    Args:
        model (`PreTrainedModel`): A VLM or `SegCompassForReasoningSegmentation`, whose embeddings are frozen.
        train_token_rows (`str`): `"head"`, `"none"` or `"both"`.
        ids (`list[int]`): The rows.
    """
    for handle in model.__dict__.pop("_token_row_handles", []):
        handle.remove()
    model.__dict__["_token_rows"] = (train_token_rows, ids)
    if train_token_rows == "none" or not ids:
        return
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [head.weight]
    if train_token_rows == "both" and embeddings.weight is not head.weight:
        weights.append(embeddings.weight)
    handles = []
    for weight in weights:
        weight.requires_grad_(True)
        handles.append(weight.register_hook(_KeepRows(ids)))
    if train_token_rows == "head" and embeddings.weight is head.weight:
        # Tied: the shared rows learn from the output side only, so that no gradient runs through the frozen layers.
        handles.append(embeddings.register_forward_hook(_detach_output))
    model.__dict__["_token_row_handles"] = handles


class TokenRowsMixin:
    """Keeps the rule of [`train_rows`], which lives in hooks of tensors, where copies take their place.

    Its heir is a `PreTrainedModel`.
    """

    get_output_embeddings: Callable[[], nn.Module]

    def __deepcopy__(self, memo: dict):
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if self._trains_rows():
            train_rows(twin, *self.__dict__["_token_rows"])
        return twin

    def resize_token_embeddings(self, *args, **kwargs):
        """See `PreTrainedModel.resize_token_embeddings`."""
        trains_rows = self._trains_rows()
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if trains_rows:
            train_rows(self, *self.__dict__["_token_rows"])
        return embeddings

    def _trains_rows(self) -> bool:
        return "_token_row_handles" in self.__dict__ and self.get_output_embeddings().weight.requires_grad


class _KeepRows:
    """Gradient hook: zero everywhere but in the given rows."""

    def __init__(self, rows: list[int]):
        self.rows = sorted(set(rows))

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[self.rows] = gradient[self.rows]
        return kept


def _detach_output(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.detach()


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, factors: Mapping[str, float] | None = None
) -> list[dict]:
    """Optimizer groups with a learning rate per part of the model, and no weight decay where it would do harm.

    Biases, norms and other vectors are not decayed, and neither are embedding weights of which only some rows train
    (in place, or as PEFT's `trainable_token_indices`).

    Args:
        model (`SegCompassForReasoningSegmentation`): Its trainable parameters are grouped.
        learning_rate (`float`): Of everything no factor names.
        weight_decay (`float`, defaults to 0.0): Of the parameters that decay.
        factors (`Mapping[str, float]`, *optional*): Prefix of parameter names (`"codebook"`, `"slot_mapper"`,
            `"sam.mask_decoder"`) -> factor on the learning rate; the longest prefix that fits wins.

    Returns:
        `list[dict]`: With `params`, `lr` and `weight_decay`, for any torch optimizer.
    """
    factors = dict(factors or {})
    names = {name for name, _ in model.named_parameters()}
    unknown = [prefix for prefix in factors if not any(name.startswith(prefix) for name in names)]
    if unknown:
        raise ValueError(f"no parameter starts with {unknown}; prefixes are the model's own, such as 'slot_mapper'.")
    row_weights = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in factors if name.startswith(p)), key=len, default=None)
        rate = learning_rate * (1.0 if prefix is None else factors[prefix])
        decays = parameter.ndim > 1 and id(parameter) not in row_weights and "trainable_tokens" not in name
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
