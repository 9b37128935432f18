"""Functions that a recipe names."""

import sys

import pytest

pytest.importorskip("trl")

from segcompass_hf.training.recipe.settings import RecipeError, read_recipe  # noqa: E402
from segcompass_hf.training.recipe.trainers import names_of  # noqa: E402


def sae_stage(tmp_path, names):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: out\nmodel: bundled\nsae:\n  names: {names}\n")
    return read_recipe(path).stages[0]


def test_names_of_a_file_that_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "their_words.py").write_text("WORD = 'cup'\n")
    (tmp_path / "their_names.py").write_text("from their_words import WORD\n\ndef names(row):\n    return [WORD]\n")
    found = names_of(sae_stage(tmp_path, f"{tmp_path}/their_names.py:names"))
    assert found["names"]({}) == ["cup"]


@pytest.mark.parametrize("names", ["nowhere.py:names", "segcompass_hf.token_places", "nowhere:names"])
def test_names_that_are_not_there(tmp_path, names):
    with pytest.raises(RecipeError, match="expected MODULE:FUNCTION or FILE.py:FUNCTION"):
        names_of(sae_stage(tmp_path, names))
