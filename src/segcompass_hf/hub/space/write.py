# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The live page as a Hugging Face Space: three files, written into a folder to upload."""

from __future__ import annotations

import os
import re
from importlib import metadata, resources
from pathlib import Path

FILES = ("README.md", "app.py", "requirements.txt")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_space(folder: str | os.PathLike, model_id: str | None = None, package: str | None = None) -> list[Path]:
    """Write the files of a Space that serves the live page.

    Args:
        folder (`str` or `os.PathLike`): Where to; made if missing. Files of these names are replaced.
        model_id (`str`, *optional*): Checkpoint on the Hub, `owner/name`; the bundled checkpoint by default.
        package (`str`, *optional*): What pip installs the package from: a requirement such as
            `segcompass_hf[explain,data]`, an address, or the name of a wheel that lies in the folder too.

    Returns:
        `list[pathlib.Path]`: the files.

    Raises:
        ValueError: `model_id` is no id on the Hub, or is also a path here: a Space sees no folder of this machine; or
            `package` holds a token or a folder of this machine.
    """
    from ... import __version__
    from ...files import write_whole
    from ...pages import fill_template
    from ...private_text import check_publishable

    if model_id is not None and not _REPO_ID.fullmatch(model_id):
        raise ValueError(f"model {model_id!r} is no id on the Hub; a Space needs owner/name.")
    if model_id is not None and Path(model_id).exists():
        raise ValueError(
            f"model {model_id!r} is a path on this machine, where a Space cannot see it; publish it with `segcompass "
            "push` and name its id on the Hub. If this is its id, call from another folder."
        )
    if package is not None and (not package.strip() or not package.isprintable()):
        raise ValueError(f"package is {package!r}; expected a line for requirements.txt, such as segcompass_hf.")
    check_publishable("package", package or "")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "GRADIO": metadata.version("gradio"),
        "MODEL_ID": model_id or "",
        "MODELS": f"models:\n- {model_id}\n" if model_id else "",
        "PACKAGE": package or f"segcompass_hf[explain,data]=={__version__}",
    }
    for name in FILES:
        text = (resources.files(__package__) / name).read_text("utf-8")
        write_whole(folder / name, fill_template(text, values))  # a link of that name is replaced, not followed
    return [folder / name for name in FILES]
