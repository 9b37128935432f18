"""Which checkpoint answers where none is named, and bundled ones by name."""

import pytest

import segcompass_hf
from segcompass_hf.checkpoint import BUNDLED, bundled_folder, default_checkpoint


@pytest.fixture
def without_photos(monkeypatch, tmp_path):
    """As where the package was installed from a wheel."""
    bundled = segcompass_hf.bundled_checkpoint

    def missing(name="scenes-tiny"):
        if name == "photos-small":
            raise FileNotFoundError("photos-small is not here")
        return bundled(name)

    monkeypatch.setattr(segcompass_hf, "bundled_checkpoint", missing)


def test_without_photos_small_scenes_tiny_answers(without_photos):
    assert default_checkpoint() == default_checkpoint("folder:photos", None) == "scenes-tiny"


def test_with_it_scenes_alone_are_answered_by_scenes_tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(segcompass_hf, "bundled_checkpoint", lambda name: tmp_path / name)
    assert default_checkpoint() == default_checkpoint(None) == default_checkpoint("coco:a:b") == "photos-small"
    assert default_checkpoint("scenes:val:3") == default_checkpoint("reference.safetensors", "scenes:val")
    assert default_checkpoint("scenes:val:3") == "scenes-tiny"


def test_names_of_bundled_checkpoints(without_photos):
    tiny = str(segcompass_hf.bundled_checkpoint())
    assert bundled_folder("scenes-tiny") == bundled_folder("bundled") == tiny
    assert [bundled_folder(name) for name in ("./scenes-tiny", "me/mine", tiny)] == ["./scenes-tiny", "me/mine", tiny]
    with pytest.raises(FileNotFoundError, match="photos-small is not here"):
        bundled_folder("photos-small")


def test_every_bundled_checkpoint_says_what_it_knows():
    with pytest.raises(ValueError) as raised:
        segcompass_hf.bundled_checkpoint("none")
    assert str(raised.value).endswith(f"the names are {' and '.join(BUNDLED)}.")
    assert all(said.startswith(f"{name} answers; it ") for name, said in BUNDLED.items())
