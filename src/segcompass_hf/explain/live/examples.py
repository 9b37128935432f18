# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the live page offers to click first: the pictures and questions of a checkpoint's card."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from transformers.utils import cached_file, logging

from ...checkpoint import SCENES, bundled_folder
from ...images_segcompass import to_rgb_image

logger = logging.get_logger(__name__)


def card_examples(checkpoint: str) -> list[tuple[Any, str]]:
    """Pictures and instructions in the header of a checkpoint's card (`widget`); without any, those of scenes-tiny.

    Args:
        checkpoint (`str`): Folder, Hub id or name of a bundled checkpoint.

    Returns:
        `list[tuple[PIL.Image.Image, str]]`: RGB; what cannot be read is left out with a warning.
    """
    examples = _read(bundled_folder(checkpoint))
    return examples if examples or checkpoint == SCENES else card_examples(SCENES)


def _read(checkpoint: str) -> list[tuple[Any, str]]:
    from huggingface_hub import ModelCard

    examples = []
    try:
        card = _file(checkpoint, "README.md")
        listed = ModelCard.load(card).data.get("widget") if card else None
        for example in listed or []:
            source = PurePosixPath(example["src"])
            if "://" not in example["src"] and not source.is_absolute() and ".." not in source.parts:
                examples.append((to_rgb_image(_file(checkpoint, example["src"])), str(example["text"])))
    except Exception as error:  # whatever a card that is not ours makes the readers raise
        logger.warning(f"the examples of {checkpoint} cannot be read: {type(error).__name__}: {error}")
    return examples


def _file(checkpoint: str, name: str) -> str | None:
    """A file of a folder or of a repository of the Hub; `None` where it is not there."""
    return cached_file(
        checkpoint,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


__all__ = ["card_examples"]
