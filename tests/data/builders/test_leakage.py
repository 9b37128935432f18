"""The same photograph in two data sets, found by what it shows."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from segcompass_hf.data import same_pictures


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """Soft random blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file)


def test_copies_are_found_at_any_size_and_compression(tmp_path):
    first = [picture(seed) for seed in range(5)]
    picture(3).resize((41, 27)).save(tmp_path / "another.png")
    second = [picture(9), compressed(picture(1)), tmp_path / "another.png", ImageOps.mirror(picture(0))]
    assert same_pictures(first, second) == [(1, 1), (3, 2)]
    assert same_pictures(first, []) == same_pictures([], second) == []


def test_plain_pictures_are_not_all_the_same():
    plain = [Image.new("RGB", (30, 20), colour) for colour in ("white", "black")]
    assert same_pictures(plain, [*plain, picture(0)]) == []


def test_an_unreadable_picture_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.jpg"):
        same_pictures([tmp_path / "broken.jpg"], [picture(0)])
