# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks as COCO run lengths, compressed or not, against pycocotools and by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from segcompass_hf.data.schema import compressed, decode_mask, decode_masks, encode_mask, run_lengths
from segcompass_hf.explain import mask_to_rle

# Down the columns: 1 of background, then 3 of the mask, 2 of background.
BY_HAND = np.array([[0, 1, 0], [1, 1, 0]], dtype=bool)


@pytest.mark.parametrize(
    "counts",
    [
        [1, 3, 2],
        (1, 3, 2),
        np.array([1, 3, 2]),
        np.array([1, 3, 2], np.uint8),
        [1.0, 3.0, 2.0],
        [1, 3, 0, 0, 2],
        "132",
        b"132",
    ],
)
def test_every_form_of_counts(counts):
    rle = {"size": [2, 3], "counts": counts}
    assert decode_mask(rle).dtype == bool and np.array_equal(decode_mask(rle), BY_HAND)
    assert np.array_equal(decode_masks([rle, rle], (2, 3)), [BY_HAND, BY_HAND])
    assert compressed(rle) == {"size": [2, 3], "counts": "132"}


def test_masks_of_every_kind_as_pycocotools_has_them():
    random = np.random.default_rng(0)
    masks = [random.random((37, 53)) < share for share in (0, 0.01, 0.5, 0.99, 1)]
    masks += [np.ones((1, 1), bool), np.zeros((1, 9), bool), np.ones((9, 1), bool)]
    masks.append(np.add.outer(np.arange(300), np.arange(700)) % 400 < 350)  # runs of several characters
    for mask in masks:
        stored, plain = encode_mask(mask), mask_to_rle(mask)
        assert np.array_equal(decode_mask(stored), mask)
        assert np.array_equal(coco_mask.decode(stored | {"counts": stored["counts"].encode()}), mask)
        assert np.array_equal(decode_mask(plain), mask) and compressed(plain) == stored
        assert plain["counts"] == run_lengths(stored["counts"].encode()).tolist()


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [4, 5], "counts": [0, 19]}, r"cover 19 pixels, the shortest 0; expected 4 x 5 = 20"),
        ({"size": [4, 5], "counts": [0, 25, -5]}, r"cover 20 pixels, the shortest -5"),
        ({"size": [4, 5], "counts": [2**62, 2**62, 2**62, 2**62, 20]}, "counts are .*; expected a text or a list"),
        ({"size": [4, 5], "counts": [2**61] * 8 + [20]}, "cover 18446744073709551636 pixels"),  # 2**64 + 20
        ({"size": [4, 5], "counts": []}, "cover 0 pixels"),
        ({"size": [4, 5], "counts": [0, 19.5, 0.5]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": [0, float("nan")]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": [0, float("inf")]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": [[0, 20]]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": ["0", "20"]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": [False, True]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": None}, "RLE counts are None"),
        ({"size": [4, 5], "counts": 20}, "RLE counts are 20"),
        ({"size": [4, 5], "counts": "0é"}, r"RLE counts hold '\\xe9', which is not ASCII"),
        ({"size": [4, 5], "counts": "\ud800"}, r"RLE counts hold '\\ud800', which is not ASCII"),
        ({"size": [4, 5], "counts": b"\xff"}, "which no COCO RLE does"),
        ({"size": [4], "counts": [0, 4]}, r"the size of an RLE is \[4\]"),
        ({"size": 20, "counts": [0, 20]}, "the size of an RLE is 20"),
        ({"size": ["4", "5"], "counts": [0, 20]}, "the size of an RLE is"),
        ({"size": [-4, -5], "counts": [0, 20]}, "the size of an RLE is"),
        ({"counts": [0, 20]}, "with the keys 'size' and 'counts'; got dict"),
        ([[0, 20]], "with the keys 'size' and 'counts'; got list"),
    ],
)
def test_what_is_no_rle_is_named(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(rle)
    with pytest.raises(ValueError, match=f"mask 1: .*{message}"):
        decode_masks([{"size": [4, 5], "counts": [20]}, rle], (4, 5))


def test_another_size_than_the_image():
    with pytest.raises(ValueError, match=r"mask 0 is \(5, 4\) but its image is \(4, 5\)"):
        decode_masks([{"size": [5, 4], "counts": [20]}], (4, 5))
    assert decode_masks(None, (4, 5)).shape == decode_masks([], (4, 5)).shape == (0, 4, 5)
