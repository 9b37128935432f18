"""The photographs that `segcompass demo` shows: there, small, each with its licence."""

import re

import pytest
from PIL import Image
from places import ROOT

import segcompass_hf
from segcompass_hf.commands.demo import PHOTOGRAPHS, read_photographs

FOLDER = (ROOT / PHOTOGRAPHS).parent
GRID, SHOWN = read_photographs(ROOT / PHOTOGRAPHS)


def test_eight_photographs_on_the_grid_of_the_reasoning():
    assert GRID == 6 and len(SHOWN) >= 8
    assert len({one["image"] for one in SHOWN}) >= 8
    assert all(set(one) <= {"image", "instruction", "failure"} for one in SHOWN)
    files = {path.name for path in FOLDER.glob("*.jpg")}
    assert files == {one["image"] for one in SHOWN}, "none is there that is not shown"


@pytest.mark.parametrize("name", sorted({one["image"] for one in SHOWN}))
def test_a_photograph_is_small_and_its_source_is_stated(name):
    with Image.open(FOLDER / name) as image:
        assert max(image.size) <= 512 and image.format == "JPEG" and not image.getexif()
    assert (FOLDER / name).stat().st_size <= 64_000
    (line,) = (line for line in (FOLDER / "SOURCES.md").read_text().splitlines() if f"`{name}`" in line)
    author, licence, source = (cell.strip() for cell in line.strip("|").split("|")[2:])
    assert author and source and re.search(r"public domain|CC0", licence)


@pytest.mark.slow
def test_photos_small_answers_a_photograph():
    """It loads in float32, fits its place, and marks a tie where somebody wears it."""
    from segcompass_hf.checkpoint import load_checkpoint
    from segcompass_hf.commands.predict import answer_row
    from segcompass_hf.images_segcompass import to_rgb_image

    try:
        folder = segcompass_hf.bundled_checkpoint("photos-small")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 120_000_000
    assert not list(folder.rglob("*.py")) and not list(folder.rglob("*.bin"))
    assert (folder / "README.md").read_text() and (folder / "concepts.safetensors").is_file()
    assert sum("failure" in one for one in SHOWN) >= 2, "two stand for others that fail"
    model, processor, name = load_checkpoint("photos-small")
    assert name == "photos-small" and str(model.dtype) == "torch.float32"
    assert processor.unknown_words("the Cat and the guitar") == ["guitar"]
    image = to_rgb_image(FOLDER / "officer.jpg")
    answer = answer_row(model, processor, image, "The tie", "full")
    assert "answer tie" in answer["kept"]["reasoning"]
    (mask,) = answer["kept"]["masks"]
    assert mask.shape == (image.height, image.width) and 0.002 < mask.mean() < 0.05
