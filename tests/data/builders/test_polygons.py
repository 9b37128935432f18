# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""COCO segmentations of every form become masks; every broken form has a name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refer_files import square

from segcompass_hf.data.builders.build_report import RowProblem
from segcompass_hf.data.builders.polygons import polygons_to_rle
from segcompass_hf.data.schema import decode_mask, encode_mask


def box(height: int, width: int, x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def runs_of(mask: np.ndarray) -> list[int]:
    """Uncompressed COCO run lengths: column by column, background first."""
    pixels = mask.T.reshape(-1).astype(int)
    changes = np.flatnonzero(np.diff(pixels)) + 1
    lengths = np.diff([0, *changes, len(pixels)]).tolist()
    return [0, *lengths] if pixels[0] else lengths


def test_polygons_are_united():
    rle = polygons_to_rle(square(2, 3, 5) + square(5, 6, 5), 30, 40)
    assert rle["size"] == [30, 40] and isinstance(rle["counts"], str)
    np.testing.assert_array_equal(decode_mask(rle), box(30, 40, 2, 3, 5) | box(30, 40, 5, 6, 5))


def test_a_bare_polygon_and_one_that_leaves_the_image():
    np.testing.assert_array_equal(decode_mask(polygons_to_rle(square(2, 3, 5)[0], 30, 40)), box(30, 40, 2, 3, 5))
    # 10 x 10 from (35, 25) in an image of 30 x 40: 5 x 5 are left.
    np.testing.assert_array_equal(decode_mask(polygons_to_rle(square(35, 25, 10), 30, 40)), box(30, 40, 35, 25, 5))


@pytest.mark.parametrize(
    "segmentation",
    [
        [[[2, 3], [7, 3], [7, 8], [2, 8]]],
        [[2, 3], [7, 3], [7, 8], [2, 8]],
        [[2.0, 3.0, 7.0, 3.0, 7.0, 8.0, 2.0, 8.0]],
        [((2, 3), (7, 3), (7, 8), (2, 8))],
    ],
)
def test_corners_as_pairs_are_the_same_polygon(segmentation):
    np.testing.assert_array_equal(decode_mask(polygons_to_rle(segmentation, 30, 40)), box(30, 40, 2, 3, 5))


@pytest.mark.parametrize("size", [[30, 40], [30.0, 40.0], ["30", "40"]])
@pytest.mark.parametrize("write", [int, float, str])
def test_run_lengths_and_sizes_as_floats_and_text(write, size):
    counts = [write(run) for run in (600, 10, 590)]  # 20 columns of 30, then ten pixels of the next
    mask = decode_mask(polygons_to_rle({"size": size, "counts": counts}, 30, 40))
    assert mask.sum() == 10 and mask[:10, 20].all()


def test_points_and_lines_beside_polygons_add_nothing():
    """Four numbers are a box to pycocotools; in a segmentation they are a line."""
    alone = polygons_to_rle(square(2, 3, 5), 30, 40)
    assert polygons_to_rle([[20, 20, 30, 25], [], *square(2, 3, 5), [1, 1]], 30, 40) == alone


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.02, 1))
def test_rle_of_all_forms_are_the_mask(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[0, 0] = True
    compressed = encode_mask(mask)
    for counts in (compressed["counts"], compressed["counts"].encode(), runs_of(mask)):
        rle = polygons_to_rle({"size": [height, width], "counts": counts}, height, width)
        np.testing.assert_array_equal(decode_mask(rle), mask)


GOOD = encode_mask(box(30, 40, 2, 3, 5))


@pytest.mark.parametrize(
    ("segmentation", "kind", "message"),
    [
        ([], "empty_mask", "no polygon of three or more points among 0"),
        ([[]], "empty_mask", "among 1"),
        ([[1, 1, 9, 9]], "empty_mask", "three or more points"),
        ([[1, 1, 5, 1, 5]], "bad_annotation", "5 numbers; x and y come in pairs"),
        ([[1, 1, 5, 1, 5, float("nan")]], "bad_annotation", "no list of finite numbers"),
        ([[1, 1, 5, 1, 5, "4"]], "bad_annotation", "no list of finite numbers"),
        ([[[1, 1], [5, 1], [5, "4"]]], "bad_annotation", "no list of finite numbers"),
        ([[1, 1, 5, 1, 10**400, 5]], "bad_annotation", "no list of finite numbers"),
        ([[1, 1, 5, 1, float("inf"), 5]], "bad_annotation", "no list of finite numbers"),
        # Drawn on the image twice as large, in parts of 1000, of 100 and of 1.
        (square(10, 10, 40), "bad_annotation", "x from 10 to 50 but the image is 30 x 40 .*in another size"),
        ([[250, 200, 750, 200, 750, 700]], "bad_annotation", "x from 250 to 750"),
        ([[5, 10, 75, 10, 75, 24]], "bad_annotation", "x from 5 to 75"),
        ([[0.1, 0.2, 0.7, 0.2, 0.7, 1.0]], "bad_annotation", "multiply x by the width 40 and y by the height 30"),
        (square(2, 3, 5) + square(50, 3, 5), "empty_mask", "polygon 1 has x from 50 to 55: no pixel inside"),
        ([[1, [1, 5], 1, 5, 5, 1]], "bad_annotation", "no list of finite numbers"),
        ([1, 1, 5, None, 5, 5], "bad_annotation", "no list of finite numbers"),
        ([square(1, 1, 4)[0], None], "bad_annotation", "polygon 1 is no list"),
        ([[1, 1, 2e9, 1, 2e9, 2e9]], "bad_annotation", "x from 1 to 2e\\+09 but the image is 30 x 40"),
        ([[100, 25, 110, 25, 110, 40]], "bad_annotation", "x from 100 to 110"),
        (square(50, 10, 5), "empty_mask", "no pixel inside the image of 30 x 40"),
        (None, "bad_annotation", "the segmentation is None; expected polygons"),
        ("polygon", "bad_annotation", "expected polygons"),
        ({"counts": "abc"}, "bad_annotation", 'an RLE has "size"'),
        (GOOD | {"size": [30]}, "wrong_size", r"the RLE is \[30\] but its image is \[30, 40\]"),
        (GOOD | {"size": [40, 30]}, "wrong_size", "transposed"),
        (GOOD | {"size": [31, 40]}, "wrong_size", r"\[31, 40\]"),
        (GOOD | {"counts": 5}, "bad_annotation", "RLE counts are 5"),
        (GOOD | {"counts": GOOD["counts"][:-1]}, "bad_annotation", "is the string cut short"),
        (GOOD | {"counts": GOOD["counts"] + "1"}, "wrong_size", "expected 30 x 40 = 1200 pixels"),
        (GOOD | {"counts": GOOD["counts"] + "P"}, "bad_annotation", "end in the middle of a number"),
        (GOOD | {"counts": "~~"}, "bad_annotation", "hold '~', which no COCO RLE does"),
        (GOOD | {"counts": "é"}, "bad_annotation", "other than ASCII"),
        ({"size": [30, 40], "counts": [100, 10]}, "wrong_size", "cover 110 pixels"),
        ({"size": [30, 40], "counts": [1300, -100]}, "bad_annotation", "the shortest -100"),
        ({"size": [30, 40], "counts": []}, "wrong_size", "cover 0 pixels"),
        ({"size": [30, 40], "counts": [1200]}, "empty_mask", "no pixel"),
        ({"size": [30, 40], "counts": [600.5, 599.5]}, "bad_annotation", "expected run lengths"),
        ({"size": [30, 40], "counts": [600, True, 599]}, "bad_annotation", "expected run lengths"),
        ({"size": [30, 40], "counts": [float("inf"), 600]}, "bad_annotation", "expected run lengths"),
        ({"size": [float("inf"), 40], "counts": [600, 600]}, "bad_annotation", "two integers"),
        ({"size": [30.5, 40], "counts": [600, 600]}, "bad_annotation", "two integers"),
        (GOOD | {"counts": "\ud800"}, "bad_annotation", "other than ASCII"),
        (GOOD | {"counts": "é".encode()}, "bad_annotation", "which no COCO RLE does"),
        (encode_mask(np.zeros((30, 40))), "empty_mask", "no pixel"),
    ],
)
def test_broken_segmentations_have_a_name(segmentation, kind, message):
    with pytest.raises(RowProblem, match=message) as caught:
        polygons_to_rle(segmentation, 30, 40)
    assert caught.value.kind == kind


@pytest.mark.parametrize("counts", [GOOD["counts"][:-2], GOOD["counts"] + "1", "", "0" + GOOD["counts"][1:]])
def test_runs_that_do_not_cover_the_image_are_not_decoded(counts):
    """pycocotools would leave memory as it is behind the last run."""
    with pytest.raises(ValueError, match="the runs of the mask cover|cut short"):
        decode_mask({"size": [30, 40], "counts": counts})


def test_numbers_without_end_are_refused():
    with pytest.raises(ValueError, match="more than 35 bits"):
        decode_mask({"size": [30, 40], "counts": "o" * 20 + "0"})


@pytest.mark.parametrize("low", [-0.02, 0.0, 0.04])
def test_shares_of_the_sides_that_overshoot_are_refused(low):
    with pytest.raises(RowProblem, match="multiply x by the width 40 and y by the height 30"):
        polygons_to_rle([[low, 0.1, 1.003, 0.1, 0.5, 1.02]], 30, 40)
