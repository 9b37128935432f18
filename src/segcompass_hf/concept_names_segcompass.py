# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Concepts by name: which features of the SAE show what a word means in an image, as the concept dictionary says.

The dictionary beside a checkpoint (`concepts.safetensors`) keeps its names in the file's header, so that they can be
read where nothing but the checkpoint is.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.utils import cached_file

from .offloading_segcompass import weights_at_hand

NUMBERS_FILE = "concepts.safetensors"
SKETCH_SIZE = 512  # weights of encoder and of decoder
SKETCH_TOLERANCE = 2.0**-7  # relative: weights may have been rounded to bfloat16 since
MAX_HEADER = 100_000_000  # bytes, as of safetensors
_NEAR, _LISTED = 5, 12  # names that an error shows


@dataclass(frozen=True)
class NamedConcept:
    """A concept as images show it.

    Args:
        name (`str`): What people call it.
        features (`tuple[int, ...]`): SAE feature ids, any of which shows it.
        thresholds (`tuple[float, ...]`): One per feature: the activation on an image token from which it counts.
    """

    name: str
    features: tuple[int, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.features or len(self.features) != len(self.thresholds):
            raise ValueError(
                f"the concept {self.name!r} has {len(self.features)} features and {len(self.thresholds)} thresholds; "
                "expected one or more, and a threshold of each."
            )


def sae_sketch(sae: nn.Module) -> np.ndarray:
    """Some weights of an SAE, spread evenly over encoder and decoder: float32 `(1024,)`."""
    parts = []
    with weights_at_hand(sae):
        for weight in (sae.W_enc, sae.W_dec):
            flat = weight.detach().flatten()
            parts.append(flat[:: max(1, flat.numel() // SKETCH_SIZE)][:SKETCH_SIZE].float().cpu().numpy())
    return np.concatenate(parts)


def is_same_sketch(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two sketches are of one SAE, up to the rounding of its weights."""
    return first.shape == second.shape and np.allclose(first, second, rtol=SKETCH_TOLERANCE, atol=1e-7)


def names_header(concepts: Iterable[NamedConcept]) -> str:
    """Named concepts as the header of `concepts.safetensors` keeps them."""
    return json.dumps({c.name: [list(c.features), [round(t, 6) for t in c.thresholds]] for c in concepts})


def read_names(path: str | os.PathLike) -> tuple[dict[str, NamedConcept], np.ndarray]:
    """The names that a concept dictionary knows, and the sketch of the SAE that it is of.

    Args:
        path (`str` or `os.PathLike`): Its `concepts.safetensors`.

    Raises:
        ValueError: The file is damaged, or of a version that kept no names.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
            names = header["__metadata__"].get("names")
            start, end = header["sae_sketch"]["data_offsets"]
            file.seek(8 + length + start)
            sketch = np.frombuffer(file.read(end - start), dtype="<f4")
        known = None
        if names is not None:
            known = {name: NamedConcept(name, *map(tuple, found)) for name, found in json.loads(names).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no concept dictionary, or damaged ({error}).") from error
    if known is None:
        raise ValueError(
            f"{os.fspath(path)!r} is of a version without names; write it again: "
            "ConceptDictionary.load(folder).save(folder)."
        )
    return known, sketch


def names_of(model: Any) -> dict[str, NamedConcept]:
    """The names that the concept dictionary beside a model's checkpoint knows.

    Args:
        model (`SegCompassForReasoningSegmentation`): Where it was loaded from is looked at, a folder or the Hub.

    Raises:
        ValueError: There is no dictionary, or one that cannot be used: damaged, without names, of another SAE.
    """
    source = str(getattr(model.config, "_name_or_path", "") or "")
    path = Path(source, NUMBERS_FILE) if os.path.isdir(source) else None
    if path is None and source:
        optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        commit = getattr(model.config, "_commit_hash", None)
        found = cached_file(source, NUMBERS_FILE, revision=commit, **optional)
        path = None if found is None else Path(found)
    if path is None or not path.is_file():
        raise ValueError(
            f"there is no concept dictionary beside the model ({source or 'which comes from no folder'}), so that "
            "concepts have no names; build one (ConceptDictionary.build(model, processor, rows).save(folder)), or "
            "name features yourself with NamedConcept(name, features, thresholds)."
        )
    known, sketch = read_names(path)
    if not is_same_sketch(sae_sketch(model.sae), sketch):
        raise ValueError(
            f"the concept dictionary {os.fspath(path)!r} is of another SAE than the model's, whose features mean "
            "other things; build one for this model: ConceptDictionary.build(model, processor, rows)."
        )
    return known


def find_concepts(names: Iterable[str | NamedConcept], known: Mapping[str, NamedConcept]) -> list[NamedConcept]:
    """Concepts by their names, which are looked up as given and in lower case.

    Args:
        names (iterable of `str` or [`NamedConcept`]): The latter stand for themselves.
        known (`Mapping[str, NamedConcept]`): By name.

    Raises:
        ValueError: A name is not known; the message lists near ones.

    ```python
    >>> red = NamedConcept("red", (7,), (0.25,))
    >>> find_concepts(["Red"], {"red": red}) == [red]
    True
    ```
    """
    found = []
    for name in names:
        if isinstance(name, NamedConcept):
            found.append(name)
            continue
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a concept is named by a text such as 'person', got {name!r:.60}.")
        word = next((word for word in (name.strip(), name.strip().lower()) if word in known), None)
        if word is None:
            near = get_close_matches(name.strip().lower(), known, n=_NEAR, cutoff=0.6)
            listed = sorted(known)
            rest = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            raise ValueError(
                f"no concept that images show is named {name!r}. "
                + (f"Near: {', '.join(near)}. " if near else "")
                + f"The dictionary knows {', '.join(listed[:_LISTED]) or 'none'}{rest}."
            )
        found.append(known[word])
    return found


__all__ = ["NamedConcept", "find_concepts", "names_of", "read_names"]
