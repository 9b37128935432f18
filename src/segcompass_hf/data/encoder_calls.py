# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Calls of an image encoder taken apart by image, and its outputs by tensor."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

GRID = "grid_thw"  # end of the argument that says how many of the packed patches are an image's, in transformers
# Arguments in transformers that choose what is handed out, and change no value of it.
_CHOICES = ("output_hidden_states", "output_attentions", "return_dict", "use_cache")
_PLAIN = (str, int, float, bool, type(None), torch.dtype)


@dataclass
class EncoderInputs:
    """Arguments of one call of an image encoder.

    Args:
        images (`list[dict[str, torch.Tensor]]`): Of every image what is its own, by the argument's name: its row of a
            batch `(1, ...)`, or its patches of packed ones `(num_patches, ...)`.
        sizes (`list[int]`): Rows of each image: 1, or its patches.
        settings (`dict[str, Any]`): The other arguments; texts, numbers, dtypes and lists of them.
    """

    images: list[dict[str, torch.Tensor]]
    sizes: list[int]
    settings: dict[str, Any]

    @classmethod
    def of(cls, bound: inspect.BoundArguments) -> EncoderInputs | None:
        """From a call's arguments; `None` where they cannot be told apart by image."""
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        tensors = {name: value for name, value in sorted(given.items()) if isinstance(value, torch.Tensor)}
        settings = {name: value for name, value in sorted(given.items()) if name not in tensors and value is not None}
        if not tensors or any(not value.ndim for value in tensors.values()) or not _is_plain(settings):
            return None
        grids = [value for name, value in tensors.items() if name.endswith(GRID)]
        count = len(grids[0] if grids else next(iter(tensors.values())))
        sizes = grids[0].prod(-1).tolist() if grids else [1] * count
        images: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        for name, value in tensors.items():
            parts = split_rows(value, [1] * count if name.endswith(GRID) else sizes)
            if parts is None or (len(value) != sum(sizes) and not name.endswith(GRID)):
                return None
            for image, part in zip(images, parts, strict=True):
                image[name] = part
        return cls(images, sizes, settings) if images else None

    @property
    def device(self) -> torch.device:
        return next(iter(self.images[0].values())).device

    def take(self, indices: Sequence[int]) -> EncoderInputs:
        """The same call for some of the images."""
        return EncoderInputs([self.images[i] for i in indices], [self.sizes[i] for i in indices], self.settings)

    def beside_another(self) -> EncoderInputs:
        """The same call with a paler image after those that there are."""
        paler = {name: value / 2 if value.is_floating_point() else value for name, value in self.images[-1].items()}
        return EncoderInputs([*self.images, paler], [*self.sizes, self.sizes[-1]], self.settings)

    def arguments(self) -> dict[str, Any]:
        """What to call the encoder with."""
        return {name: torch.cat([image[name] for image in self.images]) for name in self.images[0]} | self.settings

    @property
    def kind(self) -> str:
        """Equal for calls that differ in their images alone."""
        return json.dumps([sorted(self.images[0]), _precision(self.device), self.settings], default=str)

    def keys(self) -> list[str]:
        """Of each image 32 hexadecimal digits: of all that decides what is made of it, beside the encoder."""
        settings = {name: value for name, value in self.settings.items() if name not in _CHOICES}
        common = json.dumps([_precision(self.device), settings], default=str).encode()
        keys = []
        for image in self.images:
            digest = hashlib.sha256(common)
            for name, value in image.items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            keys.append(digest.hexdigest()[:32])
        return keys


def split_rows(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor] | None:
    """Rows of a tensor by image, where each has a whole number of them for its size or the same share of it: merged
    patches are fewer than patches. `None` where the rows do not go into the sizes."""
    rows, total = (len(tensor) if tensor.ndim else 0), sum(sizes)
    if not rows or total % rows or any(size % (total // rows) for size in sizes):
        return None
    return list(tensor.split([size * rows // total for size in sizes]))


def _is_plain(value: Any) -> bool:
    """Whether a value says all about itself as text."""
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in value.values())
    return all(_is_plain(part) for part in value) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)


def _precision(device: torch.device) -> str | None:
    """The dtype of autocast, where it is on."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None


def leaves(output: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a module's output is made of, each with its place: through dicts, such as `ModelOutput`, and tuples."""
    if isinstance(output, (Mapping, list, tuple)):
        for name, part in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from leaves(part, f"{path}/{name}")
    else:
        yield path, output


def rebuilt(output: Any, replace: Callable[[str, Any], Any], path: str = "") -> Any:
    """The same structure with other leaves."""
    if isinstance(output, Mapping):
        return type(output)(**{name: rebuilt(part, replace, f"{path}/{name}") for name, part in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(rebuilt(part, replace, f"{path}/{name}") for name, part in enumerate(output))
    return replace(path, output)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a module's calls go to another function, hooks and all else of the module left as they are.

    Args:
        module (`nn.Module`): Its weights, and their names, do not change.
        forward (`Callable`): Takes the module's arguments.
    """
    own = module.__dict__.get("forward")  # of a module that others have wrapped
    module.forward = functools.wraps(module.forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class AwaitedTensor(torch.Tensor):
    """Stands for a tensor that is computed when something is asked of it, and not before."""

    @staticmethod
    def of(compute: Callable[[], torch.Tensor]) -> AwaitedTensor:
        tensor = torch.Tensor._make_subclass(AwaitedTensor, torch.empty(0))
        tensor._compute = compute
        return tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = _computed(args), _computed(kwargs or {})
        return function(*args, **kwargs)


def _computed(value: Any) -> Any:
    if isinstance(value, AwaitedTensor):
        return value._compute()
    if isinstance(value, dict):
        return {name: _computed(part) for name, part in value.items()}
    return type(value)(_computed(part) for part in value) if type(value) in (list, tuple) else value


class OutputLayout:
    """What a module hands out for one kind of call.

    Args:
        output: Of one call, of tensors and `None` in dicts and tuples; the tensors themselves are not kept.
        read (`list[str]`): Places of tensors of which something was asked; added to.
    """

    def __init__(self, output: Any, read: list[str]):
        self._read = read
        nothing = torch.empty(0, device="meta")  # `ModelOutput` leaves out what is None
        self.structure = rebuilt(output, lambda _, leaf: None if leaf is None else nothing)
        self._paths = {path for path, leaf in leaves(output) if leaf is not None}

    @property
    def read(self) -> list[str]:
        """Places of tensors that calls of this kind hand out and some call has been asked for."""
        return [path for path in self._read if path in self._paths]

    def outputs(self, known: Mapping[str, torch.Tensor], compute: Callable[[], Any]) -> Any:
        """An output with tensors that are known; others are computed, all at once, if something is asked of one."""

        @functools.cache
        def everything() -> dict[str, torch.Tensor]:
            return dict(leaves(compute()))

        def awaited(path: str) -> torch.Tensor:
            if path not in self._read:
                self._read.append(path)
            return everything()[path]

        def leaf(path: str, other: Any) -> Any:
            if other is None:
                return None
            return known[path] if path in known else AwaitedTensor.of(functools.partial(awaited, path))

        return rebuilt(self.structure, leaf)
