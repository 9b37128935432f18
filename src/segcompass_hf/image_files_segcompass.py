# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image files, opened one way everywhere: known formats only, and no more pixels than the user allows."""

import io
import os
import time

from PIL import Image, UnidentifiedImageError

MAX_ASPECT_RATIO = 200  # beyond it the vision encoders resize to strips without content, or to gigapixels
MAX_PIXELS = 50_000_000  # width times height of an image, unless the environment says otherwise
PIXELS_SETTING = "SEGCOMPASS_MAX_IMAGE_PIXELS"
# Pillow reads more, some by running other programs (EPS); HEIF where a plugin has registered it. JPEG reads MPO too.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
FETCH_SECONDS = 30.0
FETCH_BYTES = 256_000_000
EXIF_ORIENTATION = 0x0112


def max_image_pixels() -> int:
    """Width times height of the largest image that is read: `SEGCOMPASS_MAX_IMAGE_PIXELS` in the environment, or 50
    million. An answer takes about 60 bytes of memory for each of them.

    Raises:
        `ValueError`: the setting is no positive number.
    """
    setting = os.environ.get(PIXELS_SETTING, "").strip() or str(MAX_PIXELS)
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(
            f"{PIXELS_SETTING} is {setting!r}; expected a positive number of pixels, such as {MAX_PIXELS}."
        )
    return int(setting)


def open_image(source: str | os.PathLike | bytes, name: str = "image") -> Image.Image:
    """Open an image file, the one way for all of the package: known formats, bounded pixels, nothing decoded yet.

    Args:
        source (`str`, `os.PathLike` or `bytes`): Path, or the content of a file.
        name (`str`, *optional*, defaults to `"image"`): What error messages call it.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it is of none of `FORMATS`, damaged, or has more pixels than `max_image_pixels()`.
    """
    limit = max_image_pixels()
    if limit > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit follows the one that was raised
        Image.MAX_IMAGE_PIXELS = max(limit, Image.MAX_IMAGE_PIXELS)
    encoded = isinstance(source, bytes)
    shown = f"{len(source)} bytes" if encoded else repr(os.fspath(source))
    if not encoded and not os.path.isfile(source):
        raise FileNotFoundError(f"{name}: there is no file {shown}; give the path of an image file.")
    Image.init()
    formats = [form for form in FORMATS if form in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(source) if encoded else source, formats=formats)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:  # before its sides are known here
        raise ValueError(
            f"{name}: {shown} cannot be read as an image ({error}). At most {limit} pixels are read; make it smaller, "
            f"or raise {PIXELS_SETTING} in the environment."
        ) from error
    except Exception as error:  # damaged files raise about anything
        # Pillow's own words for this name a place in memory: equal runs would not write equal records.
        detail = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{name}: {shown} cannot be read as an image ({detail}); is it damaged or not an image "
            f"({', '.join(formats)})?"
        ) from error
    check_size(image, name)
    return image


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation of an image, decoded or not, exchanges its sides."""
    return image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


def check_size(image: Image.Image, name: str) -> None:
    """Refuse with a `ValueError` what has too many pixels, none, or sides that differ too much."""
    width, height = image.size
    if width * height > max_image_pixels():
        raise ValueError(
            f"{name} is {width} x {height} = {width * height} pixels; at most {max_image_pixels()} are read. Make it "
            f"smaller, or raise {PIXELS_SETTING} in the environment (about 60 bytes of memory a pixel)."
        )
    if min(width, height) == 0 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{name} is {width} x {height} pixels; sides may differ by a factor of at most {MAX_ASPECT_RATIO} and "
            "must not be empty. Crop or pad it first."
        )


def fetch_image(address: str, name: str) -> bytes:
    """What an address gives, at most 256 MB within 30 seconds; raises `ValueError`."""
    from transformers.image_utils import httpx

    deadline, content = time.monotonic() + FETCH_SECONDS, bytearray()
    try:
        with httpx.stream("GET", address, timeout=FETCH_SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                content += part
                if len(content) > FETCH_BYTES or time.monotonic() > deadline:
                    raise ValueError(f"more than {FETCH_SECONDS:g} seconds or {FETCH_BYTES} bytes")
    except Exception as error:  # of whatever kind the HTTP library has
        raise ValueError(
            f"{name}: {address!r} gives no image ({type(error).__name__}: {error}); is it right and reachable?"
        ) from error
    return bytes(content)


def read_image(source: str | os.PathLike | bytes, name: str) -> Image.Image:
    """As [`open_image`], and decode it."""
    image = open_image(source, name)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise about anything
        shown = f"{len(source)} bytes" if isinstance(source, bytes) else repr(os.fspath(source))
        raise ValueError(
            f"{name}: {shown} cannot be read as an image ({error}); is it damaged or not an image?"
        ) from error
    return image
