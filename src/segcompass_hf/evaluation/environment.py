# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a result was made with: versions, commit, device."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "numpy", "pillow", "datasets", "accelerate", "pycocotools", "huggingface_hub")


def versions() -> dict[str, str]:
    """Of Python, this package and those whose code decides results; left out where not installed."""
    import segcompass_hf

    found = {"python": platform.python_version(), "segcompass_hf": segcompass_hf.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that this package is imported from, with `+changes` where its files differ from it.

    Returns:
        `str` or `None`: `None` for an installed package, and where there is no git.
    """
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository around an installation
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device() -> dict[str, Any]:
    """What torch computes on."""
    if torch.cuda.is_available():
        return {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
