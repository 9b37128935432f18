# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What several commands need: bad input, numbers, folders, checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._lazy import named_extras
from ..allocator import keep_freed_memory
from ..checkpoint import BUNDLED, words_note
from ..checkpoint import load_checkpoint as _load_checkpoint

FIGURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


class UserError(Exception):
    """Bad input: shown as one line, exit code 2."""


@contextmanager
def user_errors(
    start: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
) -> Iterator[None]:
    """What goes wrong inside is bad input.

    Args:
        start (`str`, *optional*): Put before the error's own words, unless they hold it.
        kinds (`tuple`, *optional*): The exceptions meant.
    """
    try:
        yield
    except kinds as error:
        text = str(error) or type(error).__name__
        raise UserError(text if not start or start in text else f"{start}: {text}") from error


def add_question(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Arguments of the commands that ask one question about one image; see [`ask`]."""
    number = None if required else "?"
    parser.add_argument(
        "image",
        nargs=number,
        help="image file of at most 50 million pixels; SEGCOMPASS_MAX_IMAGE_PIXELS in the environment raises that",
    )
    parser.add_argument("instruction", nargs=number, help="what to find, in words")
    add_model(parser)
    parser.add_argument(
        "--reasoning", choices=("full", "short", "none"), default="full", help="how much to think (%(default)s)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, which is `None` where it is not given; see [`default_checkpoint`]."""
    parser.add_argument(
        "--model",
        help="checkpoint folder or Hub id, or `photos-small` or `scenes-tiny` (photos-small in a clone of the "
        "repository that has it, else scenes-tiny; on Scenes always that)",
    )


def check_question(args: argparse.Namespace, kinds: tuple[str, ...], expected: str) -> None:
    """Refuse an empty instruction, and an `--output` whose suffix is none of `kinds`."""
    if not args.instruction.strip():
        raise UserError("the instruction is empty; say in words what to find.")
    if args.output is not None and args.output.suffix.lower() not in kinds:
        raise UserError(f"--output {args.output} is {expected}.")


def ask(args: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    """Image, model, processor and the model's name of a question; says what the model does not know.

    Raises:
        UserError: image or checkpoint cannot be read.
    """
    image = open_image(args.image)
    model, processor, name = load_checkpoint(args.model)
    for note in (BUNDLED.get(name), words_note(processor, args.instruction)):
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
    return image, model, processor, name


def need_figures() -> None:
    """Say that matplotlib is missing before anything is loaded, not when the answer is there.

    Raises:
        MissingExtraError: It is.
    """
    with named_extras():
        import matplotlib  # noqa: F401


def positive(text: str) -> int:
    """A positive number of the command line."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def load_checkpoint(model_name: str | None, device: Any = None) -> tuple[Any, Any, str]:
    """[`~checkpoint.load_checkpoint`], whose errors are bad input here; what the answers free is kept for the next."""
    keep_freed_memory()
    with user_errors():
        return _load_checkpoint(model_name, device)


def show_progress() -> None:
    """Bars of what is computed on a terminal, where loading a checkpoint has switched them off, and none elsewhere."""
    import datasets
    from transformers.utils import logging

    if sys.stderr.isatty():
        logging.enable_progress_bar()
    else:
        datasets.disable_progress_bars()


def print_page(path: Path) -> None:
    """The last line of a command that wrote a page: its address, which most terminals open at a click."""
    print(f"page: {path.absolute().as_uri()}")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}.") from error


def one_line(error: Exception | str) -> str:
    """The message of an error without line breaks, and not longer than a few lines."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:398] + " …"


def open_image(path: str) -> Any:
    """An image file as RGB, `PIL.Image.Image`."""
    if not Path(path).exists():
        raise UserError(f"there is no file {path!r}; give the path of an image.")
    from ..images_segcompass import to_rgb_image

    with user_errors(kinds=(Exception,)):  # PIL's readers raise many kinds on damaged files, and on bombs
        return to_rgb_image(path)
