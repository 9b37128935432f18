# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The text decoder inside a VLM: where its layers are, and hidden states captured from passes through them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_rows_of_pass: ContextVar[tuple[torch.Tensor, int] | None] = ContextVar("rows_of_pass", default=None)


@contextmanager
def rows_of_pass(rows: torch.Tensor, number: int) -> Iterator[None]:
    """While a pass runs: it is of these `rows` of a batch of `number`; whoever captures states gives 0 to the rest."""
    token = _rows_of_pass.set((rows, number))
    try:
        yield
    finally:
        _rows_of_pass.reset(token)


def to_all_rows(values: torch.Tensor, rows: torch.Tensor, number: int) -> torch.Tensor:
    """Values `(len(rows), ...)` at their places among `number` rows, 0 elsewhere."""
    return values.new_zeros(number, *values.shape[1:]).index_copy(0, rows.to(values.device), values)


def _captured(states: torch.Tensor) -> torch.Tensor:
    """States of a pass, with a row for each of the batch."""
    part = _rows_of_pass.get()
    return states if part is None else to_all_rows(states, *part)


class _LayerReached(Exception):
    """Ends a pass through the VLM; not an error."""


class HiddenStateCapture:
    """Context that collects what SegCompass needs from every pass through a VLM's text decoder.

    Per pass: the output of `layer` decoder layers (`hidden_states[layer]`, before the final norm) and the last hidden
    state (after it). During `generate` the passes are the prompt and then one token each, so that joined along the
    tokens they are the states of the sequence without a second pass. Of layers that keep several streams per token the
    state is their mean, see [`ParallelStreams`].

    Args:
        model (`nn.Module`): The VLM, with or without its head.
        layer (`int`): Index into `hidden_states`; 0 reads the embeddings.
        edit (`Callable`, *optional*): Called with the states of one pass, `(batch, tokens, hidden)`, and the number of
            tokens passed before; returns the states to go on with. What is captured is what it returns.
        stop (`bool`, defaults to `False`): End the pass and the context once the layer's states are there: what lies
            above is not computed, and `last_states` stay empty.
        prompt_length (`int`, *optional*): Tokens of the first pass at most. Some VLMs put states of the picture in
            front of the text, without tokens for them (GIT): states would be taken for those of other tokens.

    Raises:
        ValueError: The first pass has more states than `prompt_length`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        edit: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        stop: bool = False,
        prompt_length: int | None = None,
    ):
        self.model, self.layer, self.edit, self.stop, self.prompt_length = model, layer, edit, stop, prompt_length
        self.layer_states: list[torch.Tensor] = []
        self.last_states: list[torch.Tensor] = []
        self._shape = (0, 0)  # (batch, tokens) of the pass that is running
        self._handles: list = []

    def __enter__(self):
        stack, layers = text_stack(self.model)
        self._width = text_config(self.model).hidden_size
        self._handles.append(stack.register_forward_pre_hook(self._read_shape, with_kwargs=True))
        if self.layer == 0:
            self._handles.append(layers[0].register_forward_pre_hook(self._read_input, with_kwargs=True))
        else:
            self._handles.append(layers[self.layer - 1].register_forward_hook(self._read_output))
        self._handles.append(stack.register_forward_hook(self._read_last))
        return self

    def __exit__(self, kind, *exception) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return kind is _LayerReached

    @property
    def num_tokens(self) -> int:
        """Tokens whose states are collected so far."""
        return sum(states.shape[1] for states in self.layer_states)

    def states(self, num_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both states of every token, joined over the passes: twice `(batch_size, num_tokens, hidden_size)`.

        Of prompts that passed once for several answers every answer gets the states.

        Args:
            num_tokens (`int`, *optional*): Of the sequences; all that passed when left out. A process that waits for
                others while they generate passes more tokens than it writes.

        Raises:
            RuntimeError: Nothing was captured.
            ValueError: Fewer tokens passed.
        """
        if not self.last_states:
            raise RuntimeError("no pass through the VLM was captured; run the model inside the context.")
        if num_tokens is not None and self.num_tokens < num_tokens:
            raise ValueError(
                f"the sequences have {num_tokens} tokens, but states of {self.num_tokens} were captured while they "
                "were written; feed the last token too (generate_and_feed_last)."
            )
        rows = len(self.last_states[-1])
        joined = tuple(_of_rows(passes, rows) for passes in (self.layer_states, self.last_states))
        return tuple(states[:, :num_tokens] for states in joined)

    def _collect(self, states: torch.Tensor) -> torch.Tensor:
        streams = ParallelStreams(states, self._shape, self._width)
        mean = edited = streams.mean
        if not self.layer_states and self.prompt_length is not None and mean.shape[1] > self.prompt_length:
            raise ValueError(
                f"the decoder of {type(self.model).__name__} passes {mean.shape[1]} states for {self.prompt_length} "
                "tokens: those of the picture have no tokens, so states and tokens do not belong together; use a VLM "
                "whose prompt holds a token for every image patch."
            )
        if self.edit is not None:
            edited = self.edit(mean, self.num_tokens)
            states = streams.replace(edited)
        self.layer_states.append(_captured(edited))
        if self.stop:
            raise _LayerReached
        return states

    def _read_shape(self, module, args, kwargs):
        given = (*args[:1], kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        self._shape = next(tuple(value.shape[:2]) for value in given if isinstance(value, torch.Tensor))

    def _read_input(self, module, args, kwargs):
        if args:
            return (self._collect(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._collect(kwargs["hidden_states"])}

    def _read_output(self, module, args, output):
        if isinstance(output, torch.Tensor):
            return self._collect(output)
        return (self._collect(output[0]), *output[1:])

    def _read_last(self, module, args, output):
        self.last_states.append(_captured(output if isinstance(output, torch.Tensor) else output[0]))


def _of_rows(passes: list[torch.Tensor], rows: int) -> torch.Tensor:
    """States of passes joined along the tokens; a pass of fewer rows was of prompts with as many answers each."""
    passes = [p if len(p) == rows else p.repeat_interleave(rows // len(p), 0) for p in passes]
    return passes[0] if len(passes) == 1 else torch.cat(passes, dim=1)


class ParallelStreams:
    """What a decoder layer passes on, as one state per token.

    Most layers keep one stream. Some families keep S of them: AltUp as `(S, batch, tokens, hidden)`, hyper-connections
    as `(batch, tokens, S, hidden)` or `(batch, tokens, S * hidden)`. A token's state is then the mean of its streams,
    and a change of the state is added to every stream, so that the mean changes by just that.

    Args:
        states (`torch.Tensor`): Input or output of a layer, in one of these shapes.
        shape (`tuple[int, int]`): (batch, tokens) of the pass.
        width (`int`): `hidden_size`.
    """

    def __init__(self, states: torch.Tensor, shape: tuple[int, int], width: int):
        self.states, self._axis = states, None
        if states.ndim == 4:
            self._axis = 2 if tuple(states.shape[:2]) == shape else 0
        elif states.shape[-1] != width:
            self._axis = 2
        self._split = states.unflatten(-1, (-1, width)) if states.ndim == 3 and self._axis is not None else states

    @property
    def mean(self) -> torch.Tensor:
        """One state per token, `(batch, tokens, hidden)`."""
        return self.states if self._axis is None else self._split.mean(self._axis)

    def replace(self, edited: torch.Tensor) -> torch.Tensor:
        """The streams whose mean is `edited`; without a graph where `edited` has none."""
        if self._axis is None:
            return edited
        split = self._split if edited.requires_grad else self._split.detach()
        return (split + (edited - split.mean(self._axis)).unsqueeze(self._axis)).view_as(self.states)


def text_config(model: nn.Module):
    """Configuration of the decoder that writes a VLM's text."""
    return model.config.get_text_config(decoder=True)


def text_stack(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers of a VLM's text model, and those layers.

    `get_decoder()` is followed until it names itself; from there the nearest list of `num_hidden_layers` modules
    counts, the first where several are as near (IDEFICS keeps its cross-attention behind its layers).

    Args:
        model (`nn.Module`): The VLM, with or without its head.

    Raises:
        ValueError: There is no such list.
    """
    count = getattr(text_config(model), "num_hidden_layers", None) if hasattr(model, "config") else None
    text = model
    while hasattr(text, "get_decoder") and text.get_decoder() not in (None, text):
        text = text.get_decoder()
    level = [text]
    while level:
        pairs = [(parent, child) for parent in level for child in parent.children()]
        for parent, child in pairs:
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, child
        level = [child for _, child in pairs]
    raise ValueError(
        f"{type(model).__name__} has no list of {'num_hidden_layers' if count is None else count} decoder layers in "
        f"its text model (looked in {type(text).__name__}), so there is no layer to read concepts from; use a VLM "
        "built on a decoder-only language model."
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a VLM's text model. See [`text_stack`]."""
    return text_stack(model)[1]


FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def final_norm(model: nn.Module) -> nn.Module:
    """The norm behind the last decoder layer of a VLM's text model.

    Raises:
        ValueError: where it goes by no known name.
    """
    stack, _ = text_stack(model)
    for name in FINAL_NORMS:
        if isinstance(getattr(stack, name, None), nn.Module):
            return getattr(stack, name)
    raise ValueError(
        f"{type(stack).__name__} has no final norm under a known name {FINAL_NORMS}, which a reference policy "
        '(beta > 0), sharding and trainable="decoder" need; train without them.'
    )


def check_decoder_only(model: nn.Module) -> None:
    """Refuse a VLM that cannot be read: an encoder-decoder, or one without decoder layers.

    Raises:
        ValueError: The message names the VLM.
    """
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False) or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) is an encoder-decoder: prompt and answer pass "
            "different layers, so there is no one sequence of states to read concepts and <REF_POS> from; use a VLM "
            "built on a decoder-only language model, such as LLaVA or Qwen-VL."
        )
    text_stack(model)


__all__ = ["HiddenStateCapture", "decoder_layers", "final_norm", "text_stack"]
