# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What visitors of the live page may send as a picture: image files of known formats, and few of them kept."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from ...image_files_segcompass import open_image

MAX_LAYERS = 8  # of a drawing; the page makes one
MAX_DRAWINGS = 32  # sent and not yet asked about, of all visitors; the oldest are dropped first
MAX_DRAWING_BYTES = 20_000_000  # as for files


def bound_uploads(editor: gr.ImageEditor) -> None:
    """Make a component refuse, in the page's words, what it would decode or keep without bounds.

    (A subclass would make gradio write a stub file beside this one.)

    Args:
        editor (`gradio.ImageEditor`): Changed in place.
    """
    preprocess, decode, accept = editor.preprocess, editor.convert_and_format_image, editor.accept_blobs

    def checked_decode(file: Any, *args: Any, **kwargs: Any) -> Any:
        if file is not None:
            open_image(file if isinstance(file, bytes) else file.path, "it")  # gradio decodes any format of any size
        return decode(file, *args, **kwargs)

    def read(payload: Any) -> Any:
        try:
            if payload is not None and len(payload.layers or ()) > MAX_LAYERS:
                raise ValueError(f"it has {len(payload.layers)} layers; at most {MAX_LAYERS} are read.")
            return preprocess(payload)
        except Exception as error:  # whatever a damaged file makes the readers raise
            reason = f" ({error})" if "pixels" in str(error) else ""
            message = f"This file cannot be read as a picture{reason}. Choose a JPEG, PNG or WebP file."
            raise gr.Error(message, print_exception=False) from error
        finally:
            editor.blob_storage.pop(getattr(payload, "id", None), None)

    @functools.wraps(accept)
    def keep(data: Any) -> Any:
        index = str(data.data.get("index") or 0)
        if index != "null" and not (index.isdigit() and int(index) < MAX_LAYERS):
            raise gr.Error(f"layer {index[:20]!r} is not kept", print_exception=False)
        if any(len(content) > MAX_DRAWING_BYTES for _, content in data.files):
            raise gr.Error("the drawing is too large", print_exception=False)
        accept(data)
        while len(editor.blob_storage) > MAX_DRAWINGS:
            editor.blob_storage.pop(next(iter(editor.blob_storage)), None)

    editor.preprocess, editor.convert_and_format_image, editor.accept_blobs = read, checked_decode, keep
