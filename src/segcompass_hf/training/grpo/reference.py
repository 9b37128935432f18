# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The reference policy of the KL term, run from layer L on: the layers below are frozen and shared with the policy."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from ...text_stack_segcompass import decoder_layers, final_norm, text_config

CACHES = ("cache", "past_key_values", "past_key_value")  # what decoder layers call it


class LayerTrace:
    """Context that records how a pass calls the decoder layers from `first` on, to repeat it with other weights.

    Masks, positions and rotary embeddings do not depend on the weights that train, so that whoever has the input of
    layer `first` can run the layers above again: `layer_i(x_i, **recorded_i)`. What the text model adds to the states
    between two layers (Qwen3-VL's visual features) does not depend on them either and is recorded as a difference.

    Args:
        vlm (`nn.Module`): The VLM.
        first (`int`): Index of the first layer to record.
    """

    def __init__(self, vlm: nn.Module, first: int):
        self.layers, self.width = list(decoder_layers(vlm))[first:], text_config(vlm).hidden_size
        self.calls: list[tuple[tuple, dict]] = []
        self.added: list[torch.Tensor | None] = []
        self.first_input: torch.Tensor | None = None
        self._last_output: torch.Tensor | None = None
        self._handles: list = []

    def __enter__(self):
        for layer in self.layers:
            self._handles.append(layer.register_forward_pre_hook(self._read_call, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._read_output))
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()
        self._handles, self._last_output = [], None

    def _read_call(self, module, args, kwargs):
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        if self.first_input is None:
            self._check_one_stream(states)
            self.first_input = states.detach()
            self.added.append(None)
        else:
            same = states is self._last_output
            self.added.append(None if same else (states - self._last_output).detach())
        for name in set(CACHES) & set(kwargs):
            kwargs[name] = None
        self.calls.append((args[1:], kwargs))

    def _check_one_stream(self, states: torch.Tensor) -> None:
        if states.ndim != 3 or states.shape[-1] != self.width:
            raise ValueError(
                f"the decoder layers pass on several streams per token, {tuple(states.shape)}, which the text model "
                "brings together in its own way behind them; no reference policy can be run for it: train with beta=0."
            )

    def _read_output(self, module, args, output):
        self._last_output = output if isinstance(output, torch.Tensor) else output[0]

    def replay(self, layers: nn.ModuleList, norm: nn.Module, cache: Any = None) -> torch.Tensor:
        """Last hidden states `(batch, tokens, hidden)` that `layers` and `norm` make of the recorded input.

        `cache` takes the place of the one that the recorded pass had.
        """
        states = self.first_input
        for layer, (args, kwargs), added in zip(layers, self.calls, self.added, strict=True):
            kwargs = kwargs | dict.fromkeys(set(CACHES) & set(kwargs), cache)
            output = layer(states if added is None else states + added, *args, **kwargs)
            states = output if isinstance(output, torch.Tensor) else output[0]
        return norm(states)


class FusedHead:
    """TRL's fused LM head on hidden states that are there already: log-probabilities without the full logits.

    Args:
        model (`PreTrainedModel`): Whose configuration (soft-capping, scaling) counts.
        lm_head (`Callable`): Returns the output embedding, looked up on each call.
        outputs (`tuple[str, ...]`): As in [`trl.trainer.utils.add_fused_lm_head`].
    """

    def __init__(self, model: nn.Module, lm_head: Any, temperature: float, cast_to_fp32: bool, outputs: tuple):
        self.config, self.lm_head = model.config, lm_head
        add_fused_lm_head(self, temperature=temperature, cast_lm_head_to_fp32=cast_to_fp32, outputs=outputs)

    def forward(self):
        """Replaced by the fused forward."""

    def base_model(self, hidden_states: torch.Tensor, **kwargs) -> Any:
        return SimpleNamespace(last_hidden_state=hidden_states)

    def get_output_embeddings(self) -> Any:
        """The head with its effective weight: PEFT keeps trained rows beside it."""
        head = self.lm_head()
        adapter = getattr(head, "token_adapter", None)
        if adapter is None:
            return head
        if adapter.disable_adapters:
            return adapter.base_layer
        return SimpleNamespace(weight=adapter.get_merged_weights(adapter.active_adapters), bias=None)

    def __call__(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> Any:
        """States `(batch, tokens, hidden)` and labels `(batch, tokens)` -> fields `(batch, tokens - 1)`."""
        return self.forward(hidden_states=hidden_states, labels=labels, fused_lm_head=True)


class ReferencePolicy(nn.Module):
    """The policy as it was when training began, from layer L on. Frozen tensors are shared with it, not copied.

    Args:
        model (`SegCompassForReasoningSegmentation`): Frozen already as it will train.
        temperature (`float`): Of the sampling.
        cast_to_fp32 (`bool`): Whether the head projects in float32.
    """

    def __init__(self, model: nn.Module, temperature: float, cast_to_fp32: bool = False):
        super().__init__()
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise ValueError(
                "the model has weights without values on this process (meta device), so no reference policy can be "
                "copied from it; set fsdp_cpu_ram_efficient_loading to false, or train without KL (beta=0)."
            )
        # Frozen tensors are entered as their own copies.
        memo = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.layers = _frozen_copy(nn.ModuleList(_upper_layers(model)), memo)
        self.norm = _frozen_copy(final_norm(model.vlm), memo)
        head = model.get_output_embeddings()
        # A head in training is copied whole although only a few of its rows train.
        self.lm_head = _frozen_copy(head, memo) if head.weight.requires_grad else None
        self._fused = FusedHead(
            model, lambda: self.lm_head or model.get_output_embeddings(), temperature, cast_to_fp32, ("log_probs",)
        )

    @torch.no_grad()
    def forward(self, trace: LayerTrace, labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(batch, n)` of the last `n = labels.shape[1] - 1` tokens of the pass that was traced."""
        states = trace.replay(self.layers, self.norm)
        return self._fused(states[:, -labels.shape[1] :], labels).log_probs


class AdapterFreeReference:
    """The reference policy of a PEFT model: the model itself without its adapter, or with the one called `"ref"`.

    Args:
        peft_model (`PeftModel`): Around a SegCompass model.
        temperature, cast_to_fp32: As in [`ReferencePolicy`].
        checkpointing_kwargs (`dict`, *optional*): Of the gradient checkpointing that is switched back on after a pass.
    """

    def __init__(
        self,
        peft_model: nn.Module,
        temperature: float,
        cast_to_fp32: bool = False,
        checkpointing_kwargs: dict | None = None,
    ):
        self.peft_model, self.checkpointing_kwargs = peft_model, checkpointing_kwargs
        model = peft_model.get_base_model()
        self._fused = FusedHead(model, model.get_output_embeddings, temperature, cast_to_fp32, ("log_probs",))

    @torch.no_grad()
    def __call__(self, trace: LayerTrace, labels: torch.Tensor) -> torch.Tensor:
        """As [`ReferencePolicy.forward`]."""
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        model = self.peft_model.get_base_model()
        checkpointing = getattr(model, "is_gradient_checkpointing", False)
        plain = disable_gradient_checkpointing(model, self.checkpointing_kwargs) if checkpointing else nullcontext()
        layers, adapter = _upper_layers(model), "ref" if "ref" in self.peft_model.peft_config else None
        with plain, use_adapter(self.peft_model, adapter), without_dropout(layers):
            states = trace.replay(layers, final_norm(model.vlm))
            return self._fused(states[:, -labels.shape[1] :], labels).log_probs


@contextmanager
def without_dropout(layers: list[nn.Module]):
    """A reference is one policy, not a random one; the rest of the layers stays in the mode it is in."""
    active = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


@torch.no_grad()
def copy_token_rows_to_reference(peft_model: nn.Module) -> None:
    """Give the adapter `"ref"` the trained token rows of `"default"`, which TRL leaves out of its copy.

    TRL looks for `.default.` inside of names; those of `trainable_token_indices` end in `.default`.

    Args:
        peft_model (`PeftModel`): Changed in place; without an adapter `"ref"` nothing happens.
    """
    parameters = dict(peft_model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(".default"):
            reference = parameters.get(f"{name.removesuffix('default')}ref")
            if reference is not None:
                reference.copy_(parameter)


def _upper_layers(model: nn.Module) -> list[nn.Module]:
    return list(decoder_layers(model.vlm))[model.config.sae_layer :]


def _frozen_copy(module: nn.Module, memo: dict) -> nn.Module:
    return copy.deepcopy(module, dict(memo)).requires_grad_(False).eval()
