"""What the live page offers to click: the pictures and questions of a checkpoint's card."""

import pytest
from PIL import Image

from segcompass_hf.explain.live.examples import card_examples

SCENES = [
    "highlight the bottommost object",
    "point to the squares below the large blue square",
    "show me the green cross",
]


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "examples").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "examples" / "red.png")

    def write(*widget: str):
        (tmp_path / "README.md").write_text("---\nlicense: mit\nwidget:\n" + "".join(widget) + "---\n# A card\n")
        return str(tmp_path)

    return write


def of(checkpoint):
    return [text for _, text in card_examples(checkpoint)]


def test_those_of_the_card(checkpoint):
    folder = checkpoint("- {src: examples/red.png, text: the red one}\n")
    ((image, text),) = card_examples(folder)
    assert text == "the red one" and image.size == (8, 6) and image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["scenes-tiny", "bundled"])
def test_of_the_bundled_checkpoint(name):
    assert of(name) == SCENES


def test_without_a_card_those_of_scenes(tmp_path):
    assert of(str(tmp_path)) == SCENES


@pytest.mark.parametrize("source", ["https://example.org/a.png", "../red.png", "/etc/red.png"])
def test_nothing_outside_of_the_checkpoint_is_read(checkpoint, tmp_path, source):
    Image.new("RGB", (8, 6)).save(tmp_path.parent / "red.png")
    assert of(checkpoint(f"- {{src: {source}, text: x}}\n", "- {src: examples/red.png, text: y}\n")) == ["y"]


def test_what_cannot_be_read_is_left_out(checkpoint, tmp_path):
    (tmp_path / "examples" / "no.png").write_text("no picture")
    folder = checkpoint("- {src: examples/red.png, text: y}\n", "- {src: examples/no.png, text: x}\n")
    assert of(folder) == ["y"]
    assert of(checkpoint("- {src: examples/red.png}\n")) == SCENES
    (tmp_path / "README.md").write_text("---\n{\n---\n")
    assert of(str(tmp_path)) == SCENES
