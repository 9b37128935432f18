"""Image files: which are opened, how many pixels are read, and that nothing is decoded before."""

import ast
import io
import re
import struct
import subprocess
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import segcompass_hf
from segcompass_hf.image_files_segcompass import max_image_pixels, open_image
from segcompass_hf.images_segcompass import to_rgb_image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
SETTING = "SEGCOMPASS_MAX_IMAGE_PIXELS"


def png_of_size(width, height):
    """A PNG whose head says so; its pixels are one."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.fixture
def nothing_runs(monkeypatch):
    for name in ("check_call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("another program was run"))


@pytest.fixture
def nothing_decodes(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("an image was decoded"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO"])
def test_formats_of_photographs_are_read(form, tmp_path):
    Image.new("RGB", (8, 6), (200, 200, 200)).save(tmp_path / "a", form)
    for source in (tmp_path / "a", str(tmp_path / "a"), (tmp_path / "a").read_bytes(), Image.open(tmp_path / "a")):
        assert abs(np.asarray(to_rgb_image(source), float) - 200).max() < 4


@pytest.mark.parametrize("form", ["ICO", "TGA", "PCX", "EPS", "PDF"])
def test_other_formats_are_named_and_not_read(form, tmp_path, nothing_runs):
    Image.new("RGB", (16, 16)).save(tmp_path / "dog.png", form)
    with pytest.raises(ValueError, match=r"dog.png' cannot be read as an image .*\(PNG, JPEG, WEBP"):
        to_rgb_image(tmp_path / "dog.png")


def test_postscript_runs_nothing(tmp_path, nothing_runs):
    (tmp_path / "dog.png").write_bytes(POSTSCRIPT)
    for source in (tmp_path / "dog.png", POSTSCRIPT, {"bytes": POSTSCRIPT, "path": None}):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            to_rgb_image(source)
    with Image.open(io.BytesIO(POSTSCRIPT)) as lazy, pytest.raises(ValueError, match="an open EPS file"):
        to_rgb_image(lazy)


def test_what_is_no_image_is_told_in_the_same_words_every_time():
    """They are written into the records of an evaluation, and equal runs give equal files."""
    with pytest.raises(ValueError, match=r"3 bytes cannot be read as an image \(cannot identify image file\);"):
        to_rgb_image(b"abc")


class TestPixels:
    @pytest.mark.parametrize("size", [(13_000, 13_000), (7_100, 7_100), (20_000, 20_000), (60_000, 60_000)])
    def test_more_than_50_million_are_not_decoded(self, size, nothing_decodes):
        with pytest.raises(ValueError, match=rf"[Aa]t most 50000000 (pixels )?are read.*{SETTING}"):
            to_rgb_image(png_of_size(*size))

    def test_the_limit_itself_is_read(self, monkeypatch):
        monkeypatch.setenv(SETTING, "24")
        assert to_rgb_image(Image.new("RGB", (6, 4))).size == (6, 4)
        for image in (Image.new("RGB", (5, 5)), np.zeros((5, 5, 3), np.uint8), torch.zeros(3, 5, 5)):
            with pytest.raises(ValueError, match=rf"5 x 5 = 25 pixels; at most 24 are read.*{SETTING}"):
                to_rgb_image(image)

    def test_raising_it_raises_pillow_s_too(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        monkeypatch.setenv(SETTING, "400000000")
        assert open_image(png_of_size(20_000, 20_000)).size == (20_000, 20_000)

    @pytest.mark.parametrize("value", ["0", "-5", "many", "1e9"])
    def test_what_is_no_number(self, value, monkeypatch):
        monkeypatch.setenv(SETTING, value)
        with pytest.raises(ValueError, match=f"{SETTING} is '{value}'; expected a positive number"):
            max_image_pixels()


class TestRanges:
    @pytest.mark.parametrize(
        "values, expected",
        [
            (np.float32([200, 255.4, -3.2]), [200, 255, 0]),  # bicubic resizing of 0..255
            (np.float64([200, 300, 0]), [200, 255, 0]),
            (np.float16([100, 256, 0]), [100, 255, 0]),
            (np.int16([200, 256, -4]), [200, 255, 0]),
            (np.int64([200, 300, -30]), [200, 255, 0]),
            (np.uint16([200, 256, 0]), [200, 255, 0]),  # 8 bits in a wider type
            (np.float32([0.5, 1.1, -0.1]), [128, 255, 0]),  # 0.5 * 255 = 127.5, to even
            (np.uint16([0, 257, 65535]), [0, 1, 255]),
            (np.int32([32896, 65535, 0]), [128, 255, 0]),  # 32896 / 257
            (np.float32([32896, 65600, -100]), [128, 255, 0]),
            (np.float32([0, 0, -1e-7]), [0, 0, 0]),
            (np.int16([0, 0, -2]), [0, 0, 0]),
        ],
    )
    def test_overshoot_is_clipped(self, values, expected):
        for image in (values[None], torch.from_numpy(values)[None]):
            assert np.asarray(to_rgb_image(image))[0, :, 0].tolist() == expected

    def test_floats_of_eight_bits(self):
        values = torch.tensor([[0.0, 0.5, 1.0]]).to(torch.float8_e4m3fn)  # all three are exact
        assert np.asarray(to_rgb_image(values))[0, :, 0].tolist() == [0, 128, 255]

    def test_transparency_of_grey_pictures_is_white(self):
        file = io.BytesIO()
        Image.fromarray(np.uint16([[0, 32896, 65535]])).save(file, "PNG", transparency=0)
        assert np.asarray(to_rgb_image(file.getvalue()))[0, :, 0].tolist() == [255, 128, 255]
        premultiplied = Image.merge("LA", [Image.new("L", (2, 1), 60), Image.new("L", (2, 1), 255)]).convert("La")
        assert np.asarray(to_rgb_image(premultiplied))[0, :, 0].tolist() == [60, 60]

    @pytest.mark.parametrize(
        "values",
        [
            np.float32([-1, 1]),
            np.float32([-2.1, 2.6]),
            np.int8([-128, 127]),
            np.float32([0, 1e6]),
            np.int64([0, 2**20]),
        ],
    )
    def test_normalised_and_other_values_are_no_picture(self, values):
        with pytest.raises(ValueError, match="image is an array of values from .*; expected 0 to 1"):
            to_rgb_image(values[None])


def test_addresses_are_opened_as_files_are(nothing_runs):
    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            picture = io.BytesIO()
            Image.new("RGB", (6, 4), (1, 2, 3)).save(picture, "PNG")
            self.wfile.write(POSTSCRIPT if self.path == "/dog.png" else picture.getvalue())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert to_rgb_image(f"{address}/a.png").getpixel((0, 0)) == (1, 2, 3)
        with pytest.raises(ValueError, match="cannot be read as an image"):
            to_rgb_image(f"{address}/dog.png")
    finally:
        server.shutdown()
        server.server_close()


def test_files_are_opened_in_one_place():
    package, found = Path(segcompass_hf.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(r"(PIL\.)?Image\.open|load_image", ast.unparse(node.func)):
                found.add(path.relative_to(package).as_posix())
    assert found == {
        "image_files_segcompass.py",
        "hub/endpoint/handler_inputs.py",  # stands alone, with limits of its own
        "training/grpo/pictures.py",  # a picture that it has drawn itself
    }
