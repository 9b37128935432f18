# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What several commands need: bad input, numbers, folders, checkpoints."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

BUNDLED_DOMAIN = (
    "the bundled checkpoint knows only procedural scenes of coloured shapes (Scenes); on any other image its answer "
    "means nothing. Pass --model for another checkpoint."
)


class UserError(Exception):
    """Bad input: shown as one line, exit code 2."""


def positive(text: str) -> int:
    """A positive number of the command line."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def load_checkpoint(model_name: str | None, device: Any = None) -> tuple[Any, Any, str]:
    """Model in eval mode, processor, and the name shown to the user.

    Args:
        model_name (`str`, *optional*): Folder or Hub id; the bundled checkpoint by default.
        device (`torch.device`, *optional*): The best there is by default.

    Raises:
        UserError: there is no such checkpoint.
    """
    import segcompass_hf

    if model_name is None:
        try:
            path = str(segcompass_hf.bundled_checkpoint())
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    else:
        path = model_name
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        if looks_local and not Path(path).expanduser().is_dir():
            raise UserError(f"there is no checkpoint folder {path!r}.")
        path = str(Path(path).expanduser()) if looks_local else path

    _check_base(Path(path))
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(path)
        processor = AutoProcessor.from_pretrained(path)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise UserError(f"cannot load a checkpoint from {path!r}: {error}") from error
    if not hasattr(model, "segment"):
        raise UserError(f"{path!r} holds a {type(model).__name__}, which is not a SegCompass checkpoint.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), processor, "scenes-tiny (bundled)" if model_name is None else model_name


def _check_base(folder: Path) -> None:
    """An adapter that was moved here without its base: transformers would take the folder's name for a Hub id."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        moved = Path(named).is_absolute() and not Path(named).is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return  # no adapter, or one that loading will complain about
    if moved:
        raise UserError(
            f"{str(folder)!r} is an adapter of the model in {named!r}, which is not on this machine; write the place "
            "or Hub id of that model into base_model_name_or_path of its adapter_config.json."
        )


def make_folder(path: Path) -> None:
    """Make a folder, and those above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}.") from error


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, and not longer than a few lines."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:398] + " …"


def unknown_words(tokenizer: Any, instruction: str) -> list[str]:
    """Words of an instruction that a tokenizer maps to its unknown token, in order, each once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): One without an unknown token knows every word.
        instruction (`str`): The user's words.
    """
    if tokenizer.unk_token_id is None:
        return []
    words = dict.fromkeys(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", instruction))
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]]


def open_image(path: str) -> Any:
    if not Path(path).exists():
        raise UserError(f"there is no file {path!r}; give the path of an image.")
    from ..images_segcompass import to_rgb_image

    try:
        return to_rgb_image(path)
    except Exception as error:  # PIL's readers raise many kinds on damaged files, and on bombs
        raise UserError(str(error)) from error
