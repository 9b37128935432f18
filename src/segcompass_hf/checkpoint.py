# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint to answer with: the bundled one, a folder, or one of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import read_json_object

CONFIGURATIONS = ("config.json", "adapter_config.json", "generation_config.json", "processor_config.json")
CONFIGURATIONS += ("preprocessor_config.json", "tokenizer_config.json")
# Of generation_config.json.
_NUMBERS = (
    "max_new_tokens",
    "min_new_tokens",
    "max_length",
    "min_length",
    "num_beams",
    "num_return_sequences",
    "top_k",
)
_NUMBERS += ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_FLAGS = ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits")
SCENES, PHOTOS = "scenes-tiny", "photos-small"
# Checkpoint that comes with this project -> what it knows, told wherever it answers.
BUNDLED = {
    SCENES: "scenes-tiny answers; it knows only procedural scenes of coloured shapes (Scenes), and on any other image "
    "its answer means nothing. Pass --model for another checkpoint.",
    PHOTOS: "photos-small answers; it was trained on few photographs of people and everyday things, 80 kinds in all, "
    "and is often wrong. Pass --model for another checkpoint.",
}


def default_checkpoint(*datasets: str | None) -> str:
    """The bundled checkpoint that answers where none is named: `photos-small` where it is there, else `scenes-tiny`;
    on Scenes always that.

    Args:
        datasets (`str`, *optional*): Names of data sets that are asked about, such as `scenes:val`.
    """
    from . import bundled_checkpoint

    if any((name or "").startswith("scenes:") for name in datasets):
        return SCENES
    try:
        bundled_checkpoint(PHOTOS)
    except FileNotFoundError:
        return SCENES
    return PHOTOS


def bundled_folder(name: str) -> str:
    """The folder of a bundled checkpoint by its name, of `scenes-tiny` also by `bundled`; any other text as it is.

    Raises:
        FileNotFoundError: This installation does not hold it.
    """
    from . import bundled_checkpoint

    name = SCENES if name == "bundled" else name
    return str(bundled_checkpoint(name)) if name in BUNDLED else name


def words_note(processor: Any, instruction: str) -> str | None:
    """A sentence about words of an instruction that a checkpoint was not trained on; `None` where there are none."""
    words = processor.unknown_words(instruction)
    if not words:
        return None
    named = ", ".join(f'"{word}"' for word in words)
    return f"this checkpoint was not trained on the word{'s' * (len(words) > 1)} {named}; its answer is a guess."


def load_checkpoint(model_name: str | None, device: Any = None) -> tuple[Any, Any, str]:
    """Model in eval mode, processor, and the name shown to the user.

    Args:
        model_name (`str`, *optional*): Folder, Hub id or one of [`BUNDLED`]; [`default_checkpoint`] by default.
        device (`torch.device`, *optional*): The best there is by default.

    Raises:
        FileNotFoundError: there is no such folder, or no such bundled checkpoint.
        ValueError: it cannot be loaded, or is no SegCompass checkpoint.
    """
    model_name = default_checkpoint() if model_name is None else model_name
    path = bundled_folder(model_name)
    if path == model_name and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        path = str(Path(path).expanduser())
        if not Path(path).is_dir():
            raise FileNotFoundError(f"there is no checkpoint folder {model_name!r}.")
    _check_base(Path(path))
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        _check_configurations(Path(path))
        # Nobody is asked whether to run code that lies beside the weights: ours is registered, other is not wanted.
        model = AutoModel.from_pretrained(path, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(f"cannot load a checkpoint from {path!r}: {error}") from error
    if not hasattr(model, "segment"):
        raise ValueError(f"{path!r} holds a {type(model).__name__}, which is not a SegCompass checkpoint.")
    try:
        processor(images=Image.new("RGB", (32, 32)), instruction="it", return_tensors="pt")
    except Exception as error:  # settings of wrong types load, and fail when they are used
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the processor of {path!r} cannot be used ({detail}); is its configuration damaged?"
        ) from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), processor, SCENES if model_name == "bundled" else model_name


def _check_configurations(folder: Path) -> None:
    """Name a damaged configuration of a folder: transformers passes over some, and fails at others when it answers.

    Raises:
        ValueError: One is no JSON object, or `generation_config.json` has a value of a wrong type.
    """
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            content = read_json_object(folder / name, "restore it, or save the checkpoint again")
            if name == "generation_config.json":
                _check_generation(folder / name, content)


def _check_generation(path: Path, content: dict[str, Any]) -> None:
    for name, value in content.items():
        expected, right = None, True
        if name.endswith("_token_id"):
            may_be_several = name == "eos_token_id" and isinstance(value, list)
            ids = value if may_be_several else [value]
            expected, right = "a token id of 0 or more", all(type(one) is int and 0 <= one < 2**31 for one in ids)
        elif name in _NUMBERS:
            expected, right = "a finite number", type(value) in (int, float) and abs(value) < 1e38
        elif name in _FLAGS:
            expected, right = "true or false", isinstance(value, bool)
        if value is not None and not right:
            raise ValueError(f"{path} is damaged: {name} is {value!r:.80}, expected {expected}, or null.")


def _check_base(folder: Path) -> None:
    """An adapter that was moved here without its base: transformers would take the folder's name for a Hub id."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        moved = Path(named).is_absolute() and not Path(named).is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return  # no adapter, or one that loading will complain about
    if moved:
        raise ValueError(
            f"{str(folder)!r} is an adapter of the model in {named!r}, which is not on this machine; write the place "
            "or Hub id of that model into base_model_name_or_path of its adapter_config.json."
        )
