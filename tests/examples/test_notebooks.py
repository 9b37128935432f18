# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The notebooks: committed as they ran, by the public interface alone, and they still run."""

import ast
import importlib
import json
import re
import socket
from base64 import b64decode, b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from notebooks import FOLDER, NAMES, execute, shrink_pictures
from PIL import Image

from segcompass_hf.private_text import private_places

LARGEST = 1_000_000  # bytes of a file
PICTURES = {"image/png", "image/jpeg"}


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook: dict) -> list[bytes]:
    """Every picture of the outputs, in order."""
    outputs = [output.get("data", {}) for cell in code_cells(notebook) for output in cell["outputs"]]
    return [b64decode("".join(data[form])) for data in outputs for form in sorted(PICTURES & set(data))]


def texts(value: object) -> Iterator[str]:
    """Every text of a notebook but the pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in PICTURES:
                yield from texts(item)


def test_there_is_a_notebook_for_every_first_step():
    assert NAMES == ["explain_and_steer", "finetune_folder", "quickstart", "train_sae"]
    listed = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"({name}.ipynb)" in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestCommitted:
    def test_it_ran_from_top_to_bottom_without_an_error_or_a_warning(self, name):
        cells = code_cells(read(name))
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert not [output["text"] for output in outputs if output.get("name") == "stderr"]

    def test_it_holds_pictures_and_is_small(self, name):
        shown = pictures(read(name))
        assert len(shown) >= 4
        for picture in shown:
            with Image.open(BytesIO(picture)) as opened:
                assert min(opened.size) >= 100
        assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST

    def test_it_says_nothing_of_the_machine_it_ran_on(self, name):
        notebook = read(name)
        assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
        said = "\n".join(texts(notebook))
        assert not re.findall(r"(?<![\w.])/(?:root|home|Users|tmp|work|opt|usr|var|mnt|private)/\S*", said)
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", said)
        assert not list(private_places(said))

    def test_it_begins_with_what_it_takes(self, name):
        cells = read(name)["cells"]
        first = "".join(cells[0]["source"])
        assert first.startswith("# ") and all(f"**{what}**" in first for what in ("You will", "You need", "It takes"))
        assert "What to try next" in "".join(cells[-1]["source"])

    def test_it_imports_what_the_package_and_its_rooms_export(self, name):
        for cell in code_cells(read(name)):
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "segcompass_hf":
                    room = importlib.import_module(node.module)
                    assert hasattr(room, "__path__") and node.module.count(".") <= 1, node.module
                    assert {alias.name for alias in node.names} <= set(room.__all__), node.module
                if isinstance(node, ast.Import):
                    assert not any(alias.name.startswith("segcompass_hf.") for alias in node.names)

    def test_its_links_lead_somewhere(self, name):
        said = "\n".join(texts(read(name)["cells"]))
        for target in re.findall(r"\]\(([^)#]+)\)", said):
            assert target.startswith("https://") or (FOLDER / target).exists(), target
        for path in re.findall(r"(?<![\w/])(?:docs|examples)/[\w/.-]+\.(?:md|py|yaml)", said):
            assert (FOLDER.parents[1] / path).exists(), path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_top_to_bottom(name: str, tmp_path: Path):
    pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
    pytest.importorskip("ipykernel", reason="notebooks are run by ipykernel")
    notebook = execute(name, tmp_path)  # a cell that fails raises
    assert len(pictures(notebook)) == len(pictures(read(name)))


def test_pictures_are_kept_in_one_small_form():
    nbformat = pytest.importorskip("nbformat")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 120, 3), dtype=np.uint8))
    flat = Image.new("RGB", (120, 120), "white")
    cells = []
    for picture in (noise, flat):
        display = nbformat.v4.new_output("display_data", data={"image/jpeg": "x", "text/plain": "Figure"})
        display["data"]["image/png"] = b64encode(_png(picture)).decode()
        cells.append(nbformat.v4.new_code_cell("", outputs=[display]))
    notebook = nbformat.v4.new_notebook(cells=cells)
    shrink_pictures(notebook)
    forms = [set(cell.outputs[0].data) & PICTURES for cell in notebook.cells]
    assert forms == [{"image/jpeg"}, {"image/png"}]
    kept = pictures(notebook)
    assert len(kept[0]) < len(_png(noise)) / 2
    with Image.open(BytesIO(kept[1])) as shown:
        assert shown.convert("RGB").getpixel((60, 60)) == (255, 255, 255)


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
