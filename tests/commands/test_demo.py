"""What `segcompass demo` shows of photographs, with checkpoints of random weights in place of the bundled ones."""

import pytest
import tiny
from PIL import Image

import segcompass_hf
from segcompass_hf import cli
from segcompass_hf.commands.common import UserError
from segcompass_hf.commands.demo import PHOTOGRAPHS, read_photographs


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone that holds tiny checkpoints under both names, and two photographs."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("scenes-tiny", "photos-small"):
        folder = root / "checkpoints" / name
        tiny.tiny_model("llava", slot_logit_threshold=-100.0, max_reasoning_tokens=8).save_pretrained(folder)
        processor = tiny.tiny_processor("llava")
        processor.add_trained_words(["the cat"])
        processor.save_pretrained(folder)
    photos = (root / PHOTOGRAPHS).parent
    photos.mkdir(parents=True)
    for number, name in enumerate(("cat", "rocket")):
        tiny.tiny_image(number, (60, 45)).save(photos / f"{name}.jpg")
    (root / PHOTOGRAPHS).write_text(
        "grid: 6\nphotographs:\n- {image: cat.jpg, instruction: the cat}\n"
        "- {image: rocket.jpg, instruction: the rocket, failure: it finds a cat}\n"
    )
    return root


@pytest.fixture
def bundled(clone, monkeypatch):
    """The names that are there; the others are missing."""
    there = {"scenes-tiny", "photos-small"}

    def bundled_checkpoint(name="scenes-tiny"):
        if name not in there:
            raise FileNotFoundError(f"{name} is not here; clone the repository")
        return clone / "checkpoints" / name

    monkeypatch.setattr(segcompass_hf, "bundled_checkpoint", bundled_checkpoint)
    return there


def test_photographs_first_then_scenes(bundled, tmp_path, capsys):
    assert cli.main(["demo", "--samples", "1", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "photos-small on 2 photographs. Their true masks are not known, so there are no scores" in out
    assert out.index("[0] cat.jpg: the cat") < out.index("[1] rocket.jpg: the rocket") < out.index("scenes-tiny on 1")
    assert out.count("IoU with the truth") == 1, "of the scene"
    told = out[out.index("[1] rocket.jpg") : out.index("scenes-tiny on 1")]
    assert "A typical failure: it finds a cat" in told and 'not trained on the word "rocket"' in told
    assert "failure" not in out[: out.index("[1] rocket.jpg")]
    names = {path.name for path in tmp_path.glob("*.png")}
    page = (tmp_path / "index.html").read_text("utf-8")
    assert page.index("photos-small on 2") < page.index(">the rocket</h2>") < page.index("scenes-tiny on 1")
    assert "A typical failure: it finds a cat" in page and page.count("The whole explanation") == 3
    assert {"photograph_00_cat.png", "photograph_01_rocket.png", "overview.png"} <= names and len(names) == 4
    with Image.open(tmp_path / "overview.png") as all_rows, Image.open(tmp_path / "photograph_00_cat.png") as one:
        assert all_rows.height > 2.5 * one.height


def test_without_the_checkpoint_scenes_alone_and_why(bundled, tmp_path, capsys):
    bundled.remove("photos-small")
    assert cli.main(["demo", "--samples", "1", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("No photographs are shown: photos-small is not here; clone the repository\n")
    assert sorted(path.name[:5] for path in tmp_path.glob("*.png")) == ["overv", "scene"]


def test_a_list_of_photographs_that_cannot_be_read(clone, tmp_path):
    assert read_photographs(clone / PHOTOGRAPHS)[0] == 6
    listed = tmp_path / "listed.yaml"
    with pytest.raises(UserError, match="cannot read .*listed.yaml"):
        read_photographs(listed)
    listed.write_text("photographs: []")
    with pytest.raises(UserError, match="cannot read .*'grid'"):
        read_photographs(listed)
    listed.write_text("grid: 6\nphotographs: [{image: cat.jpg}]")
    with pytest.raises(UserError, match="needs image and instruction: {'image': 'cat.jpg'}"):
        read_photographs(listed)
