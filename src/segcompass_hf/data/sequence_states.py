# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Hidden states of whole sequences: from the VLM of this process, or from whatever else answers as it would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn

from ..reading_segcompass import SequenceStates
from ..text_stack_segcompass import HiddenStateCapture, decoder_layers, final_norm
from ..vlm_inputs_segcompass import sequence_inputs


class StateSource(Protocol):
    """Where the hidden states of whole sequences come from: [`TransformersStates`], or [`VllmStates`].

    Attributes:
        origin (`str`, *optional*): What computed the states; `None` where it is the VLM of this process. An activation
            cache names it, since the last bits of states differ between engines.
    """

    origin: str | None

    def states_of_layers(
        self, layers: Sequence[int], inputs: Mapping[str, torch.Tensor], images: Sequence[list]
    ) -> list[torch.Tensor]:
        """States of sequences at layers, in the order asked for.

        Args:
            layers (`Sequence[int]`): Numbers of decoder layers passed; 0 = embeddings. The last is before the final
                norm.
            inputs (`Mapping`): The VLM's inputs, as the processor makes them: `input_ids`, `attention_mask`
                `(rows, length)` and the rest.
            images (`Sequence[list[PIL.Image.Image]]`): Of every row, in the order of its placeholders.

        Returns:
            `list[torch.Tensor]`: of each layer `(rows, length, hidden_size)`; what stands on padding means nothing.
        """


class TransformersStates:
    """A [`StateSource`] that runs the VLM of this process; what lies above the highest layer is not computed.

    Args:
        vlm (`nn.Module`): An `AutoModelForImageTextToText` model; used without gradient.
    """

    origin = None

    def __init__(self, vlm: nn.Module):
        self.vlm = vlm

    def states_of_layers(
        self, layers: Sequence[int], inputs: Mapping[str, torch.Tensor], images: Sequence[list] = ()
    ) -> list[torch.Tensor]:
        """As [`StateSource`] says; `images` are not read, since the inputs hold their pixels."""
        return states_of_layers(self.vlm, layers, inputs)


@torch.no_grad()
def states_of_layers(vlm: nn.Module, layers: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """States at several layers out of one pass, each `(rows, length, hidden_size)`, in the order asked for."""
    with ExitStack() as stack:
        captures = {
            layer: stack.enter_context(HiddenStateCapture(vlm, layer, stop=layer == max(layers)))
            for layer in sorted(set(layers))
        }
        vlm(**sequence_inputs(vlm, inputs))
    if all(capture.layer_states for capture in captures.values()):
        return [captures[layer].layer_states[0] for layer in layers]
    raise RuntimeError(f"the VLM's pass ended without reaching layer {max(layers)}; it has fewer layers.")


@torch.no_grad()
def states_for_masks(
    source: StateSource,
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    images: Sequence[list],
    completion_mask: torch.Tensor,
    image_token_grids: torch.Tensor | None = None,
) -> SequenceStates:
    """What masks are read from, of sequences that are written already.

    Args:
        source ([`StateSource`]): Of the weights that `model.vlm` has now.
        model ([`SegCompassForReasoningSegmentation`]): Names the layer, and has the final norm.
        inputs, images: See [`~StateSource.states_of_layers`].
        completion_mask (`torch.Tensor` of shape `(rows, length)`): 1 on the completion.
        image_token_grids (`torch.LongTensor` of shape `(rows, 6)`, *optional*): See [`SequenceStates`].

    Raises:
        ValueError: Concepts are read from a second pass over the sequence (`concept_input="duplicated"`).
    """
    if model.config.concept_input == "duplicated":
        raise ValueError(
            'concept_input="duplicated" reads concepts from a second pass of the VLM over the sequence, which no '
            "state source gives; call the model itself."
        )
    layers = [model.config.sae_layer, len(decoder_layers(model.vlm))]
    layer_states, highest = source.states_of_layers(layers, inputs, images)
    last_states = final_norm(model.vlm)(highest)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return SequenceStates(layer_states, last_states, ids, mask, completion_mask, image_token_grids=image_token_grids)


__all__ = ["StateSource", "TransformersStates", "states_for_masks", "states_of_layers"]
