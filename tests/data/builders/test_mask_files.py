# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What 255 means in a PNG of masks."""

import numpy as np
import pytest
from PIL import Image

from segcompass_hf.data.builders.build_report import RowProblem
from segcompass_hf.data.builders.mask_files import objects_of_values, read_mask_file, split_void


def picture(*values: int, dtype=np.uint8) -> np.ndarray:
    """Squares of 4 x 4 pixels with these values in a row, on 0."""
    pixels = np.zeros((8, 6 * len(values) + 2), dtype)
    for place, value in enumerate(values):
        pixels[2:6, 6 * place + 2 : 6 * place + 6] = value
    return pixels


@pytest.mark.parametrize(
    ("values", "objects", "void"),
    [
        (picture(1, 2, 255), [1, 2], 16),  # Pascal VOC: instances
        (picture(7, 12, 255), [7, 12], 16),  # and classes
        (picture(1, 255), [1], 16),
        (picture(1, 2, 65535, dtype=np.uint16), [1, 2], 16),
        (picture(1, 2, 255, dtype=np.int32), [1, 2], 16),
        (picture(255), [255], None),
        (picture(1, 2, 3), [1, 2, 3], None),
        (picture(128, 255), [128, 255], None),  # evenly spaced, so that people see them
        (picture(127, 255), [127, 255], None),
        (picture(85, 170, 255), [85, 170, 255], None),
        (picture(253, 254, 255), [253, 254, 255], None),
        (picture(255, 300, dtype=np.uint16), [255, 300], None),
        (picture(0), [], None),
        (picture(1, dtype=bool), [1], None),
    ],
)
def test_void_beside_objects(values, objects, void):
    left, found = split_void(values, "m.png")
    assert list(objects_of_values(left, "m.png")) == objects
    assert (None if found is None else int(found.sum())) == void
    if found is not None:
        assert not left[found].any()


def test_a_void_rim_around_specks():
    """Numbered objects of a pixel each are objects, not the shades of a smooth edge."""
    values = np.zeros((9, 9), np.uint8)
    values[1:4, 1:4], values[5:8, 5:8] = 255, 255
    values[2, 2], values[6, 6] = 1, 2
    left, void = split_void(values, "m.png")
    assert list(objects_of_values(left, "m.png")) == [1, 2] and void.sum() == 16


def test_the_shades_of_a_smooth_edge_are_no_objects_beside_a_void():
    values = picture(255)
    values[1, 2:6], values[6, 2:6] = 80, 90
    assert split_void(values, "m.png")[1] is None
    with pytest.raises(RowProblem, match="seems to have smooth edges"):
        objects_of_values(values, "m.png")


def test_white_background_is_refused():
    values = picture(1, 2)
    values[values == 0] = 255
    with pytest.raises(RowProblem, match="has no 0 but 255 beside 1, 2: save the background as 0"):
        split_void(values, "m.png")


def test_values_below_zero_are_no_objects(tmp_path):
    path = tmp_path / "labels.tiff"  # -1 is the background, 0 the first object
    Image.fromarray(picture(1).astype(np.int32) - 1).save(path)
    with pytest.raises(RowProblem, match="has values down to -1; expected 0 for background") as caught:
        read_mask_file(path)
    assert caught.value.kind == "bad_annotation"
