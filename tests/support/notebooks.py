# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The notebooks of `examples/notebooks`, run from top to bottom in a kernel of their own, without a network.

    python tests/support/notebooks.py [quickstart ...]

writes the outputs of all, or of those named, into the committed files, and prints what each took.
"""

import io
import os
import resource
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from PIL import Image
from places import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
TIMEOUT = 900  # seconds of a cell, on a busy machine


def execute(name: str, folder: Path) -> Any:
    """Run a notebook with `folder` as its working directory.

    Returns:
        `nbformat.NotebookNode`: with outputs, small pictures, and nothing in it of where and when it ran.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    options = {"timeout": TIMEOUT, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options)
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    client.execute(env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)})
    notebook.metadata["language_info"] = {"name": "python"}
    shrink_pictures(notebook)
    return notebook


def shrink_pictures(notebook: Any) -> None:
    """Keep one form of every picture in the outputs: a PNG of 256 colours or a JPEG, whichever is smaller."""
    for cell in notebook.cells:
        for data in (output["data"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())):
            picture = Image.open(io.BytesIO(b64decode(data.pop("image/png")))).convert("RGB")
            forms = {"image/png": picture.quantize(256), "image/jpeg": picture}
            written = {form: _encoded(shown, form) for form, shown in forms.items()}
            smallest = min(written, key=lambda form: len(written[form]))
            data.pop("image/jpeg", None)
            data[smallest] = b64encode(written[smallest]).decode()


def _encoded(picture: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form.removeprefix("image/"), optimize=True, quality=85)
    return file.getvalue()


def main() -> None:
    import nbformat

    for name in sys.argv[1:] or NAMES:
        start, used = time.perf_counter(), _cpu_seconds()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, Path(folder))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        sys.stdout.write(f"{name}: {time.perf_counter() - start:.0f} s, {_cpu_seconds() - used:.0f} CPU seconds\n")


def _cpu_seconds() -> float:
    """Of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
