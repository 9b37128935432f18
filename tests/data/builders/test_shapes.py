# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""LabelMe's shapes."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from segcompass_hf.data.builders.build_report import RowProblem
from segcompass_hf.data.builders.shapes import draw_shape

SIZE = (20, 30)


def draw(kind: str | None, *points: tuple[float, float], **fields) -> np.ndarray | None:
    shape = {"shape_type": kind, **fields} if kind is not None else fields
    return draw_shape(shape, np.array(points, dtype=float), 3, SIZE)


def png(values: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_rectangles():
    expected = np.zeros(SIZE, bool)
    expected[4:11, 5:16] = True  # both corners belong to it
    corners = [(5, 4), (15, 10)]
    for points in (corners, corners[::-1], [(5, 10), (15, 4)], [(5.9, 4.9), (15.2, 10.7)]):
        np.testing.assert_array_equal(draw("rectangle", *points), expected)
    for kind in ("rectangle", "oriented_rectangle", "polygon", None, ""):
        np.testing.assert_array_equal(draw(kind, (5, 4), (15, 4), (15, 10), (5, 10)), expected)


def test_circles():
    """Centre (14, 9), radius 5: rows 4 to 14, columns 9 to 19, about 25 pi = 79 pixels and half of the outline."""
    mask = draw("circle", (14, 9), (17, 13))
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 14, 9, 19)
    assert 79 <= mask.sum() <= 79 + 18 and not mask[4, 9] and mask[9, 14]
    np.testing.assert_array_equal(mask[:, 9:20], mask[:, 9:20][:, ::-1])
    clipped = draw("circle", (0, 0), (5, 0))
    assert clipped.shape == SIZE and clipped[0, 5] and not clipped[4, 4]


def test_masks_lie_where_their_first_pixel_says():
    values = np.array([[0, 255, 255], [255, 255, 0]], np.uint8)
    mask = draw("mask", (7, 4), (9, 5), mask=png(values))
    assert mask.sum() == 4 and (mask[4:6, 7:10] == (values > 0)).all()


def test_polygons_of_two_points_enclose_nothing():
    assert draw("polygon", (1, 1), (5, 5)) is None


@pytest.mark.parametrize(
    ("kind", "points", "fields", "problem", "message"),
    [
        ("linestrip", [(1, 1), (5, 1), (5, 5)], {}, "bad_annotation", "shape 3 is a 'linestrip' of 3 points"),
        ("line", [(1, 1), (5, 1)], {}, "bad_annotation", "lines and points have no area"),
        ("points", [(1, 1), (5, 1), (5, 5)], {}, "bad_annotation", "is a 'points'"),
        ("point", [(1, 1)], {}, "bad_annotation", "is a 'point' of 1 points"),
        ("rectangle", [(1, 1), (5, 1), (5, 5)], {}, "bad_annotation", "is a 'rectangle' of 3 points"),
        ("circle", [(1, 1)], {}, "bad_annotation", "is a 'circle' of 1 points"),
        (["polygon"], [(1, 1), (5, 1), (5, 5)], {}, "bad_annotation", "is a .'polygon'. of 3"),
        ("mask", [(1, 1), (3, 2)], {}, "unreadable_mask", "shape 3 has no mask that can be read"),
        ("mask", [(1, 1), (3, 2)], {"mask": "é"}, "unreadable_mask", "no mask that can be read"),
        ("mask", [(1, 1), (3, 2)], {"mask": "bm8="}, "unreadable_mask", "cannot be read as an image"),
        ("mask", [(28, 1), (30, 2)], {"mask": png(np.ones((2, 3), np.uint8))}, "wrong_size", "2 x 3 at .28, 1."),
        ("mask", [(2, 2), (6, 4)], {"mask": png(np.ones((2, 3), np.uint8))}, "wrong_size", "2 x 3 for a box of 3 x 5"),
    ],
)
def test_shapes_without_an_area_are_refused(kind, points, fields, problem, message):
    with pytest.raises(RowProblem, match=message) as caught:
        draw(kind, *points, **fields)
    assert caught.value.kind == problem
