# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Images written as text: base64 in every writing, `data:` URLs, and texts that are neither."""

import base64
import io

import numpy as np
import pytest
import tiny

from segcompass_hf.images_segcompass import to_rgb_image


def encoded(kind: str = "PNG", size: tuple[int, int] = (20, 10)) -> str:
    file = io.BytesIO()
    tiny.tiny_image(0, size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_in_every_writing_is_the_image(kind):
    text = encoded(kind)
    image = to_rgb_image(base64.b64decode(text))
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n"
    unpadded_for_urls = text.replace("+", "-").replace("/", "_").rstrip("=")
    data_url = f"data:image/{kind.lower()};charset=utf-8;base64,{text}"
    for form in (text, lines, unpadded_for_urls, data_url, data_url.replace("data:image", "DATA:Image")):
        assert np.array_equal(np.asarray(to_rgb_image(form)), np.asarray(image))


def test_what_looks_like_base64_but_is_a_file_is_read_as_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "Qk0A"  # the base64 of "BM", how a bitmap begins
    tiny.tiny_image(0, (20, 10)).save(name, "PNG")
    assert to_rgb_image(name).size == (20, 10)
    with pytest.raises(FileNotFoundError, match="there is no file 'photo'"):
        to_rgb_image("photo")


@pytest.mark.parametrize(
    "text",
    [
        encoded()[:400] + "*" * 40_000,
        "data:image/png;base64," + "?" * 40_000,
        "data:image/png;base64," + encoded()[:200],
        "data:image/svg+xml," + "<svg>" * 9_000,
        "data:image/png;base64",
        encoded()[:200],
    ],
    ids=["no base64", "damaged URL", "half a URL", "URL without base64", "URL without comma", "half"],
)
def test_a_text_that_is_no_image_gives_a_short_error(text):
    with pytest.raises(ValueError) as error:
        to_rgb_image(text)
    assert len(str(error.value)) < 400
